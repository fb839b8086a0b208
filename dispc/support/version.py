"""The version of dispc, and those of the packages that it works with."""

__version__ = "0.1.0"
COMPILING = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
"""The packages that decide how a graph is spelled."""


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and every command imports this file

    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
