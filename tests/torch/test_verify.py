"""Never silently dead: the check at the first forward pass, and verify."""

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from small_models import adapted, mlp, used
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
        return used(self.last, self.use, self.second(self.first(x).tanh()))


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


# ---- without a trace ------------------------------------------------------------------------------------------------


class Config:
    """Shared by the modules, as transformers' are."""

    def __init__(self):
        self.attention, self.nested = "sparse", {"sizes": [1, 2]}


class Restless(nn.Module):
    """Changes all that a module can change in a forward pass; then stops as ``end`` says."""

    def __init__(self, end=None):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.spectral = torch.nn.utils.spectral_norm(nn.Linear(6, 6))
        self.end, self.config, self.calls, self.cache = end, Config(), 0, {"kept": torch.ones(2)}
        self.seen, self.steps, self.kinds, self.length = [], [0], {"a"}, None
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("mask", None)
        self.gain = nn.Parameter(torch.ones(6))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        self.length = len(x)
        self.seen.append(x)
        self.steps[0] += 1
        self.kinds.add("b")
        self.cache["kept"].add_(1)
        self.cache["new"] = x
        self.config.attention = self.config.nested["more"] = "full"
        self.config.nested["sizes"].append(3)
        self.average.mul_(0.9).add_(x.detach().mean(0))
        self.mask = torch.ones(len(x))
        self.late = nn.Linear(1, 1)
        self.register_buffer("rotary", torch.ones(3), persistent=False)
        self.norm = nn.Sequential(self.norm) if self.calls == 1 else self.norm
        self.layer.register_forward_hook(lambda *_: None)
        self.gain.data.mul_(2)
        self.gain.requires_grad_(True)
        self.train()
        random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=self.generator)
        if self.end is not None:
            raise self.end
        return self.norm(self.layer(x)) + self.spectral(x)


def held(value, known=None):
    """Everything that a model holds, as plain values that compare: a deep picture of it."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        return (id(value), value.detach().clone().tolist(), value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, (dict, list, tuple, set)):
        items = sorted(value) if isinstance(value, set) else value
        items = list(items.items()) if isinstance(items, dict) else list(items)
        return (
            [(key, held(each, known)) for key, each in items]
            if isinstance(value, dict)
            else [held(each, known) for each in items]
        )
    if isinstance(value, (nn.Module, Config)):
        if id(value) in known:
            return id(value)
        known[id(value)] = value
        return (id(value), held({key: each for key, each in vars(value).items() if key != "_call_impl"}, known))
    return repr(value)


def everything(model):
    """The picture of a model without its adapter, and the state of the shared generators."""
    adapter = model._modules.pop("unilora")
    seen = held(model)
    model._modules["unilora"] = adapter
    return seen, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("end", [None, ValueError("no"), KeyboardInterrupt()], ids=["ends", "raises", "interrupted"])
def test_verify_leaves_no_trace(end):
    model = Restless(end)
    adapter = unilora_torch.attach(model, ["layer"], d=9)
    model.eval()
    model.norm.train()
    before, keys = everything(model), list(model.state_dict())
    with contextlib.nullcontext() if end is None else pytest.raises(type(end)):
        adapter.verify(X)
    assert everything(model) == before
    assert list(model.state_dict()) == keys
    model.end = None
    model(X)
    assert everything(model) != before  # the picture shows what a pass changes


# ---- in each mode ---------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A layer that is not simply called where ``when`` says so, but used in the way that ``use`` says."""

    def __init__(self, when, use="bypassed"):
        super().__init__()
        self.block = nn.Sequential()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.when, self.use = when, use

    def forward(self, x):
        return used(self.last, self.use if self.when(self) else "called", self.first(x).tanh())


@pytest.mark.parametrize("use", ["bypassed", "detached", "no_grad"])
def test_verify_names_a_target_that_is_dead_in_training_only(use, start):
    adapter = unilora_torch.attach(Fused(lambda model: model.training, use), d=20, start=start)
    with pytest.raises(TargetError, match=r"^last: in training .*\(1 such\)"):
        adapter.verify(X)


