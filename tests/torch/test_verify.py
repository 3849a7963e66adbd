"""Never silently dead: the check at the first forward pass, and verify."""

import copy

import pytest
import torch
from small_models import adapted, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

import unilora_torch
from unilora_core import TargetError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


class Model(nn.Module):
    """Three layers, of which ``last`` is used in the way that ``use`` says."""

    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.use = use

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        if self.use == "bypassed":
            return nn.functional.linear(x, self.last.weight, self.last.bias)
        if self.use == "detached":
            return x + self.last(x).detach()
        if self.use == "no_grad":
            with torch.no_grad():
                y = self.last(x)
            return x + y
        if self.use == "times zero":
            return x + 0 * self.last(x)
        if self.use == "unused":
            return x
        if self.use == "argmax":
            return self.last(x).argmax(-1)
        return self.last(x)


def attached(use, start="identity"):
    model = Model(use)
    return model, unilora_torch.attach(model, d=20, start=start)


@pytest.mark.parametrize("use", ["bypassed", "unused"])
def test_the_first_forward_pass_names_a_layer_that_is_never_called(use, start):
    model, _ = attached(use, start)
    with pytest.raises(TargetError, match=r"^last: the model's forward pass never calls this module \(1 such"):
        model(X)


def test_the_first_forward_pass_is_checked_without_gradients_too():
    model, _ = attached("bypassed")
    with torch.no_grad(), pytest.raises(TargetError, match=r"^last: "):
        model(X)


def test_a_failing_forward_pass_shows_its_own_error():
    model, _ = attached("bypassed")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(4, 5))
    with pytest.raises(TargetError, match=r"^last: "):
        model(X)


def test_the_check_waits_while_the_adapter_is_off():
    model, adapter = attached("bypassed")
    with adapter.disabled():
        model(X)
    with pytest.raises(TargetError, match=r"^last: "):
        model(X)


def test_a_copy_is_checked_on_its_own():
    model, _ = attached("plain")
    twin = copy.deepcopy(model)
    model(X)
    twin.use = "unused"
    with pytest.raises(TargetError, match=r"^last: "):
        twin(X)


@pytest.mark.parametrize("use", ["bypassed", "unused", "detached", "no_grad", "times zero"])
def test_verify_names_a_dead_target(use, start):
    _, adapter = attached(use, start)
    with pytest.raises(TargetError, match=r"^last: (no gradient reaches θ_d|the model's forward pass never calls)"):
        adapter.verify(X)


def test_verify_names_the_first_target_where_no_output_has_a_gradient():
    _, adapter = attached("argmax")
    with pytest.raises(TargetError, match=r"^first: no gradient reaches θ_d through this target \(3 such\)"):
        adapter.verify(X)


def test_verify_accepts_a_model_that_works(start):
    _, adapter = attached("plain", start)
    assert adapter.verify(X) is None
    assert adapter.theta_d.grad is None
    _, adapter = adapted(start)
    adapter.verify(x=X)


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: {"logits": y, "n": 3}, lambda y: [[y]]])
def test_verify_looks_into_nested_outputs(wrap):
    model, adapter = adapted()
    model.register_forward_hook(lambda _module, _args, output: wrap(output))
    adapter.verify(X)


def test_verify_works_under_no_grad():
    _, adapter = adapted()
    with torch.no_grad():
        adapter.verify(X)


def test_verify_works_with_non_reentrant_checkpoints():
    _, adapter = adapted(model=mlp(checkpointing=False))
    adapter.verify(X)


def test_verify_gives_the_training_flags_back():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout(0.5))
    model[1].eval()  # a frozen norm in a model that trains
    adapter = unilora_torch.attach(model, d=9)
    flags = {name: module.training for name, module in model.named_modules()}
    mean = model[1].running_mean.clone()
    adapter.verify(X)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        adapter.verify(torch.randn(4, 5))
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("off", ["merged", "disabled"])
def test_verify_refuses_an_adapter_that_is_off(off):
    _, adapter = adapted()
    if off == "merged":
        adapter.merge()
        with pytest.raises(TargetError, match=r"verify: the adapter is merged or disabled.*unmerge"):
            adapter.verify(X)
    else:
        with adapter.disabled(), pytest.raises(TargetError, match=r"verify: the adapter is merged or disabled"):
            adapter.verify(X)


class Frozen(nn.Module):
    """Reentrant checkpoints of a frozen model whose inputs need no gradient: torch drops every gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_verify_sees_what_a_reentrant_checkpoint_drops():
    adapter = unilora_torch.attach(Frozen(), d=9)
    with pytest.raises(TargetError, match=r"^layer: no gradient reaches θ_d"):
        adapter.verify(X)
