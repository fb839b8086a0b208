"""Fixtures for all tests. Nothing here or in a test reaches the network."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cuda_stub as stub_libraries
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from desk import Desk

settings.register_profile("dispc", deadline=None)  # a busy machine is no failure
settings.load_profile("dispc")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Ctrl-C, `kill` and a closed terminal end a process, also where the one that started the tests ignores them.

    `nohup`, `&` in a script and many CI runners do. Processes that a test starts inherit what it has.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cuda_stub(request: pytest.FixtureRequest) -> Path:
    """Directory of stand-ins for the CUDA libraries (cuda_stub.py), built once, kept in the pytest cache."""
    try:
        return stub_libraries.ensure(request.config.cache.mkdir("cuda-stub"))
    except stub_libraries.StubUnavailableError as error:
        pytest.skip(f"no CUDA stub: {error}")


@pytest.fixture(autouse=True, scope="session")
def costs_of_tiny_models() -> Iterator[None]:
    """Next to the products of tiny models any selection is dear; by these costs some sets are filled, as in real ones:
    those that keep about nine tenths."""
    from dispc import plan
    from dispc.selection import SelectionCosts

    tiny = SelectionCosts(call=0.0, element=1.0, weight=0.07, prompt_element=0.0, prompt_weight=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DEFAULT_COSTS", tiny)
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dispc keeps what it caches in the test's folder; for whole modules, by `usefixtures`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `judged.furnish` makes, for tests that change nothing in it."""
    from judged import furnish

    return furnish(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="session")
def desk_originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from desk import furnish  # loads torch, which reads the environment set above

    return furnish(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def desk(tmp_path: Path, desk_originals: Path) -> "Desk":
    from desk import Desk

    shutil.copytree(desk_originals, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path, tmp_path / "model", tmp_path / "older", tmp_path / "new")
