"""Small models, and the naive reference: θ_D by a dense P, then W + B·A written into a copy of the base model."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unilora_torch


class Block(nn.Module):
    """Two linear layers, one without bias."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Mlp(nn.Module):
    """Blocks and a head; ``checkpointing`` is what `torch.utils.checkpoint` gets as use_reentrant, None for off."""

    def __init__(self, width=6, depth=2, classes=3, checkpointing=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(x)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def used(layer, use, x):
    """What a model makes of a layer, in the way that ``use`` says."""
    if use == "bypassed":
        return nn.functional.linear(x, layer.weight, layer.bias)
    if use == "detached":
        return x + layer(x).detach()
    if use == "no_grad":
        with torch.no_grad():
            y = layer(x)
        return x + y
    if use == "times zero":
        return x + 0 * layer(x)
    if use == "unused":
        return x
    if use == "argmax":
        return layer(x).argmax(-1)
    return layer(x)


def mlp(**kwargs):
    """The same `Mlp` each time."""
    torch.manual_seed(0)
    return Mlp(**kwargs)


def adapted(start="paper", bound=0.3, d=40, targets="all-linear", model=None, **kwargs):
    """A model with an adapter whose factors are large enough for every difference to show."""
    model = mlp() if model is None else model
    adapter = unilora_torch.attach(model, targets, start=start, bound=bound, d=d, **kwargs)
    move(adapter)
    return model, adapter


def move(adapter, seed=1):
    """θ_d somewhere else than where training starts, so that B is not 0 after an identity start."""
    noise = torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        adapter.theta_d.add_(0.3 * noise.to(adapter.theta_d.device))


def dense_P(spec):
    """(D, d) float64, one entry at a time."""
    groups = spec.groups().tolist()
    P = torch.zeros(spec.D, spec.d, dtype=torch.float64)
    for i, j in enumerate(groups):
        P[i, j] = groups.count(j) ** -0.5
    return P


def naive_factors(spec, theta_d):
    """Name → A or B, float64, differentiable in theta_d."""
    P = dense_P(spec).to(theta_d.device)
    origin = torch.from_numpy(spec.init()).to(theta_d)
    factors = {}
    for name, shape in spec.layout.shapes.items():
        moved = spec.start == "identity" and name.endswith(".B")
        rows = P[spec.layout.slices[name]]
        factors[name] = (rows @ (theta_d - origin if moved else theta_d)).reshape(shape)
    return factors


def naive_weights(base, adapter, theta_d):
    """Module.weight → W + B·A, differentiable in theta_d."""
    factors = naive_factors(adapter.spec, theta_d)
    weights = {}
    for target in adapter.targets:
        name = f"{target.module}.weight"
        weight = weights.get(name, base.get_submodule(target.module).weight.detach().to(theta_d.dtype))
        update = factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
        full = torch.zeros_like(weight.T if target.transposed else weight)
        full[target.first_row : target.first_row + target.out_features] = update
        weights[name] = weight + (full.T if target.transposed else full)
    return weights


def naive_run(base, adapter, *inputs):
    """(outputs, gradient of Σ outputs² in θ_d), all in float64, from a model that never saw an adapter."""
    base = copy.deepcopy(base).double()
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    weights = naive_weights(base, adapter, theta_d)
    output = torch.func.functional_call(base, weights, tuple(x.double() for x in inputs))
    (gradient,) = torch.autograd.grad(output.square().sum(), theta_d)
    return output.detach(), gradient


def run(model, adapter, *inputs):
    """(outputs, gradient of Σ outputs² in θ_d) of an adapted model."""
    adapter.theta_d.grad = None
    output = model(*inputs)
    output.float().square().sum().backward()
    return output.detach(), adapter.theta_d.grad.clone()


def assert_same_run(found, wanted, rtol=1e-5, atol=1e-6):
    """Both outputs and gradients agree."""
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol * max(1.0, float(b.abs().max())))


def hooks(model):
    """How many forward hooks of any kind each module of the model has."""
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called))
        for name, module in model.named_modules()
    }


def snapshot(model):
    """Everything of a model that attaching may not change when it fails."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        hooks(model),
    )


def assert_unchanged(model, before):
    """The model is as it was when `snapshot` was taken."""
    state, trainable, hooked = snapshot(model)
    assert (trainable, hooked) == before[1:]
    assert list(state) == list(before[0])
    for name, value in state.items():
        assert torch.equal(value, before[0][name]), name
