"""A small Llama on disk and an adapter of it; no network, no GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for small_llama


def pytest_configure(config):
    """What vLLM 0.32 itself does when it is imported beside PyTorch 2.13."""
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script.*deprecated:DeprecationWarning")


def pytest_collect_file():
    """Skips the folder where what the package stands on is not installed."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"the tests of the vLLM integration need {name}")


@pytest.fixture
def base(tmp_path):
    from small_llama import make_base

    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    from small_llama import make_adapter

    return make_adapter(base, tmp_path / "files" / "fr.safetensors", rank=4)


@pytest.fixture
def settings(tmp_path):
    """settings(name=value, …): those of the environment, with files/ and cache/ in the test's folder."""
    from unilora_vllm import Settings

    (tmp_path / "files").mkdir(exist_ok=True)

    def make(**more):
        said = {"FOLDER": tmp_path / "files", "CACHE_DIR": tmp_path / "cache", **more}
        return Settings.read({f"UNILORA_VLLM_{name}": str(value) for name, value in said.items()})

    return make
