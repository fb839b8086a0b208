"""Who may import whom: a table of rooms; nobody imports in a circle, and no test file imports from another."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"dispc": "dispc", "passes": "dispc.passes", "export": "dispc.export", "validate": "dispc.validate"}
FACTS = {"model", "masks", "algorithms", "lowerings", "targets", "selection", "quantisation", "plan", "manifest"}

ALLOWED: dict[str, set[str]] = {
    # the public names, which are imported when asked for
    "dispc": {"support", "facts", "reference", "runtime", "validate", "learn", "inspect", "compiler"},
    "data": set(),
    "support": {"support"},
    "facts": {"support", "facts"},
    "passes": {"support", "facts", "passes"},
    "export": {"support", "facts", "export"},
    "reference": {"support", "facts", "reference"},
    "runtime": {"support", "facts", "runtime"},
    "evaluate": {"support", "facts", "reference", "runtime", "evaluate"},
    "validate": {"support", "facts", "export", "reference", "runtime", "evaluate", "validate", "validate.checks.table"},
    "validate.checks.table": {"validate", "validate.checks.graph", "validate.checks.weights"},
    "validate.checks.graph": {"support", "validate", "validate.checks.rewriting"},
    "validate.checks.weights": {"support", "facts", "reference", "validate", "validate.checks.rewriting"},
    # it alone rewrites the graph again; all other rooms judge what is computed without the passes
    "validate.checks.rewriting": {"support", "facts", "passes", "export", "validate"},
    "learn": {"support", "facts", "reference", "runtime", "learn"},
    "inspect": {"support", "facts"},
    "compiler": {"support", "facts", "passes", "export", "runtime", "evaluate", "validate"},
    "demo": {"support", "facts", "passes", "runtime", "evaluate", "learn", "compiler", "demo"},
    "cli": {"support", "facts", "runtime", "evaluate", "validate", "learn", "inspect", "compiler", "demo", "cli"},
    "__main__": {"cli"},
}
"""Room -> the rooms it may import from. `facts` is what a compilation is about: FACTS."""


def room(module: str) -> str:
    if (own := module.removeprefix("dispc.")) in ALLOWED:
        return own
    name = module.split(".")[1] if "." in module else "dispc"
    return "facts" if name in FACTS else name


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
    allowed = ALLOWED[room(module)]
    return [f"{module} -> {name}" for name in imports(source, modules) if " " in name or room(name) not in allowed]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty when there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def modules_of_dispc() -> dict[str, Path]:
    """Module name -> file, of the four folders."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def test_modules_import_only_what_their_room_may() -> None:
    modules = modules_of_dispc()
    assert {room(name) for name in modules} == set(ALLOWED)
    found = [v for name, path in modules.items() for v in violations(name, path.read_text(), set(modules))]
    assert not found


def test_every_permission_is_used() -> None:
    """What nobody needs is not allowed: the table is how the rooms are, and not how they might become."""
    modules = modules_of_dispc()
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for name, path in modules.items():
        used[room(name)] |= {room(imported) for imported in imports(path.read_text(), set(modules))}
    assert used == ALLOWED


def test_nobody_imports_in_a_circle() -> None:
    """Imports inside of functions and for type checkers count: they would only hide one."""
    modules = modules_of_dispc()
    assert not circle({name: set(imports(path.read_text(), set(modules))) for name, path in modules.items()})


def test_no_test_file_imports_from_another() -> None:
    """What tests share lies in tests/shared."""
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for name, path in tests.items():
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not set(named) & set(tests), f"{name} imports {named}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dispc.support.files", "from dispc.masks import Masks"),
        ("dispc.masks", "from dispc.passes.common.blocks import BlockFinder"),
        ("dispc.masks", "import dispc.cli.tables"),
        ("dispc.model.published", "from dispc.learn.hypernetwork import HyperNetwork"),
        ("dispc.passes.common.unroll", "def f():\n    from dispc.export import trace"),
        ("dispc.export.write", "from dispc import compiler"),
        ("dispc.export.write", "from . import trace"),
        ("dispc.validate.checks.parity", "import numpy, dispc.passes.common.unroll as unroll"),
        ("dispc.validate.checks.parity", "from dispc.validate.checks.rewriting import rewritten"),
        ("dispc.validate.checks.graph", "from dispc.reference.masked import load_reference"),
        ("dispc.inspect", "from dispc.cli.tables import facts_table"),
        ("dispc.reference.masked", "from dispc.runtime.session import Runner"),
        ("dispc.runtime.latency", "from dispc.validate.report.report import Report"),
        ("dispc.runtime.tune", "from dispc.passes.pipeline import build_pipeline"),
        ("dispc.demo", "from dispc.cli.app import main"),
        ("dispc.learn.trainer", "from dispc import cli"),
        ("dispc.learn.trainer", "from dispc import Masks"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source, set(modules_of_dispc()))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dispc.masks", "from dispc.support.errors import MasksError\nimport numpy"),
        ("dispc.validate.checks.parity", "from dispc.reference.masked import load_reference"),
        ("dispc.cli.app", "def f():\n    from dispc.compiler import compile_model"),
        ("dispc.demo", "from dispc import compiler"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source, set(modules_of_dispc())) == []


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
