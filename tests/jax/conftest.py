"""What every test of the JAX backend shares: the folder on the path, and JAX itself."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for twins


def pytest_collect_file():
    """Skips the folder; a conftest that skips itself is an error where the folder is named on the command line."""
    pytest.importorskip("jax", reason="the tests of the JAX backend need jax")


@pytest.fixture(params=["paper", "identity"])
def start(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"
