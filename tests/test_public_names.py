"""`import dispc` offers its public names and loads next to nothing."""

import inspect
import subprocess
import sys

import pytest

import dispc
from dispc import validate


@pytest.mark.parametrize("name", dispc.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(dispc, name)
    assert name == "__version__" or inspect.getdoc(found)


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    for module in (dispc, validate):
        source = inspect.getsource(module).partition("if TYPE_CHECKING:")[2].partition("\n\n")[0]
        written = {tuple(line.split()[1::2][:2]) for line in source.strip().splitlines()}
        assert {(home, name) for home, name in written} == {(home, name) for name, home in module.HOMES.items()}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'dispc' has no attribute 'compile'"):
        _ = dispc.compile


def test_importing_dispc_loads_neither_torch_nor_onnx_runtime() -> None:
    script = (
        "import sys, dispc; print(sorted({'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
