"""The resolver in vLLM's own registry, and what it makes, read by vLLM's own classes."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from small_llama import make_adapter, make_base

import unilora_vllm
from unilora_torch.export import lora_tensors
from unilora_vllm.cache import WEIGHTS

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; nox -s vllm has it")
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def resolver(adapter, settings):
    pytest.importorskip("vllm", reason="vLLM is not installed; nox -s vllm has it")
    from unilora_vllm.resolver import UniLoraResolver

    return UniLoraResolver(settings())


@pytest.fixture
def refusal():
    pytest.importorskip("vllm", reason="vLLM is not installed; nox -s vllm has it")
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError


def ask(resolver, base, name):
    return asyncio.run(resolver.resolve_lora(str(base), name))


def load(folder):
    """A LoRA folder, through what vLLM's workers do with it."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(folder, 64)
    helper.validate_legal(LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32))
    device = "cpu:0"  # "cpu" alone is pinned memory to vLLM, which takes a GPU
    return LoRAModel.from_local_checkpoint(folder, LAYERS, helper, lora_model_id=1, device=device, dtype=torch.float32)


def test_vllms_model_of_it_has_the_factors_of_the_adapter(resolver, adapter, tmp_path):
    request = ask(resolver, tmp_path / "base", "fr")
    found = load(request.lora_path)
    wanted = lora_tensors(adapter)[1]
    assert len(found.loras) == len(wanted) / 2 == 4
    for layer, lora in found.loras.items():
        assert lora.scaling == 1
        assert torch.equal(lora.lora_a, wanted[f"base_model.model.{layer}.lora_A.weight"])
        assert torch.equal(lora.lora_b, wanted[f"base_model.model.{layer}.lora_B.weight"])


def test_a_request_has_a_name_and_a_number_of_its_own(resolver, adapter, base, tmp_path):
    adapter.detach()
    make_adapter(base, tmp_path / "files" / "de.safetensors", seed=1, rank=4)
    fr, de, again = (ask(resolver, tmp_path / "base", name) for name in ("fr", "de", "fr"))
    assert (fr.lora_name, de.lora_name) == ("fr", "de")
    assert fr.lora_int_id == again.lora_int_id != de.lora_int_id
    assert 0 < fr.lora_int_id < 2**63


@pytest.mark.parametrize("name", ["nobody", "../fr", "/etc/passwd", "a/../../b", ""])
def test_names_that_are_not_there_are_left_to_the_next_resolver(resolver, tmp_path, name):
    assert ask(resolver, tmp_path / "base", name) is None


def test_a_name_that_leads_out_is_said_in_the_log(resolver, tmp_path, caplog):
    logger = logging.getLogger("vllm.unilora_vllm.resolver")
    logger.addHandler(caplog.handler)
    ask(resolver, tmp_path / "base", "../fr")
    logger.removeHandler(caplog.handler)
    assert "'../fr' is no name of an adapter" in caplog.text


def test_another_base_is_refused_and_the_next_request_served(resolver, refusal, tmp_path):
    make_base(tmp_path / "other", seed=1)
    with pytest.raises(refusal, match=r"adapter fr: .*it was made for .*values of its norms"):
        ask(resolver, tmp_path / "other", "fr")
    assert ask(resolver, tmp_path / "base", "fr") is not None


