"""Recovery after pruning: the kept weights are trained, nothing else. What is trained is the masked reference."""

import hashlib

from dispc.learn.distributed import gathered
from dispc.learn.recovered import write_recovered
from dispc.learn.recovery_options import RecoverOptions
from dispc.learn.recovery_run import Recovered, Recovery
from dispc.learn.run import Progress, begin
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.model.text import TextTokens, load_tokens, windows
from dispc.support.errors import LearnError

HELD_OUT = 16
"""Windows that a run is judged by, at most: of the text's end where no text is given for it."""


def recover(
    options: RecoverOptions,
    progress: Progress = lambda record, steps: None,
    *,
    resume: bool = False,
    force: bool = False,
) -> tuple[Recovered, bool]:
    """Recover the pruned model and write `options.output`; the outcome, and whether this process wrote it.

    The weights written are those of the judgement with the lowest loss on held-out text, the first, before any step,
    included. `resume` and `force` are those of `learn`.

    Raises:
        DispcError: when an input is unusable, or nothing can be written.
        Interrupted: when a signal ended the run, which is saved.
    """
    checkpoint, masks = open_checkpoint(options.model), Masks.load(options.masks)
    masks.check(checkpoint.config, options.masks)
    teacher = check_teacher(checkpoint, options)
    options, processes = begin(options, checkpoint, resume=resume, force=force)
    rows, held_out = texts(options)
    inputs = {
        "the model's configurations": checkpoint.config_sha256,
        "the model's weights": processes.digest(lambda: checkpoint.weights_sha256),
        "the teacher's weights": processes.digest(lambda: teacher.weights_sha256),
        "the masks": masks.sha256(),
        "the tokens of the texts": hashlib.sha256(rows.tobytes() + held_out.tobytes()).hexdigest(),
    }
    recovery = Recovery(options, checkpoint, teacher, masks, processes, held_out, inputs)
    recovery.start(resume=resume)
    recovery.run(rows, progress)
    outcome = recovery.outcome()
    recovery.go_to_best()
    weights = gathered(dict(recovery.model.named_parameters()))
    if processes.main:
        write_recovered(options, checkpoint, masks, recovery.wrapped, weights, outcome, force=force or resume)
    processes.wait()
    return outcome, processes.main


def check_teacher(student: Checkpoint, options: RecoverOptions) -> Checkpoint:
    """The teacher's checkpoint.

    Raises:
        LearnError: when its logits are not of the same tokens.
    """
    if options.teacher is None:
        return student
    teacher = open_checkpoint(options.teacher)
    for what, ours, theirs in (
        ("model_type", student.config.family.model_type, teacher.config.family.model_type),
        ("vocab_size", student.config.vocab_size, teacher.config.vocab_size),
    ):
        if ours != theirs:
            raise LearnError(
                f"{options.teacher}: cannot teach {options.model}: {what} is {theirs}, the model has {ours}; "
                "give the dense model that it was made from"
            )
    return teacher


def texts(options: RecoverOptions) -> tuple[TextTokens, TextTokens]:
    """Windows to learn on, and windows to be judged by: of `held_out`, or cut off the end of the text."""
    length = options.sequence_length
    rows = windows(load_tokens(options.data, options.model), length, options.data)
    if options.held_out is not None:
        return rows, windows(load_tokens(options.held_out, options.model), length, options.held_out)[:HELD_OUT]
    count = min(HELD_OUT, max(1, len(rows) // 10))
    if len(rows) == count:
        raise LearnError(
            f"{options.data}: holds {len(rows)} window of {length} tokens, and one is kept to judge by; "
            "give more text, --held-out TEXT, or a smaller --sequence-length"
        )
    return rows[:-count], rows[-count:]
