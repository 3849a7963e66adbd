"""Gradient checkpointing computes layers again after `rows` and `disabled` have ended: as what they were, none another.

The backward pass of these tests is outside of the ``with``, as a training loop has it.
"""

import copy

import pytest
import torch
from small_models import adapted
from torch import nn
from torch.utils.checkpoint import checkpoint

from unilora_core import TargetError
from unilora_torch import Bank

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
MODES = (False, True)


class Deep(nn.Module):
    """Layers of which the middle ones are checkpointed: reentrant or not, or None for not at all."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.middle = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.reentrant = None

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = x + (layer(x).tanh() if self.reentrant is None else self.again(layer, x))
        return {"logits": self.last(x)}

    def again(self, layer, x):
        return checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=self.reentrant)


@pytest.fixture
def bank(tmp_path):
    torch.manual_seed(0)
    bank = Bank(Deep())
    for i, name in enumerate("abc"):
        _, adapter = adapted(model=copy.deepcopy(bank.model), seed=i, d=40)
        adapter.save(tmp_path / name)
        bank.add(name, tmp_path / name)
    return bank


def loss(model, x):
    return model(x)["logits"].square().sum()


def gradients(parameters, run):
    for parameter in parameters:
        parameter.grad = None
    run().backward()
    return [parameter.grad.clone() for parameter in parameters]


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", MODES)
@pytest.mark.parametrize("names", ["abca", "aabb", "cccc"])
def test_tenants(bank, names, reentrant):
    tenants = bank.trainable(sorted(set(names)))

    def run():
        with tenants.rows(names):
            return loss(bank.model, X)

    wanted = gradients(tenants.theta, run)
    bank.model.reentrant = reentrant
    same(gradients(tenants.theta, run), wanted)


@pytest.mark.parametrize("reentrant", MODES)
def test_inputs_of_served_rows(bank, reentrant):
    x = X.clone().requires_grad_()

    def run(names=("a", None, "b", "c")):
        with bank.rows(names):
            return loss(bank.model, x)

    wanted = gradients([x], run)
    bank.model.reentrant = reentrant
    same(gradients([x], run), wanted)
    base = gradients([x], lambda: loss(bank.model, x))  # after rows were named, too
    bank.model.reentrant = None
    same(base, gradients([x], lambda: loss(bank.model, x)))


@pytest.mark.parametrize("reentrant", MODES)
def test_two_passes_and_one_backward_pass(bank, reentrant):
    tenants = bank.trainable(["a", "b"])

    def run():
        with tenants.rows("aabb"):
            first = loss(bank.model, X)
        with tenants.rows("baba"):
            return first * loss(bank.model, 2 * X)

    wanted = gradients(tenants.theta, run)
    bank.model.reentrant = reentrant
    same(gradients(tenants.theta, run), wanted)


@pytest.mark.parametrize("reentrant", MODES)
def test_a_backward_pass_inside_of_other_rows(bank, reentrant):
    tenants = bank.trainable(["a", "b"])

    def run():
        with tenants.rows("abab"):
            return loss(bank.model, X)

    wanted = gradients(tenants.theta, run)
    bank.model.reentrant = reentrant
    found = run()
    for theta in tenants.theta:
        theta.grad = None
    with tenants.rows("bbbb"):
        found.backward()
    same([theta.grad for theta in tenants.theta], wanted)


@pytest.mark.parametrize("reentrant", MODES)
def test_disabled(reentrant):
    """As in preference training: one pass of the policy, one of the reference, and then both backward passes."""
    model, adapter = adapted(model=Deep())
    x = X.clone().requires_grad_()

    def run():
        policy = loss(model, x)
        with adapter.disabled():
            reference = loss(model, x)
        with adapter.disabled():
            pass
        return policy - 0.5 * reference

    wanted = gradients([adapter.theta_d, x], run)
    model.reentrant = reentrant
    same(gradients([adapter.theta_d, x], run), wanted)
    value = run()
    adapter.theta_d.grad = x.grad = None
    with adapter.disabled():
        value.backward()
    same([adapter.theta_d.grad, x.grad], wanted)


def test_what_cannot_be_known_is_refused(bank):
    """A part of the model that is called alone, and the whole model as one that is computed again by reentering."""
    tenants = bank.trainable(["a", "b"])
    layer, x, inputs = bank.model.middle[0], torch.randn(4, 8, requires_grad=True), X.clone().requires_grad_()
    with tenants.rows("abab"):
        outputs = [
            checkpoint(layer, x, use_reentrant=False),
            checkpoint(lambda x: bank.model(x)["logits"], inputs, use_reentrant=True),
        ]
    for output in outputs:
        with pytest.raises(TargetError, match="call the model itself, not a part of it, and checkpoint its layers"):
            output.sum().backward()
