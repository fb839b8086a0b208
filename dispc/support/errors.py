"""The errors dispc raises on purpose. Each message is one line: what is wrong, where, and what to do."""

import pickle


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, or its type where it has none."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to load it unsafely
        return "more than tensors in it; dispc executes no pickles"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class DispcError(Exception):
    """A problem that the user can act on; the command line prints it without a traceback and exits with 2."""


class UnsupportedModelError(DispcError):
    """The model is of a kind that dispc cannot compile."""


class CheckpointError(DispcError):
    """The checkpoint is missing, incomplete, corrupt, or unsafe to read."""


class MasksError(DispcError):
    """The mask file is malformed, or belongs to another model."""


class CompileError(DispcError):
    """The graph is not what a pass expects, or the options contradict each other."""


class ArtifactError(DispcError):
    """The artifact cannot be written, loaded or run."""


class DataError(DispcError):
    """A text cannot be read, is empty, or is too short."""


class LearnError(DispcError):
    """Mask learning cannot start, continue or be resumed."""


class Interrupted(DispcError):
    """A signal stopped the work at a point from which it can be resumed; the command exits with 128 + `signum`."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
