"""Settings of the command's own process. Programs that call dispc as a library keep theirs."""

import gc
import logging
import os
import signal
import sys
from dataclasses import dataclass

from dispc.support.signals import ENDING


class Notes(logging.Handler):
    """Collects dispc's warnings until the command ends, so that an error stays the only line."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[record.getMessage()] = None

    def taken(self) -> list[str]:
        """All messages so far, each once; they are dropped."""
        messages, self.messages = list(self.messages), {}
        return messages


NOTES = Notes()


@dataclass
class Settings:
    """Of the whole command, whatever it does. `debug`: `--debug` was on the line."""

    debug: bool = False


SETTINGS = Settings()


def own_the_process(*, debug: bool) -> None:
    """Environment, signals and the garbage collector of the `dispc` command."""
    SETTINGS.debug = debug
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    # transformers warns of configs and weights that dispc refuses anyway; its warnings about tokenizers are passed on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("dispc").addHandler(NOTES)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch takes large tensors in 2 MiB pages: a seventh of a 7B
    for number in set(ENDING) - {signal.SIGINT}:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    gc.disable()  # importing torch and transformers makes no garbage; long work turns the collector on


def import_transformers() -> None:
    """Import transformers without scikit-learn and scipy.

    Where they are installed, it imports them with every model, for assisted generation and object detection: a fifth
    of a small compilation. This process then does without those two features for good.
    """
    from transformers import utils

    questions = ("is_sklearn_available", "is_scipy_available")
    answers = {name: getattr(utils, name) for name in questions if hasattr(utils, name)}
    try:
        for name in answers:
            setattr(utils, name, lambda: False)
        import transformers.modeling_utils  # noqa: F401 - where scipy would be imported
        from transformers import AutoModelForCausalLM  # noqa: F401
    finally:
        for name, answer in answers.items():
            setattr(utils, name, answer)


def collect_garbage() -> None:
    """Turn the collector on for long work, whose steps leave cycles behind; it leaves out what was imported."""
    gc.freeze()
    gc.enable()


def _terminate(signum: int, frame: object) -> None:
    sys.exit(128 + signum)  # unlike the default action, this lets temporary directories be removed