def test_a_damaged_file_is_refused(resolver, refusal, tmp_path):
    (tmp_path / "files" / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(refusal, match=r"adapter bad: .*not a whole safetensors file"):
        ask(resolver, tmp_path / "base", "bad")


def test_a_rank_that_the_engine_does_not_allow(adapter, settings, refusal, tmp_path):
    from unilora_vllm.resolver import UniLoraResolver

    with pytest.raises(refusal, match=r"adapter fr: .*its rank is 4, and vLLM was started with --max-lora-rank 1"):
        ask(UniLoraResolver(settings(MAX_RANK=1)), tmp_path / "base", "fr")


def test_a_file_that_changes_while_it_is_served(resolver, adapter, base, tmp_path):
    before = ask(resolver, tmp_path / "base", "fr")
    kept = (resolver.cache.settings.cache / before.lora_path / WEIGHTS).read_bytes()
    adapter.detach()
    make_adapter(base, tmp_path / "files" / "fr.safetensors", seed=5, rank=4)
    after = ask(resolver, tmp_path / "base", "fr")  # vLLM asks again once it was told to unload the name
    assert after.lora_path != before.lora_path
    assert after.lora_int_id != before.lora_int_id
    assert (resolver.cache.settings.cache / before.lora_path / WEIGHTS).read_bytes() == kept


def test_a_file_that_disappears_while_it_is_served(resolver, tmp_path):
    """What vLLM has a request for is served on, also after A and B have left the cache."""
    from vllm.lora import worker_manager

    from unilora_vllm.resolver import restore_before_loading

    request = ask(resolver, tmp_path / "base", "fr")
    before = load(request.lora_path)
    (tmp_path / "files" / "fr.safetensors").unlink()
    os.remove(os.path.join(request.lora_path, WEIGHTS))
    original = worker_manager.get_adapter_absolute_path
    try:
        restore_before_loading(worker_manager, resolver.cache)
        restore_before_loading(worker_manager, resolver.cache)  # plugins may be loaded twice
        assert worker_manager.get_adapter_absolute_path(str(tmp_path)) == str(tmp_path)
        after = load(worker_manager.get_adapter_absolute_path(request.lora_path))
    finally:
        worker_manager.get_adapter_absolute_path = original
    assert all(torch.equal(lora.lora_b, after.loras[name].lora_b) for name, lora in before.loras.items())
    assert ask(resolver, tmp_path / "base", "fr") is None


def test_a_vllm_without_the_function_is_refused(resolver):
    from unilora_vllm.resolver import restore_before_loading

    with pytest.raises(ImportError, match=r"elsewhere has no get_adapter_absolute_path.*expected vLLM 0\.32 or 0\.33"):
        restore_before_loading(types.ModuleType("elsewhere"), resolver.cache)


@needs_vllm
def test_vllm_finds_the_plugin_and_asks_it(adapter, tmp_path):
    """Through the entry point of the installed package, vLLM's loader, its registry, and the server's own question."""
    program = f"""
import asyncio, json, types
from vllm.plugins import load_general_plugins
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
load_general_plugins()
load_general_plugins()
loaded = []
async def add_lora(request):
    loaded.append(request)
engine = types.SimpleNamespace(
    model_config=types.SimpleNamespace(model={str(tmp_path / "base")!r}),
    renderer=None,
    input_processor=None,
    add_lora=add_lora,
)
models = OpenAIServingModels(engine, [])
async def main():
    found = [await models.resolve_lora(name) for name in ("fr", "fr", "de", "../fr")]
    resolvers, codes = list(LoRAResolverRegistry.get_supported_resolvers()), [each.error.code for each in found[2:]]
    print(json.dumps([resolvers, len(loaded), found[0].lora_path, found[0] is found[1], *codes]))
asyncio.run(main())
"""
    said = {"FOLDER": tmp_path / "files", "CACHE_DIR": tmp_path / "cache"}
    env = {f"UNILORA_VLLM_{name}": str(value) for name, value in said.items()} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-2000:]
    resolvers, count, path, same, *codes = json.loads(done.stdout.splitlines()[-1])
    assert resolvers == ["Uni-LoRA Resolver"]
    assert (count, same, codes) == (1, True, [404, 404])
    assert path.startswith(str(tmp_path / "cache"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_plugin_says_what_to_install(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("UNILORA_VLLM_FOLDER", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="unilora_vllm needs vLLM, which is not installed: pip install vllm"):
        unilora_vllm.register()
