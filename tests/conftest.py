"""Fixtures for all tests. Nothing here or in a test reaches the network."""

import os
from pathlib import Path

import cuda_stub as stub_libraries
import pytest
from hypothesis import settings

settings.register_profile("dispc", deadline=None)  # a busy machine is no failure
settings.load_profile("dispc")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def cuda_stub(request: pytest.FixtureRequest) -> Path:
    """Directory of stand-ins for the CUDA libraries (cuda_stub.py), built once, kept in the pytest cache."""
    try:
        return stub_libraries.ensure(request.config.cache.mkdir("cuda-stub"))
    except stub_libraries.StubUnavailableError as error:
        pytest.skip(f"no CUDA stub: {error}")
