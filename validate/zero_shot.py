"""Zero-shot tasks of lm-evaluation-harness, on a torch model or an artifact through one adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dispc.corpus import quiet_datasets
from dispc.errors import DataError, first_line
from dispc.extras import need
from dispc.validate.perplexity import Scorer, logits_of, negative_log_likelihood

METRICS = ("acc_norm", "acc", "exact_match")
"""The first of these that a task reports is its figure."""


def find_tasks(tasks: list[str], include: Path | None = None) -> Any:
    """lm-eval's manager of tasks, once it knows all of `tasks` and their data are at hand.

    `include` is a directory with task definitions of one's own; their data files need no network.

    Raises:
        DispcError: when lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    need("lm_eval", "eval")
    from lm_eval.tasks import TaskManager, get_task_dict

    if include is not None and not include.is_dir():
        raise DataError(f"--include {include}: no such directory")
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
            get_task_dict(tasks, manager)
    except Exception as error:  # no network, no file, nonsense in it: `datasets` raises many kinds
        raise DataError(f"the data of {', '.join(tasks)} cannot be had: {first_line(error)}") from error
    return manager


def measure_tasks(
    scorer: Scorer,
    tasks: list[str],
    *,
    manager: Any,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """For each of `tasks`, which `manager` (of `find_tasks`) knows, its figures.

    `metric`, `value` and `stderr` (shares of 1) are of the first of `METRICS` that it reports; `metrics` has all of
    these, `items` is how many it was measured on.

    Raises:
        DispcError: when the model has no tokenizer, or a task's items do not fit its definition or are not judged by
            likelihood.
    """
    from jinja2 import TemplateError
    from lm_eval.evaluator import simple_evaluate

    adapter = _make_adapter(scorer, progress)
    try:
        results = simple_evaluate(
            adapter, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except (TemplateError, KeyError, ValueError, TypeError, IndexError) as error:  # of prompts made from the items
        raise DataError(f"{', '.join(tasks)}: items and definition do not fit ({first_line(error)})") from error
    return {name: _figure(results, name) for name in results["results"]}


def _figure(results: Any, name: str) -> dict[str, Any]:
    row, items = results["results"][name], results.get("n-samples", {}).get(name, {}).get("effective")
    values = {key.split(",")[0]: value for key, value in row.items() if isinstance(value, float)}
    metrics = {metric: values[metric] for metric in METRICS if metric in values}
    if not metrics:
        raise DataError(f"{name}: reports none of {', '.join(METRICS)}")
    metric, share = next(iter(metrics.items()))
    stderr = (share * (1 - share) / items) ** 0.5 if items else float("nan")  # of a mean of zeros and ones
    return {"metric": metric, "value": share, "stderr": stderr, "items": items, "metrics": metrics}


def _make_adapter(scorer: Scorer, progress: Callable[[int, int], None]) -> Any:
    """The LM that lm-eval asks; made here, since its base class comes from an optional package."""
    from lm_eval.api.model import TemplateLM
    from transformers import AutoTokenizer

    class Adapter(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(str(scorer.directory), trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{scorer.directory}: has no tokenizer that transformers can load") from error

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            beginning = self.tokenizer.bos_token_id
            return self.eot_token_id if beginning is None else int(beginning)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            answers = []
            for number, (_, context, continuation) in enumerate(requests):
                answers.append(score_continuation(scorer, context, continuation))
                progress(number + 1, len(requests))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            room = scorer.positions
            totals = []
            for request in requests:
                tokens = [self.prefix_token_id, *self.tok_encode(request.args[0])]
                pieces = [tokens[at : at + room] for at in range(0, len(tokens) - 1, room - 1)]
                totals.append(sum(score_continuation(scorer, piece[:1], piece[1:])[0] for piece in pieces))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise DataError("tasks that generate text are not supported; choose tasks judged by likelihood")

    return Adapter()


def score_continuation(scorer: Scorer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p(continuation | context), and whether greedy decoding would say it; a long context loses its beginning."""
    tokens = np.array(context + continuation, dtype=np.int64)[-scorer.positions - 1 :]
    logits = logits_of(scorer, tokens[:-1])[-len(continuation) :]
    wanted = tokens[-len(continuation) :]
    return -float(negative_log_likelihood(logits, wanted).sum()), bool((logits.argmax(-1) == wanted).all())
