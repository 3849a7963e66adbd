"""Triton's kernels, in its interpreter on the CPU, and on CUDA where there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("kernels_worker.py")
OLD = "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton.runtime.interpreter"
"""What the interpreter of Triton 3.5, that of PyTorch 2.9, does with NumPy 2."""

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(device: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", OLD, WORKER, device],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_in_the_interpreter():
    assert run("cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == "8 specs on cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    assert run("cuda", TRITON_INTERPRET="0") == "8 specs on cuda"
