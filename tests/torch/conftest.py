"""What every test of the PyTorch backend shares: a fixed seed, few threads, a device."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for small_models


def pytest_collect_file():
    """Skips the folder; a conftest that skips itself is an error where the folder is named on the command line."""
    pytest.importorskip("torch", reason="the tests of the PyTorch backend need torch")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=["paper", "identity"])
def start(request):
    return request.param
