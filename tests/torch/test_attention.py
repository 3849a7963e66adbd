"""`nn.MultiheadAttention`, which calls no layer: its matrices are adapted as parameters; against dense weights."""

import copy

import pytest
import torch
from small_models import adapted, assert_same_run, assert_unchanged, hooks, naive_factors, run, snapshot
from torch import nn

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Target, find_targets
from unilora_torch.targets import attention_targets

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(7))
KINDS = {
    "fused": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 7},
    "other keys": {"kdim": 6, "batch_first": True},
    "biased keys": {"add_bias_kv": True, "add_zero_attn": True},
}


class Model(nn.Module):
    """Attention with everything that its forward pass can be given."""

    def __init__(self, **kind):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, **kind), nn.Linear(8, 3)
        self.need_weights = False

    def forward(self, x):
        attention = self.attention
        key, value = (x, x) if attention.in_proj_weight is not None else (x[..., : attention.kdim], x)
        output, weights = attention(x, key, value[..., : attention.vdim], need_weights=self.need_weights)
        return self.out(output) if weights is None else self.out(output) + weights.sum()


def made(kind="fused"):
    torch.manual_seed(0)
    return Model(**KINDS[kind])


def naive_run(base, adapter, x):
    """(outputs, gradient of Σ outputs² in θ_d) in float64, with W + B·A as the parameters."""
    base = copy.deepcopy(base).double()
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    factors, weights = naive_factors(adapter.spec, theta_d), {}
    for target in adapter.targets:
        name = f"{target.module}.{target.parameter or 'weight'}".lstrip(".")
        weight = weights.get(name, base.get_parameter(name).detach())
        full = torch.zeros_like(weight)
        rows = slice(target.first_row, target.first_row + target.out_features)
        full[rows] = factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
        weights[name] = weight + full
    output = torch.func.functional_call(base, weights, (x.double(),))
    return output.detach(), torch.autograd.grad(output.square().sum(), theta_d)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_q_k_v_and_proj(kind, need_weights, training, start):
    base = made(kind).train(training)
    base.need_weights = need_weights
    words = attention_targets("attention", base.attention)
    assert [target.name for target in words.values()] == [f"attention.{word}" for word in ("q", "k", "v", "out_proj")]
    targets = [*words.values(), *find_targets(base, ["out"])]
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=targets, rank=2, d=30)
    found = run(model, adapter, X)
    assert_same_run(found, naive_run(base, adapter, X), rtol=1e-4, atol=1e-5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(X), found[0], rtol=1e-4, atol=1e-5)
            with adapter.disabled():
                torch.testing.assert_close(model(X), base(X))
    adapter.verify(X)
    assert not model.attention._parameters.keys() & vars(model.attention).keys()


@pytest.mark.parametrize("kind", ["fused", "other widths"])
def test_merge_save_load_detach(kind, start, tmp_path):
    base = made(kind)
    model, adapter = adapted(start, model=copy.deepcopy(base))
    before, expected = snapshot(model), model(X)
    adapter.merge()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert_unchanged(model, before)
    adapter.save(tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    assert unilora_torch.load(other, tmp_path / "a.safetensors").targets == adapter.targets
    assert torch.equal(other(X), expected)
    adapter.detach()
    assert torch.equal(model(X), base(X))
    assert hooks(model) == hooks(base)


def test_all_linear_means_the_matrices_of_attention():
    model = made()
    assert find_targets(model, "all-linear") == (
        Target("attention.in_proj_weight", "attention", 8, 24, parameter="in_proj_weight"),
        Target("attention.out_proj", "attention", 8, 8, parameter="out_proj.weight"),
        Target("out", "out", 8, 3),
    )
    assert [target.name for target in find_targets(made("other widths"), "all-linear", exclude=["out"])] == [
        "attention.q_proj_weight",
        "attention.k_proj_weight",
        "attention.v_proj_weight",
        "attention.out_proj",
    ]
    assert find_targets(model, ["out_proj"]) == find_targets(model, "all-linear")[1:2]
    assert [target.name for target in find_targets(made("biased keys"), r"attention\..*|out")] == [
        target.name for target in find_targets(model, "all-linear")
    ]
    root = nn.MultiheadAttention(8, 2)
    assert [target.name for target in find_targets(root, "all-linear")] == ["in_proj_weight", "out_proj"]
    assert [target.name for target in attention_targets("", root).values()] == ["q", "k", "v", "out_proj"]


def test_attention_of_another_class_may_call_its_layers(start):
    class Calls(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    base = nn.Sequential(Calls(8, 2))
    assert find_targets(base, ["out_proj"]) == (Target("0.out_proj", "0.out_proj", 8, 8),)
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=["out_proj"], d=20)
    assert_same_run(run(model, adapter, X), naive_run(base, adapter, X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    base = made("batch first").to(dtype)
    model, adapter = adapted("paper", model=copy.deepcopy(base))
    assert_same_run(run(model, adapter, X.to(dtype)), naive_run(base, adapter, X.to(dtype)), rtol=0.05, atol=0.05)


def test_autocast():
    base = made("batch first")
    model, adapter = adapted("paper", model=copy.deepcopy(base))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, adapter, X)
    assert found[0].dtype == torch.bfloat16
    assert_same_run(found, naive_run(base, adapter, X), rtol=0.05, atol=0.05)


@pytest.mark.traces
@pytest.mark.parametrize("training", [True, False])
def test_under_torch_compile(training):
    base = made("batch first").train(training)
    model, adapter = adapted("paper", model=copy.deepcopy(base))
    wanted = run(model, adapter, X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_same_run(run(compiled, adapter, X), wanted, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), wanted[0], rtol=1e-4, atol=1e-5)


# ---- the layers that PyTorch builds with it -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_encoder_layers_is_not_taken_past_the_adapter(masked, start):
    """In eval mode without gradients they hand their weights to one fused function, unless there are hooks."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2).eval()
    base.requires_grad_(False)
    targets = ["in_proj_weight", "out_proj", "linear1", "linear2"]
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=targets)
    assert len(adapter.targets) == 8
    with torch.no_grad():
        first, again = model(X, src_key_padding_mask=mask), model(X, src_key_padding_mask=mask)
        assert torch.equal(first, again)
        adapter.merge()
        kept = slice(None) if mask is None else ~mask
        torch.testing.assert_close(model(X, src_key_padding_mask=mask)[kept], first[kept], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(X, src_key_padding_mask=mask)[kept], first[kept], atol=1e-2)


def test_decoder_layers(start):
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, adapter = adapted(start, model=copy.deepcopy(base))
    assert [target.module for target in adapter.targets[:4]] == ["self_attn"] * 2 + ["multihead_attn"] * 2
    expected = model(X, X.flip(1))
    adapter.verify(X, X.flip(1))
    adapter.merge()
    torch.testing.assert_close(model(X, X.flip(1)), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_exported(tmp_path):
    _, adapter = adapted("paper", model=made())
    with pytest.raises(TargetError, match=r"attention.out_proj.weight: PEFT has no LoRA for .* merge the adapter"):
        adapter.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
