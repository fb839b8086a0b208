"""Zero-shot tasks of lm-evaluation-harness, on a torch model or an artifact through one adapter."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dispc.evaluate.perplexity import Scorer, logits_of, negative_log_likelihood
from dispc.model.text import quiet_datasets
from dispc.model.tokenizer import Tokenizer
from dispc.support.errors import DataError, first_line
from dispc.support.extras import need
from dispc.support.inputs import regular

METRICS = ("acc_norm", "acc", "exact_match")
"""The first of these that a task reports is its figure."""
BY_LIKELIHOOD = ("multiple_choice", "loglikelihood")
"""What lm-eval calls the tasks that are judged by the likelihood of given answers."""


def find_tasks(tasks: list[str], include: Path | None = None) -> Any:
    """lm-eval's manager of tasks, once it knows all of `tasks` (or groups of them) and their data are at hand.

    `include` is a directory with task definitions of one's own; their data files need no network.

    Raises:
        DispcError: when lm-eval is missing, a task is unknown, its data cannot be had, or its figure is none of
            `METRICS` by likelihood.
    """
    need("lm_eval", "eval")
    from lm_eval.tasks import TaskManager, get_task_dict

    if include is not None and not include.is_dir():
        raise DataError(f"--include {include}: no such directory")
    for path in include.rglob("*") if include else ():  # lm-eval would wait for a pipe
        if path.exists() and not path.is_dir():
            regular(path, DataError)
    folder = str(include) if include else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # reading lm-eval's own thousands of definitions takes a while
        manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise DataError(f"--tasks {task}: lm-eval knows no such task; --include DIR adds definitions of your own")
    try:
        with quiet_datasets():
            tree = get_task_dict(tasks, manager)
    except Exception as error:  # no network, no file, nonsense in it: `datasets` raises many kinds
        raise DataError(f"the data of {', '.join(tasks)} cannot be had: {first_line(error)}") from error
    for name, task in _single_tasks(tree):
        if task.OUTPUT_TYPE not in BY_LIKELIHOOD:
            what = f"is a task of kind {task.OUTPUT_TYPE}; choose tasks that are judged by likelihood"
            raise DataError(f"--tasks {name}: {what} ({', '.join(BY_LIKELIHOOD)})")
        if not set(METRICS) & set(task.aggregation()):
            raise DataError(f"--tasks {name}: reports none of {', '.join(METRICS)}")
    return manager


def _single_tasks(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names and tasks in what lm-eval finds, where groups hold tasks and groups."""
    for name, entry in tree.items():
        if isinstance(entry, Mapping):
            yield from _single_tasks(entry)
        else:
            yield name, entry


@dataclass(frozen=True)
class TaskFigure:
    """`value` and `stderr` (shares of 1) of `metric`, the first of `METRICS` that a task reports; all of them in
    `metrics`. `items` is how many it was measured on."""

    metric: str
    value: float
    stderr: float
    items: int
    metrics: Mapping[str, float]


def measure_task(
    scorer: Scorer,
    task: str,
    *,
    manager: Any,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TaskFigure]:
    """The figure of `task`, which `manager` (of `find_tasks`) knows, by its name; of a group, those of its tasks.

    Raises:
        DispcError: when the model has no tokenizer, or a task's items do not fit its definition or the model.
    """
    from jinja2 import TemplateError
    from lm_eval.evaluator import simple_evaluate

    adapter = _make_adapter(scorer, progress)
    try:
        results = simple_evaluate(
            adapter, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except (TemplateError, KeyError, ValueError, TypeError, IndexError) as error:  # of prompts made from the items
        raise DataError(f"{task}: items and definition do not fit ({first_line(error)})") from error
    return {name: _figure(results["results"][name], count["effective"]) for name, count in results["n-samples"].items()}


def _figure(row: Mapping[str, Any], items: int) -> TaskFigure:
    values = {key.split(",")[0]: value for key, value in row.items() if isinstance(value, float)}
    metrics = {metric: values[metric] for metric in METRICS if metric in values}
    metric, share = next(iter(metrics.items()))
    stderr = (share * (1 - share) / items) ** 0.5  # of a mean of zeros and ones
    return TaskFigure(metric, share, stderr, items, metrics)


def _make_adapter(scorer: Scorer, progress: Callable[[int, int], None]) -> Any:
    """The LM that lm-eval asks; made here, since its base class comes from an optional package."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words = Tokenizer(scorer.directory)

        @property
        def eot_token_id(self) -> int:
            if (end := self.words.special("eos")) is None:
                raise DataError(f"{scorer.directory}: its tokenizer has no end-of-text token, which lm-eval asks for")
            return end

        @property
        def prefix_token_id(self) -> int:
            beginning = self.words.special("bos")
            return self.eot_token_id if beginning is None else beginning

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return self.words.encode(string, special=bool(add_special_tokens))

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            answers = []
            for number, (_, context, continuation) in enumerate(requests):
                answers.append(score_continuation(scorer, context, continuation))
                progress(number + 1, len(requests))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError  # `find_tasks` refuses tasks that ask for it

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError  # and these

    return Adapter()


def score_continuation(scorer: Scorer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p(continuation | context), and whether greedy decoding gives it; a long context loses its beginning.

    Raises:
        DataError: when the continuation has no token, or leaves no room for one of the context.
    """
    if not 0 < len(continuation) <= scorer.positions:
        raise DataError(f"an answer of {len(continuation)} tokens: {scorer.directory} takes 1 to {scorer.positions}")
    tokens = np.array(context + continuation, dtype=np.int64)[-scorer.positions - 1 :]
    logits = logits_of(scorer, tokens[:-1])[-len(continuation) :]
    wanted = tokens[-len(continuation) :]
    return -float(negative_log_likelihood(logits, wanted).sum()), bool((logits.argmax(-1) == wanted).all())
