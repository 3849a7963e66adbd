"""Whatever hooks stand on an adapted layer, and whenever they came: adapted, it computes what it computes merged."""

import contextlib
import copy

import pytest
import torch
from kinds import KINDS
from small_models import adapted, mlp, move
from torch import nn

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Bank, Target

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning")  # of ids

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def bent(_module, *inputs_and_output):
    """Not linear, and not its own inverse: applied twice or in another order it gives something else."""
    return (inputs_and_output[-1] + 0.3).relu() * 1.5


def shifted(_module, args):
    return tuple(arg * 0.5 + 0.1 if arg.is_floating_point() else arg for arg in args)


def shifted_by_keyword(_module, args, kwargs):
    return args, {name: value * 0.5 for name, value in kwargs.items()}


HOOKS = {
    "forward hook": lambda layer: layer.register_forward_hook(bent),
    "forward hook with keywords": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, output: bent(module, output), with_kwargs=True
    ),
    "always called": lambda layer: layer.register_forward_hook(bent, always_call=True),
    "two": lambda layer: [layer.register_forward_hook(hook) for hook in (bent, lambda *_: _[-1] - 0.2)],
    "pre-hook": lambda layer: layer.register_forward_pre_hook(shifted),
    "pre-hook with keywords": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: (shifted(module, args), kwargs), with_kwargs=True
    ),
    "backward hook": lambda layer: layer.register_full_backward_hook(
        lambda module, into, out: tuple(None if grad is None else 2 * grad for grad in into)
    ),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, out: (3 * out[0],)),
}


def gradients(model, adapter, x):
    """The outputs, and the gradients of the input and of θ_d (as far as it acts)."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    wanted = [each for each in (x, adapter.theta_d) if each.requires_grad]
    output = model(x)
    grads = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True) if output.requires_grad else ()
    return output.detach(), grads


PLAIN = ["linear", "blocks of a linear", "transposed", "embedding", "convolution", "convolution with groups", "experts"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapted_is_merged(kind, hook, when):
    made = KINDS[kind]
    torch.manual_seed(0)
    model, x = made.model(), made.input()
    if when == "before":
        HOOKS[hook](model[0])
    _, adapter = adapted(model=model, targets=made.targets, d=48, rank=2)
    if when == "after":
        HOOKS[hook](model[0])
    output, grads = gradients(model, adapter, x)
    plain = copy.deepcopy(model)
    plain.unilora.merge()
    merged, merged_grads = gradients(plain, plain.unilora, x)
    torch.testing.assert_close(merged, output, rtol=1e-5, atol=1e-5)
    if x.is_floating_point():
        torch.testing.assert_close(merged_grads[0], grads[0], rtol=1e-4, atol=1e-4)
    with adapter.disabled():
        base = model(x)
    assert (output - base).abs().max() > 1e-2


def test_a_layer_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(input=x)

    model = Net()
    model.fc.register_forward_hook(bent)
    model.fc.register_forward_pre_hook(shifted_by_keyword, with_kwargs=True)
    _, adapter = adapted(model=model, targets=["fc"], d=9)
    output = model(X)
    adapter.merge()
    torch.testing.assert_close(model(X), output)


def test_several_adapters_before_one_hook():
    model = mlp()
    model.head.register_forward_hook(bent)
    _, one = adapted(model=model, d=9)
    model.head.register_forward_hook(bent)
    _, other = adapted(model=model, d=9, name="other", seed=1)
    output = model(X)
    for adapter in (one, other):
        adapter.detach(merge=True)
    torch.testing.assert_close(model(X), output)


def test_the_order_of_two_adapters_is_the_one_in_which_they_came():
    """So that sums have the same bits with and without hooks of others."""
    plain, hooked = mlp(), mlp()
    hooked.head.register_forward_hook(lambda *_: None)
    for model in (plain, hooked):
        adapted(model=model, d=9)
        adapted(model=model, d=9, name="other", seed=1)
    assert torch.equal(plain(X), hooked(X))


def test_detach_leaves_the_hooks_of_others_in_their_order():
    model = mlp()
    mine = [model.head.register_forward_hook(hook) for hook in (bent, lambda *_: _[-1] - 0.2)]
    expected = model(X)
    _, adapter = adapted(model=model)
    adapter.detach()
    assert list(model.head._forward_hooks) == [handle.id for handle in mine]
    assert torch.equal(model(X), expected)


def test_a_hook_that_takes_the_place_of_the_first_is_told_of_when_merged():
    model, adapter = adapted()
    handle = model.head.register_forward_hook(bent, prepend=True)
    before, output = model.head.weight.clone(), model(X)
    with pytest.raises(
        TargetError, match=r"head: the forward hook <function bent .* before B·A is added.*prepend=True"
    ):
        adapter.merge()
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model(X), output)
    handle.remove()
    adapter.merge()


class Bent(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Cosine(nn.Linear):
    """Its rows have length 1."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Usual(nn.Linear):
    """Another forward pass that computes the same."""

    def forward(self, x, *, unused=None):
        return torch.addmm(self.bias, x, self.weight.T)


def patched(forward):
    """A layer whose instance has another ``forward``, as libraries set it."""
    layer = nn.Linear(6, 5)
    usual = layer.forward
    layer.forward = lambda x: forward(usual, x)
    return layer