@pytest.mark.parametrize("use", ["unused", "times zero"])
def test_verify_accepts_what_chance_leaves_out_in_training(use):
    adapter = unilora_torch.attach(Fused(lambda model: model.training, use), d=20)
    adapter.verify(X)


def test_verify_accepts_what_is_there_in_training_only():
    adapter = unilora_torch.attach(Auxiliary(), d=20)
    adapter.verify(X)


class Auxiliary(nn.Module):
    """A head that only training has."""

    def __init__(self):
        super().__init__()
        self.layer, self.extra = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x):
        x = self.layer(x)
        return (x, self.extra(x)) if self.training else x


def test_verify_accepts_chance_in_modules_and_norms_of_one_row():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(1.0), nn.Linear(6, 3))
    unilora_torch.attach(model, d=20).verify(X[:1])


class Labelled(Fused):
    """Trains with labels only."""

    def forward(self, x, labels=None):
        if self.training and labels is None:
            raise ValueError("no labels")
        return super().forward(x)


def test_a_model_that_does_not_train_on_the_inputs_is_watched_when_it_trains():
    model = Labelled(lambda model: model.training)
    adapter = unilora_torch.attach(model, d=20)
    adapter.verify(X)
    with pytest.raises(TargetError, match=r"^last: in training \(with gradients, on cpu\) .* uses its weight directly"):
        model.train()(X, labels=1)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_verify_accepts_checkpoints_of_training(checkpointing):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.last, x, use_reentrant=checkpointing) if self.training else self.last(x)

    unilora_torch.attach(Saving(), ["last"], d=9).verify(X.clone().requires_grad_())
    unilora_torch.attach(Saving(), d=20).verify(X)


MODES = {
    "training": (lambda model: model.training, lambda model: model.train()),
    "evaluation": (lambda model: not model.training, lambda model: model.eval()),
}


@pytest.mark.parametrize("into", MODES)
def test_a_target_that_another_mode_bypasses_is_found_when_the_mode_comes(into):
    when, change = MODES[into]
    model, other = Fused(when), MODES["evaluation" if into == "training" else "training"][1]
    unilora_torch.attach(model, d=20)
    other(model)(X)
    with pytest.raises(TargetError, match=rf"^last: in {into} .* uses its weight directly \(1 such\)"):
        change(model)(X)


def test_a_target_that_is_bypassed_without_gradients_is_found():
    model = Fused(lambda _: not torch.is_grad_enabled()).eval()
    unilora_torch.attach(model, d=20).verify(X)
    with torch.no_grad(), pytest.raises(TargetError, match=r"^last: in evaluation \(without gradients, on cpu\)"):
        model(X)


def test_a_target_that_is_skipped_in_a_mode_is_no_error_until_its_weight_is_used():
    model = Fused(lambda model: model.training, "unused")
    adapter = unilora_torch.attach(model, d=20)
    adapter.verify(X)
    model.train()
    for _ in range(3):
        model(X)
    assert adapter.live.reached.missing == {"last"}
    model.use = "bypassed"
    with pytest.raises(TargetError, match=r"^last: in training"):
        model(X)


def test_a_model_that_was_watched_keeps_its_parameters():
    model = Fused(lambda model: model.training, "unused")
    unilora_torch.attach(model, d=20).verify(X)
    parameters = dict(model.named_parameters())
    model.train()(X)
    assert {type(module._parameters) for module in model.modules()} == {dict}
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(parameters) == 5


@pytest.mark.traces
def test_a_graph_of_another_mode_is_watched_too():
    model = Fused(lambda model: model.training)
    unilora_torch.attach(model, d=20)
    compiled = torch.compile(model, backend="eager")
    model.eval()
    compiled(X)
    model.train()
    with pytest.raises(Exception, match=r"last: in training"):
        compiled(X)
    torch.compiler.reset()


def test_two_adapters_and_checkpoints_are_watched_in_each_mode():
    model = mlp(checkpointing=False)
    adapters = [unilora_torch.attach(model, targets, d=20, name=targets[0]) for targets in (["up"], ["down"])]
    for training in (False, True, False):
        model.train(training)
        model(X).sum().backward()
    for adapter in adapters:
        assert len(adapter.live.reached.modes) == 2
        assert not any(adapter.live.reached.modes.values())
