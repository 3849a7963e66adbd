"""What every test of the PyTorch backend shares: a fixed seed, few threads, a device."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch backend need torch")

sys.path.insert(0, str(Path(__file__).parent))  # for small_models


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ]
)
def device(request):
    return request.param


@pytest.fixture(params=["paper", "identity"])
def start(request):
    return request.param
