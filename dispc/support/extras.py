"""Optional packages: a command that needs a missing one ends with the line that installs it."""

import importlib.util

from dispc.support.errors import DispcError


def need(package: str, extra: str) -> None:
    """Raise DispcError unless `package` can be imported; it comes with `pip install 'dispc[extra]'`."""
    if importlib.util.find_spec(package) is None:
        raise DispcError(f"this needs the package {package}: pip install 'dispc[{extra}]'")
