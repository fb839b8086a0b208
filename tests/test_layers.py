"""Who may import whom (design.md): foundations know only each other, and nobody knows the command line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"dispc": "dispc", "passes": "dispc.passes", "export": "dispc.export", "validate": "dispc.validate"}
FOUNDATIONS = {
    "checkpoint", "corpus", "devices", "errors", "extras", "families", "files", "graph", "manifest", "masks", "narrow",
    "quantisation", "signals", "targets", "tokenizer", "weights",
}  # fmt: skip
LIBRARY = {
    "foundations", "passes", "export", "reference", "quantised_reference", "validate", "learn", "published", "rest",
}  # fmt: skip

ALLOWED = {
    "foundations": {"foundations"},
    "passes": {"foundations", "passes"},
    "export": {"foundations", "export"},
    "reference": {"foundations"},
    "quantised_reference": {"foundations"},
    "learn": {"foundations", "reference", "learn"},
    "published": {"foundations", "learn"},
    "validate": {"foundations", "reference", "quantised_reference", "validate"},
    "rest": LIBRARY,
    "compiler": LIBRARY,
    "demo": LIBRARY | {"compiler"},
    "cli_validate": LIBRARY | {"compiler"},
    "cli": LIBRARY | {"compiler", "demo", "cli_validate"},
    "__main__": {"cli"},
}
"""Layer -> the layers it may import from. `rest` is every other module of dispc/, subpackages included."""


def layer(module: str) -> str:
    """`dispc` itself, which holds only the version, is a foundation."""
    name = module.split(".")[1] if "." in module else "dispc"
    return "foundations" if name in FOUNDATIONS | {"dispc"} else name if name in ALLOWED else "rest"


def imports(source: str, modules: set[str]) -> Iterator[str]:
    """The modules of dispc that `source` imports, anywhere in it; relative imports, which have no name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dispc")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"relative import in line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dispc":
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from sorted(named & modules) if named & modules else [str(node.module)]


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    allowed = ALLOWED[layer(module)]
    return [f"{module} -> {name}" for name in imports(source, modules) if " " in name or layer(name) not in allowed]


def modules_of_dispc() -> dict[str, Path]:
    """Module name -> file, of the four folders."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def test_modules_import_only_what_their_layer_may() -> None:
    modules = modules_of_dispc()
    assert {f"dispc.{name}" for name in FOUNDATIONS} | set(FOLDERS.values()) <= set(modules)
    found = [v for name, path in modules.items() for v in violations(name, path.read_text(), set(modules))]
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dispc.masks", "from dispc.passes.common.blocks import BlockFinder"),
        ("dispc.masks", "import dispc.cli.tables"),
        ("dispc.passes.common.unroll", "def f():\n    from dispc.export import trace"),
        ("dispc.export.write", "from dispc import compiler"),
        ("dispc.export.write", "from . import trace"),
        ("dispc.validate.checks.parity", "import numpy, dispc.passes.common.unroll as unroll"),
        ("dispc.inspect", "from dispc.compiler import compile_model"),
        ("dispc.reference.masked", "from dispc.runtime.session import Runner"),
        ("dispc.demo", "from dispc.cli.app import main"),
        ("dispc.learn.trainer", "from dispc import __version__, cli"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source, set(modules_of_dispc()))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dispc.masks", "from dispc import __version__\nfrom dispc.support.errors import MasksError\nimport numpy"),
        ("dispc.validate.checks.parity", "from dispc.reference.masked import load_reference"),
        ("dispc.cli.app", "def f():\n    from dispc.compiler import compile_model"),
        ("dispc.demo", "from dispc import compiler"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source, set(modules_of_dispc())) == []
