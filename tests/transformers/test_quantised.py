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
    assert torch.equal(adapter._tables.scale, exact._tables.scale)
    assert all(torch.equal(a, b) for a, b in zip(adapter.factors().values(), exact.factors().values(), strict=True))
    grads = []
    for each in (adapter, exact):
        each._root[0](input_ids=ids, labels=ids).loss.backward()
        grads.append(each.theta_d.grad)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.8


def test_the_adapter_has_an_effect(quantised, ids):
    adapter = unilora_transformers.attach(quantised, start="paper", bound=0.5)
    with torch.no_grad():  # only now: after this, bitsandbytes cannot train a layer on a CPU
        adapted = quantised(ids).logits
        with adapter.disabled():
            base = quantised(ids).logits
        adapter.detach()
        assert torch.equal(quantised(ids).logits, base)
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


class MyQuantisedLinear(nn.Linear):
    """A layer with an integer weight that nobody has vouched for."""

    def __init__(self, width, height):
        super().__init__(width, height)
        self.weight = nn.Parameter(torch.zeros(height, width, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_an_unknown_integer_layer_is_refused(tiny):
    model = tiny("LlamaForCausalLM")
    model.model.layers[1].self_attn.v_proj = MyQuantisedLinear(32, 16)
    with pytest.raises(TargetError, match=r"layers\.1\.self_attn\.v_proj: its weight holds torch\.int8 and MyQuant"):
        unilora_transformers.attach(model)
    adapter = unilora_transformers.attach(model, exclude=["1.self_attn.v_proj"])
    assert len(adapter.targets) == 3
