"""Every method on small models, and the naive reference: ΔW by the core in float64, written into a copy of the base."""

import copy

import numpy as np
import torch
from kinds import KINDS, Kind, images
from small_models import Conv1D, move
from torch import nn

import unilora_torch
from unilora_core import project
from unilora_core.frames import Sizes, piece_names
from unilora_core.methods import METHODS
from unilora_torch import Target

__all__ = ["METHODS", "OPTIONS", "PLACES", "attached", "loss", "moved", "reference", "run", "updates"]

OPTIONS = {
    "vera": {"rank": 5},
    "lora-xs": {"rank": 3},
    "vb-lora": {"vectors": 6, "length": 2},
    "fourierft": {"frequencies": 20},
    "gpart": {"d": 48},
    "intrinsic-dimension": {"d": 48},
}
"""What small models need in place of the methods' defaults."""


class Twice(nn.Module):
    """It calls one layer two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


PLACES = KINDS | {
    "two blocks of another order": Kind(
        lambda: nn.Sequential(nn.Linear(16, 50)), [Target("v", "0", 16, 16, 32), Target("q", "0", 16, 12, 2)]
    ),
    "transposed, beside": Kind(lambda: nn.Sequential(Conv1D(16, 24)), [Target("c", "0", 16, 24, transposed=True)]),
    "a convolution's weight": Kind(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), [Target("w", "0", 36, 8, parameter="weight")], images
    ),
    "called twice": Kind(Twice, ["layer"]),
}
"""A model for every kind of target."""


def attached(method, place="linear", base=None, **options):
    """The base, the same each time, a copy with an adapter, the adapter, and an input."""
    place = PLACES[place]
    torch.manual_seed(0)
    base = place.model() if base is None else base
    model = copy.deepcopy(base)
    adapter = unilora_torch.attach(model, place.targets, method=method, **OPTIONS.get(method, {}) | options)
    return base, model, adapter, place.input()


def moved(*args, **kwargs):
    """The same with θ_d away from its start."""
    base, model, adapter, x = attached(*args, **kwargs)
    move(adapter)
    return base, model, adapter, x


def chain(adapter, target, factors, like):
    """The frame's chain of one target; ``like`` makes an array of what is frozen."""
    spec, sizes = adapter.spec, Sizes(target.in_features, target.out_features, target.experts)
    pieces = {piece: factors[name] for piece, name in piece_names(spec.form, target.name, sizes).items()}
    frozen = spec.form.frozen(sizes, spec.seed, spec.chosen)
    if spec.form.of_weight is not None:  # an SVD is not unique; that it is one has a test of its own
        frozen = adapter.chains.frozen[target.name]
    return spec.form.chain(pieces, {name: like(array) for name, array in frozen.items()}, spec.chosen)


def product(factors):
    update = factors[0]
    for factor in factors[1:]:
        update = factor @ update
    return update


def updates(adapter):
    """Name of a target → ΔW (…, out, in), NumPy, float64."""
    theta_D = project(adapter.spec, adapter.theta_d.detach().numpy().astype(np.float64))
    factors = adapter.spec.layout.split(theta_D)

    def like(array):
        return np.asarray(array, np.float64) if np.asarray(array).dtype.kind == "f" else np.asarray(array)

    return {target.name: product(chain(adapter, target, factors, like)) for target in adapter.targets}


def weights(base, adapter, theta_d):
    """Name of a parameter → W + ΔW, float64, differentiable in theta_d."""
    factors = adapter.spec.layout.split(project(adapter.spec, theta_d))

    def like(array):
        tensor = torch.as_tensor(array)
        return tensor.to(theta_d) if tensor.is_floating_point() else tensor

    found = {}
    for target in adapter.targets:
        name = f"{target.module}.{target.parameter or 'weight'}".lstrip(".")
        weight = found.get(name, base.get_parameter(name).detach().to(theta_d))
        whole = weight.mT if target.transposed else weight if target.experts else weight.flatten(1)
        full = torch.zeros_like(whole)
        rows = slice(target.first_row, target.first_row + target.out_features)
        full[..., rows, :] = product(chain(adapter, target, factors, like))
        found[name] = weight + (full.mT if target.transposed else full.reshape(weight.shape))
    return found


def reference(base, adapter, x):
    """(outputs, gradient of `loss` in θ_d), float64, of a model that never saw an adapter."""
    base = copy.deepcopy(base).double()
    if hasattr(base, "reentrant"):
        base.reentrant = None
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    x = x.detach().double() if x.is_floating_point() else x
    output = torch.func.functional_call(base, weights(base, adapter, theta_d), (x,))
    (gradient,) = torch.autograd.grad(loss(output), theta_d)
    return output.detach(), gradient


def run(model, adapter, x):
    """The same of an adapted model."""
    adapter.theta_d.grad = None
    output = model(x)
    loss(output.float()).backward()
    return output.detach(), adapter.theta_d.grad.clone()


def loss(output):
    """Each output counts differently: the sum of squares of what a norm gives does not change."""
    return (output * torch.arange(output.numel()).cos().view(output.shape).to(output)).sum()
