"""Every method beside every kind of target: its numbers, its start, what it keeps, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from methods import METHODS, OPTIONS, PLACES, attached, loss, moved, reference, run, updates
from small_models import assert_same_run, move, used
from torch import nn

import unilora_torch
from unilora_core import TargetError
from unilora_torch import vector

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
every_method = pytest.mark.parametrize("method", METHODS)
every_place = pytest.mark.parametrize("place", PLACES)


# ---- numbers --------------------------------------------------------------------------------------------------------


@every_place
@every_method
def test_outputs_and_gradients_are_those_of_the_whole_weights(method, place):
    base, model, adapter, x = moved(method, place)
    found = run(model, adapter, x)
    assert_same_run(found, reference(base, adapter, x), rtol=2e-5, atol=2e-6)
    assert not torch.allclose(found[0], base(x), atol=1e-3)
    assert found[1].count_nonzero() > 0.3 * adapter.spec.d


@every_place
@every_method
def test_updates_are_those_of_numpy(method, place):
    _, model, adapter, _ = moved(method, place)
    wanted = updates(adapter)
    for target in adapter.targets:
        name = f"{target.module}.{target.parameter or 'weight'}".lstrip(".")
        found, weight = adapter.delta_weight(target).numpy(), model.get_parameter(name)
        expected = wanted[target.name]
        expected = expected.swapaxes(-1, -2) if target.transposed else expected.reshape(-1, *weight.shape[1:])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * np.abs(expected).max())


@every_place
@every_method
def test_the_model_starts_as_its_base(method, place):
    base, model, adapter, x = attached(method, place)
    with torch.no_grad():  # PyTorch may take another kernel where there are gradients
        found, wanted = model(x), base.requires_grad_(False)(x)
    if method == "vb-lora":
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(found, wanted)
    for target in adapter.targets:  # each alone, as a layer that is called outside of a pass is
        assert method == "vb-lora" or not adapter.delta_weight(target).any()


@pytest.mark.parametrize("place", ["linear", "blocks of a linear", "embedding", "convolution", "attention", "experts"])
@every_method
def test_a_model_in_bfloat16(method, place):
    base, _, _, _ = attached(method, place)
    base, model, adapter, x = moved(method, place, base.bfloat16())
    x = x.bfloat16() if x.is_floating_point() else x
    assert adapter.theta_d.dtype == torch.float32
    for mine, theirs in zip(run(model, adapter, x), reference(base, adapter, x), strict=True):
        assert (mine - theirs).norm() < 0.15 * theirs.norm()


@every_method
def test_a_model_in_float64(method):
    base, model, adapter, x = moved(method, base=PLACES["linear"].model().double())
    assert adapter.theta_d.dtype == torch.float32
    with torch.no_grad():
        adapted = model(x.double())
        adapter.merge()
        torch.testing.assert_close(model(x.double()), adapted, rtol=1e-5, atol=1e-5)
    assert {array.dtype for arrays in adapter.chains.frozen.values() for array in arrays.values()} <= {
        torch.float32,
        torch.int32,
    }


@every_method
def test_on_a_device(method, device):
    base, model, adapter, x = attached(method)
    base, model, x = base.to(device), model.to(device), x.to(device)
    assert method == "vb-lora" or torch.equal(model(x), base(x))
    move(adapter)
    found = run(model, adapter, x)
    wanted = reference(base.cpu(), copy.deepcopy(adapter).cpu(), x.cpu())
    assert_same_run([each.cpu() for each in found], wanted, rtol=2e-5, atol=2e-6)


@every_method
def test_gradients_of_each_example(method):
    """vmap over θ_d and x at once."""
    base, model, adapter, x = moved(method)

    def value(theta_d, x):
        return loss(torch.func.functional_call(model, {"unilora.theta_d": theta_d}, (x,)))

    theta_d = adapter.theta_d.detach()
    each = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(theta_d, x)
    wanted = torch.stack([torch.func.grad(value)(theta_d, row) for row in x])
    torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)
    many = torch.stack([theta_d, -theta_d, 2 * theta_d])
    found = torch.func.vmap(value, in_dims=(0, None))(many, x)
    torch.testing.assert_close(found, torch.stack([value(theta, x) for theta in many]), rtol=1e-4, atol=1e-4)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["linear", "blocks of a linear", "transposed, beside"])
def test_what_is_streamed_is_what_is_kept_whole(monkeypatch, place):
    _, model, adapter, x = moved("gpart", place)
    streamed = run(model, adapter, x)
    monkeypatch.setattr(vector.Vector, "whole", True)
    _, model, adapter, x = moved("gpart", place)
    assert_same_run(streamed, run(model, adapter, x))


class Watched(nn.Module):
    """A layer of which autograd keeps nothing by itself, as its input and its weight are frozen."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(40, 56)

    def forward(self, x):
        return self.layer(x)


@every_method
def test_no_update_is_kept_but_the_spectrum(method):
    model = Watched()
    options = OPTIONS.get(method, {})
    adapter = unilora_torch.attach(model, method=method, **options)
    x, saved = torch.randn(3, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    largest = max(tensor.numel() for tensor in saved)
    if method == "fourierft":
        assert largest == 40 * 56
    else:
        assert largest <= 56 * max(3, int(adapter.spec.chosen.get("rank", METHODS[method].rank or 0)))


# ---- what is reached ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [place for place in PLACES if place != "reentrant checkpointing"])  # not seen there
@every_method
def test_verify_accepts_the_start(method, place):
    _, _, adapter, x = attached(method, place)
    adapter.verify(x)


class Bypassed(nn.Module):
    """Of its two layers, the second is used as ``use`` says."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last, self.use = nn.Linear(6, 6), nn.Linear(6, 6), use

    def forward(self, x):
        return used(self.last, self.use, self.first(x).tanh())


@every_method
def test_a_target_that_is_bypassed(method):
    model = Bypassed("bypassed")
    unilora_torch.attach(model, method=method, **OPTIONS.get(method, {}))
    with pytest.raises(TargetError, match=r"^last: the model's forward pass never calls this module"):
        model(torch.randn(3, 6))


@every_method
def test_a_target_without_a_gradient(method):
    """The first target has one, also where both share numbers."""
    model = Bypassed("detached")
    adapter = unilora_torch.attach(model, method=method, **OPTIONS.get(method, {}))
    with pytest.raises(TargetError, match=r"^last: no gradient reaches θ_d through this target \(1 such\)"):
        adapter.verify(torch.randn(3, 6))
