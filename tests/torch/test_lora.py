"""export_lora: a folder that PEFT loads, with the same outputs."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import Conv1D, adapted, mlp, naive_weights
from torch import nn

from unilora_core import AdapterFileError, SpecError, ValuesError
from unilora_torch import Target

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


class Fused(nn.Module):
    """A fused qkv and a plain layer after it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(q * k.tanh() + v)


def exported(folder, base, **kwargs):
    model, adapter = adapted(model=copy.deepcopy(base), **kwargs)
    adapter.export_lora(folder)
    return model


def test_the_folder_holds_exactly_A_and_B(tmp_path, start):
    model = exported(tmp_path, mlp(), start=start, rank=4)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * len(model.unilora.targets)
    for name, factor in model.unilora.factors().items():
        layer, letter = name.rsplit(".", 1)
        assert torch.equal(state[f"base_model.model.{layer}.lora_{letter}.weight"], factor)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 4, 4, "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_blocks_become_one_lora_of_the_summed_rank(tmp_path):
    blocks = [Target("q", "qkv", 6, 6, 0), Target("v", "qkv", 6, 6, 12), Target("proj", "proj", 6, 3)]
    base = Fused()
    model = exported(tmp_path, base, targets=blocks, rank=2)
    state = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (state[f"base_model.model.qkv.lora_{letter}.weight"] for letter in "AB")
    assert (A.shape, B.shape) == ((4, 6), (18, 4))
    wanted = naive_weights(base, model.unilora, model.unilora.theta_d.detach().double())["qkv.weight"]
    torch.testing.assert_close((base.qkv.weight + B @ A).double(), wanted, rtol=1e-5, atol=1e-6)
    A, B = (state[f"base_model.model.proj.lora_{letter}.weight"] for letter in "AB")
    assert (A.shape, B.shape) == ((4, 6), (3, 4))
    assert not A[2:].any()
    assert not B[:, 2:].any()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})


def peft_model(base, folder):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def test_peft_gives_the_same_outputs(tmp_path, start):
    base = mlp()
    model = exported(tmp_path, base, start=start)
    torch.testing.assert_close(peft_model(base, tmp_path)(X), model(X), rtol=0, atol=1e-5)
    assert not torch.allclose(base(X), model(X), atol=1e-2)


def test_peft_gives_the_same_outputs_for_blocks_of_a_layer(tmp_path, start):
    base = Fused()
    blocks = [Target("v", "qkv", 6, 6, 12), Target("q", "qkv", 6, 6, 0), Target("proj", "proj", 6, 3)]
    model = exported(tmp_path, base, start=start, targets=blocks, rank=3)
    torch.testing.assert_close(peft_model(base, tmp_path)(X), model(X), rtol=0, atol=1e-5)


def test_peft_gives_the_same_outputs_with_a_trained_head(tmp_path):
    base = mlp()
    model, adapter = adapted(model=copy.deepcopy(base), modules_to_save=["head"])
    with torch.no_grad():
        model.head.weight.normal_()
    adapter.export_lora(tmp_path)
    torch.testing.assert_close(peft_model(base, tmp_path)(X), model(X), rtol=0, atol=1e-5)


def test_peft_gives_the_same_outputs_for_transposed_weights(tmp_path):
    layers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    base = Wrapped(layers.Conv1D(3, 6))
    model = exported(tmp_path, base, targets=[Target("conv", "conv", 6, 3, transposed=True)], d=9)
    torch.testing.assert_close(peft_model(base, tmp_path)(X), model(X), rtol=0, atol=1e-5)


class Wrapped(nn.Module):
    """A model of one layer named conv."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def test_transposed_weights_are_marked(tmp_path):
    exported(tmp_path, Wrapped(Conv1D(6, 3)), targets=[Target("conv", "conv", 6, 3, transposed=True)], d=9)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_export_while_merged_is_the_same(tmp_path):
    model = exported(tmp_path / "a", mlp())
    model.unilora.merge()
    model.unilora.export_lora(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_theta_d_that_is_not_finite_is_not_exported(tmp_path):
    _, adapter = adapted()
    with torch.no_grad():
        adapter.theta_d[0] = float("nan")
    with pytest.raises(ValuesError, match="export_lora: theta_d holds NaN"):
        adapter.export_lora(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_name_of_the_base_model(tmp_path):
    model, adapter = adapted()
    adapter.export_lora(tmp_path, base_model="org/name")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    model.name_or_path = "org/other"
    adapter.export_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/other"


def test_a_larger_rank_gives_the_same_outputs(tmp_path):
    base = mlp()
    model, adapter = adapted(model=copy.deepcopy(base), rank=4)
    adapter.export_lora(tmp_path, rank=11)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 11
    torch.testing.assert_close(peft_model(base, tmp_path)(X), model(X), rtol=0, atol=1e-5)


def test_a_rank_that_is_too_small_is_not_written(tmp_path):
    _, adapter = adapted(rank=4)
    with pytest.raises(SpecError, match=r"blocks\.0\.up: expected rank ≥ 4, .*got 3"):
        adapter.export_lora(tmp_path / "new", rank=3)
    assert not (tmp_path / "new").exists()


def test_an_export_for_vllm_has_one_of_its_ranks(tmp_path):
    model, adapter = adapted(rank=9)
    adapter.export_lora(tmp_path, engine="vllm")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    torch.testing.assert_close(peft_model(mlp(), tmp_path)(X), model(X), rtol=0, atol=1e-5)


def test_what_an_engine_would_refuse_is_not_written(tmp_path):
    _, adapter = adapted(modules_to_save=["head"])
    for engine, message in {"vllm": "base_model.model.head.bias.*unsupported", "sglang": "no buffers"}.items():
        with pytest.raises(AdapterFileError, match=f"^{engine} .* would not serve this export: .*{message}"):
            adapter.export_lora(tmp_path / "new", engine=engine)
    with pytest.raises(SpecError, match="unknown engine 'tgi'"):
        adapter.export_lora(tmp_path / "new", engine="tgi")
    assert not (tmp_path / "new").exists()
