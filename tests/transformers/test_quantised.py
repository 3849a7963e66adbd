"""Quantised bases: right or refused, never silently dead."""

import pytest
import torch
from torch import nn

import unilora_transformers
from unilora_core import TargetError


@pytest.fixture(params=["nf4", "nf4 in bfloat16", "int8"])
def quantised(request, tiny):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny("LlamaForCausalLM", hidden_size=64)  # bitsandbytes quantises blocks of 64
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = make_linear(bnb.nn, request.param, old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(layer.self_attn, name, new.to("cpu"))
    return model.eval()


def make_linear(bnb, kind, width, height):
    if kind == "int8":
        return bnb.Linear8bitLt(width, height, bias=False, has_fp16_weights=False)
    storage = torch.bfloat16 if "bfloat16" in kind else torch.uint8
    return bnb.Linear4bit(width, height, bias=False, quant_type="nf4", quant_storage=storage)


def test_theta_gets_a_real_gradient(quantised, tiny, ids):
    """PEFT casts the scale to the weight's dtype, where it becomes 0; here the base's dtype never touches P."""
    adapter = unilora_transformers.attach(quantised)
    exact = unilora_transformers.attach(tiny("LlamaForCausalLM", hidden_size=64))
    assert torch.equal(adapter.projection.scale, exact.projection.scale)
    assert all(torch.equal(a, b) for a, b in zip(adapter.factors().values(), exact.factors().values(), strict=True))
    grads = []
    for each in (adapter, exact):
        each.model(input_ids=ids, labels=ids).loss.backward()
        grads.append(each.theta_d.grad)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.8


def test_the_adapter_has_an_effect(quantised, ids):
    adapter = unilora_transformers.attach(quantised, start="paper", bound=0.5)
    with torch.no_grad():  # only now: after this, bitsandbytes cannot train a layer on a CPU
        adapted = quantised(ids).logits
        with adapter.disabled():
            base = quantised(ids).logits
        adapter.detach()
        alone = quantised(ids).logits  # by bitsandbytes' kernel for inference, which rounds in another way
        torch.testing.assert_close(alone, base, rtol=0, atol=5e-3)
    assert (adapted - base).abs().max() > 1e-2


def test_merging_refuses_by_name(quantised, ids):
    adapter = unilora_transformers.attach(quantised)
    before = quantised(ids).logits
    with pytest.raises(TargetError, match=r"model\.layers\.0\.self_attn\.q_proj.*unquantised copy"):
        adapter.merge()
    assert not adapter.merged
    torch.testing.assert_close(quantised(ids).logits, before)


def test_saved_and_loaded_on_a_quantised_base(quantised, ids, train, tmp_path):
    adapter = unilora_transformers.attach(quantised)
    train(adapter)
    expected = quantised(ids).logits
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    unilora_transformers.load(quantised, tmp_path / "a.safetensors")
    torch.testing.assert_close(quantised(ids).logits, expected)


class Packed(nn.Module):
    """What GPTQ's and AWQ's layers look like: known sizes, packed integers, and no ``weight``."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().int() + 8  # 4 bits each
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        packed = (levels.view(self.out_features, -1, 8) << shifts).sum(-1, dtype=torch.int32)
        for name, tensor in {"qweight": packed, "scales": scale, "shifts": shifts}.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        levels = (self.qweight[..., None] >> self.shifts) & 15
        return nn.functional.linear(x, ((levels.flatten(1) - 8) * self.scales).to(x.dtype))


class Integer(nn.Linear):
    """A subclass of `nn.Linear` with an integer weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kind", [Packed, Integer])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_layers_with_known_sizes(tiny, ids, train, tmp_path, kind, targets):
    """Only the input and the output of a layer are needed; nothing is known about these classes."""
    model = tiny("LlamaForCausalLM")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name)))
    adapter = unilora_transformers.attach(model, targets)
    assert len(adapter.targets) == (4 if targets is None else 14)
    train(adapter)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layer, target = model.model.layers[0].self_attn.q_proj, adapter.targets[0]
    x = torch.randn(2, 3, 32)
    with adapter.disabled():
        base = layer(x)
    A, B = adapter.factors_of(target)
    torch.testing.assert_close(layer(x), base + x @ A.T @ B.T)
    with pytest.raises(TargetError, match=r"0\.self_attn\.q_proj: a weight of .*unquantised copy of the base model"):
        adapter.merge()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = model(ids).logits
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    unilora_transformers.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(ids).logits, expected)


def test_a_plain_layer_with_an_integer_weight_is_refused(tiny):
    model = tiny("LlamaForCausalLM")
    weight = torch.zeros(16, 32, dtype=torch.int8)
    model.model.layers[1].self_attn.v_proj.weight = nn.Parameter(weight, requires_grad=False)
    message = r"layers\.1\.self_attn\.v_proj: its weight holds torch\.int8, which an nn\.Linear cannot multiply by"
    with pytest.raises(TargetError, match=message):
        unilora_transformers.attach(model)
    assert not hasattr(model, "unilora")