LAYERS = {
    "relu": (lambda: Bent(6, 5), False),
    "relu, one output": (lambda: Bent(6, 1), False),
    "cosine": (lambda: Cosine(6, 5), False),
    "scaled": (lambda: Scaled(6, 5), False),
    "usual": (lambda: Usual(6, 5), True),
    "patched": (lambda: patched(lambda usual, x: usual(x)), True),
    "patched output": (lambda: patched(lambda usual, x: usual(x).relu()), False),
    "patched input": (lambda: patched(lambda usual, x: usual(2 * x)), False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_not_linear_in_its_weight_is_not_merged(name, dtype):
    make, linear = LAYERS[name]
    model = nn.Sequential(make().to(dtype))
    _, adapter = adapted(model=model, targets=["0"], d=9)
    x = X.to(dtype)
    output, weight, attributes = model(x), model[0].weight.clone(), dict(vars(model[0]))
    if linear:
        adapter.merge()
        torch.testing.assert_close(model(x), output, rtol=5e-2, atol=5e-2)
        return
    with pytest.raises(TargetError, match=r'0: the forward pass of this \w+ is not linear.*parameter="weight"'):
        adapter.merge()
    assert torch.equal(model[0].weight, weight)
    assert vars(model[0]) == attributes
    adapter.detach()
    _, adapter = adapted(model=model, targets=[Target("0", "0", 6, len(weight), parameter="weight")], d=9)
    output = model(x)  # the remedy
    adapter.merge()
    torch.testing.assert_close(model(x), output)


def test_the_forward_that_accelerate_sets_merges():
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model = accelerate.hooks.add_hook_to_module(mlp(), accelerate.hooks.ModelHook())
    for module in list(model.modules())[1:]:
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    _, adapter = adapted(model=model)
    output = model(X)
    adapter.merge()
    torch.testing.assert_close(model(X), output)


def test_an_offloaded_weight_is_not_merged():
    """It is on the meta device between the passes, where the update would be lost."""
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model = accelerate.cpu_offload(mlp(), execution_device="cpu")
    _, adapter = adapted(model=model)
    output = model(X)
    with pytest.raises(TargetError, match=r"blocks\.0\.up\.weight: it is on the meta device \(offloaded\)"):
        adapter.merge()
    assert torch.equal(model(X), output)


def test_a_weight_that_is_tied_later_is_not_merged():
    for tie in (
        lambda model: setattr(model.blocks[1].up, "weight", model.blocks[0].up.weight),
        lambda model: setattr(model.blocks[1].up.weight, "data", model.blocks[0].up.weight.data),
    ):
        model, adapter = adapted()
        tie(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TargetError, match=r"blocks\.0\.up: its weight is tied, it is also blocks\.1\.up\.weight"):
            adapter.merge()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        adapter.detach()
        with pytest.raises(TargetError, match="its weight is tied"):
            unilora_torch.attach(model)


@pytest.mark.parametrize("early", [True, False])
def test_a_bank_under_hooks(early, tmp_path):
    """Each row is what the one adapter gives, alone and merged; the head of a row sees each hook once."""
    files = {"a": (), "b": ("head",)}
    for seed, (name, heads) in enumerate(files.items()):
        model, adapter = adapted(seed=seed, modules_to_save=heads, targets=["up", "down"])
        if heads:
            with torch.no_grad():
                model.head.weight.add_(0.5)
        adapter.save(tmp_path / name)

    def hooked():
        model = mlp()
        hooks(model)
        return model

    def hooks(model):
        for layer in (model.blocks[0].up, model.head):
            layer.register_forward_hook(bent)
            layer.register_forward_pre_hook(shifted)

    model = hooked() if early else mlp()
    bank = Bank(model)
    for name in files:
        bank.add(name, tmp_path / name)
    if not early:
        hooks(model)
    with torch.no_grad(), bank.rows(["a", "b", None, "b"]):
        output = model(X)
    for row, name in ((0, "a"), (1, "b"), (3, "b")):
        alone = hooked()
        adapter = unilora_torch.load(alone, tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(output[row], alone(X)[row])
            adapter.detach(merge=True)
            torch.testing.assert_close(output[row], alone(X)[row])
    torch.testing.assert_close(output[2], hooked()(X)[2])


def test_a_head_whose_weight_is_computed_in_a_bank(tmp_path):
    for computes in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm):
        with pytest.warns(FutureWarning) if computes is torch.nn.utils.weight_norm else contextlib.nullcontext():
            model = mlp()
            computes(model.head)
            fresh = mlp()
            computes(fresh.head)
        _, adapter = adapted(model=model, targets=["up"], modules_to_save=["head"])
        for parameter in model.head.parameters():
            parameter.data.mul_(1.5)
        adapter.save(tmp_path / "a")
        bank = Bank(fresh)
        bank.add("a", tmp_path / "a")
        with torch.no_grad(), bank.rows(["a", None, None, "a"]):
            output = fresh(X)
        torch.testing.assert_close(output[0], model(X)[0])
        torch.testing.assert_close(output[3], model(X)[3])
        bank.close()
        assert (output[1] - fresh(X)[1]).abs().max() < 1e-6
        move(adapter)
