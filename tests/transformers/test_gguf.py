"""A GGUF LoRA says what llama.cpp reads: its names, A and B exactly, the outputs of q and k in its order."""

import builtins

import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS

import unilora_transformers
from unilora_core import AdapterFileError, TargetError
from unilora_torch.export import lora_tensors

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NAMES |= {"qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up"}


def adapted(name, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**CONFIGS[name]))
    return unilora_transformers.attach(model, "all-linear", start="paper", **options)


def turned(B, heads):
    """Row by row: of each head, number i of its first half, then of its second."""
    rows = []
    for head in np.split(B, heads):
        for first, second in zip(*np.split(head, 2), strict=True):
            rows += [first, second]
    return np.array(rows)


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "GemmaConfig", "Gemma3TextConfig", "Phi3Config"])
def test_the_file_holds_the_factors(tmp_path, name):
    adapter = adapted(name, rank=3)
    unilora_transformers.save_gguf(adapter, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    config = adapter.model.config
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["general.architecture"] == {"mistral": "llama", "gemma3_text": "gemma3"}.get(
        config.model_type, config.model_type
    )
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    lora, expected = lora_tensors(adapter)
    assert said["adapter.lora.alpha"] == lora["r"]
    assert len(found) == len(expected)
    for module in lora["target_modules"]:
        _, _, number, _, last = module.split(".")
        A, B = (expected[f"base_model.model.{module}.lora_{letter}.weight"].numpy() for letter in "AB")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(last)
        if heads and said["general.architecture"] == "llama":
            B = turned(B, heads)
        np.testing.assert_array_equal(found[f"blk.{number}.{NAMES[last]}.weight.lora_a"], A)
        np.testing.assert_array_equal(found[f"blk.{number}.{NAMES[last]}.weight.lora_b"], B)


def test_another_architecture_is_refused(tmp_path):
    adapter = adapted("GPTNeoXConfig")
    with pytest.raises(TargetError, match=r"expected a model of type llama, .* got 'gpt_neox'; .*convert_lora_to_gguf"):
        unilora_transformers.save_gguf(adapter, tmp_path / "lora.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_a_name_is_refused(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS["LlamaConfig"]))
    model.model.layers[0].extra = torch.nn.Linear(32, 32)
    model.model.layers[0].register_forward_hook(lambda block, _, output: block.extra(output))
    adapter = unilora_transformers.attach(model, ["extra", "q_proj"], start="paper")
    with pytest.raises(TargetError, match=r"model.layers.0.extra: llama.cpp's llama has no name for this layer"):
        unilora_transformers.save_gguf(adapter, tmp_path / "lora.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_trained_head_is_refused(tmp_path):
    config = transformers.LlamaConfig(**CONFIGS["LlamaConfig"])
    model = transformers.LlamaForCausalLM(config)
    adapter = unilora_transformers.attach(model, modules_to_save=["lm_head"])
    with pytest.raises(AdapterFileError, match=r"llama\.cpp"):
        unilora_transformers.save_gguf(adapter, tmp_path / "lora.gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *rest):
        if name == "gguf":
            raise ImportError(name)
        return found(name, *rest)

    adapter = adapted("LlamaConfig")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="save_gguf needs the package gguf: pip install gguf"):
        unilora_transformers.save_gguf(adapter, tmp_path / "lora.gguf")
