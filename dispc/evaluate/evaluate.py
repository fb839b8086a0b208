"""The quality of masks, or of an artifact: perplexity on texts and accuracy on tasks, as one report.

Everything that can be checked without running the model is checked first; only errors that lm-eval meets on the way (no
tokenizer, items that do not fit their definition) come later. The report is written after each text and each task.
"""

import math
import platform
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispc.evaluate.perplexity import Perplexity, Scorer, measure_perplexity, open_scorer, text_windows
from dispc.evaluate.zero_shot import TaskFigure, find_tasks, measure_task
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.support.errors import DataError, Interrupted
from dispc.support.files import check_outputs, require_place, write_json
from dispc.support.typed_json import OPTIONAL, to_json
from dispc.support.version import __version__, versions

PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "lm-eval")
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Given what is counted, something that shows (done, in all) while it is open."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is judged (a model directory, under `masks` or dense, or an artifact), and on what.

    `record` writes the perplexity into the mask file's metadata; its sets stay as they are.
    """

    path: Path
    masks: Path | None = None
    data: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    sequence_length: int | None = None
    max_windows: int | None = None
    include: Path | None = None
    limit: int | None = None
    device: str = "cpu"
    record: bool = False
    json_file: Path | None = None

    def __post_init__(self) -> None:
        if not self.data and not self.tasks:
            raise DataError("nothing to measure: give --data FILE for perplexity, --tasks NAMES for accuracy, or both")
        if self.json_file:
            sources = (self.path, self.masks, self.include, *self.data)
            check_outputs([self.json_file], [Path(source) for source in sources if source])
        if self.record and not (self.masks and self.data):
            raise DataError("--record writes a perplexity into a mask file; give --masks FILE and --data FILE with it")
        if self.record and self.masks:
            require_place(self.masks)


@dataclass(kw_only=True)
class EvalReport:
    """What was judged (a model or artifact, under which masks), in which arithmetic and where, and every figure.

    `complete` is False until all that was asked for is measured. `tasks` is None where none were asked for.
    """

    model: str
    masks: str | None
    dtype: str
    device: str
    versions: Mapping[str, str]
    complete: bool = False
    perplexity: list[Perplexity] = field(default_factory=list)
    tasks: dict[str, TaskFigure] | None = field(default=None, metadata=OPTIONAL)

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        content: dict[str, Any] = to_json(self)
        return content


def evaluate(options: EvalOptions, bar: Bar) -> EvalReport:
    """Measure all that the options ask for.

    Raises:
        DispcError: when anything asked for cannot be had; what was measured until then is in the report's file.
        Interrupted: at Ctrl-C, where a file holds what was measured until then.
    """
    manager = find_tasks(list(options.tasks), options.include) if options.tasks else None
    scorer = open_scorer(options.path, options.masks, options.device)
    for source in options.data:
        text_windows(source, scorer.directory, scorer.positions, options.sequence_length)
    report = _head(options, scorer)
    _write(options, report)
    try:
        _measure(options, scorer, manager, report, bar)
    except KeyboardInterrupt:
        if not options.json_file:
            raise
        raise Interrupted(f"interrupted; {options.json_file} holds what was measured", signal.SIGINT) from None
    return report


def _measure(options: EvalOptions, scorer: Scorer, manager: Any, report: EvalReport, bar: Bar) -> None:
    """Fill in the report, part by part."""
    for source in options.data:
        with bar("windows") as count:
            perplexity = measure_perplexity(
                scorer, source, sequence_length=options.sequence_length, max_windows=options.max_windows, progress=count
            )
        if math.isnan(perplexity.mean_nll):
            raise DataError(f"{options.path}: gives logits that are not numbers on {source}; are its weights finite?")
        report.perplexity.append(perplexity)
        _write(options, report)
    if options.record and options.masks:
        try:
            record_perplexity(options.masks, open_checkpoint(options.path), report.perplexity, options.max_windows)
        except OSError as error:
            words = ", ".join(f"{each.perplexity:.2f} on {each.data}" for each in report.perplexity)
            raise DataError(f"{options.masks}: cannot be written ({error.strerror}); not recorded: {words}") from error
    if options.tasks:
        report.tasks = {}
    for task in options.tasks:
        with bar(f"requests of {task}") as count:
            figures = measure_task(scorer, task, manager=manager, limit=options.limit, progress=count)
        report.tasks = (report.tasks or {}) | figures
        _write(options, report)
    report.complete = True
    _write(options, report)


def record_perplexity(
    file: Path, checkpoint: Checkpoint, figures: Sequence[Perplexity], max_windows: int | None = None
) -> None:
    """Write perplexities into the metadata of a mask file, which is replaced as a whole."""
    masks = Masks.load(file)
    words = "; ".join(_in_words(figure, max_windows) for figure in figures)
    masks.with_metadata({"perplexity": words}).save(file, checkpoint.config)


def _in_words(measured: Perplexity, max_windows: int | None) -> str:
    first = f", the first {measured.windows}" if max_windows else ""
    return f"{measured.perplexity:.2f} on {measured.data}, windows of {measured.sequence_length}{first}"


def _head(options: EvalOptions, scorer: Scorer) -> EvalReport:
    facts = scorer.facts()
    return EvalReport(
        model=str(options.path),
        masks=str(options.masks) if options.masks else None,
        dtype=facts["dtype"],
        device=facts["device"],
        versions={"dispc": __version__, "python": platform.python_version()} | versions(*PACKAGES),
    )


def _write(options: EvalOptions, report: EvalReport) -> None:
    if options.json_file:
        write_json(options.json_file, report.as_dict())
