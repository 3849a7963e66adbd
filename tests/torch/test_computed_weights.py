"""Weights that are computed in each pass (normalised, pruned, parametrised): beside them an adapter is right, a merge
into them would be lost, and so is refused before anything changes.
"""

import copy

import pytest
import torch
from small_models import adapted, assert_same_run, assert_unchanged, move, run, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated:FutureWarning")

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(7))
IDS = torch.arange(12).view(3, 4)


class Net(nn.Module):
    """One layer, under a name that no parametrisation has."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, *args):
        return self.fc(*args)


class Doubled(nn.Module):
    """A parametrisation that has no inverse."""

    def forward(self, weight):
        return 2 * weight


def half(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


COMPUTES = {
    "weight norm, old": nn.utils.weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, old": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": half,
    "doubled": doubled,
}

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "embedding": (lambda: nn.Embedding(12, 6), IDS),
    "embedding of another width": (lambda: nn.Embedding(12, 2), IDS),
    "convolution": (lambda: nn.Conv2d(4, 5, 3), IMAGES),
    "convolution without a bias": (lambda: nn.Conv2d(4, 5, 3, padding=1, bias=False), IMAGES),
}


def without_gradient(model, adapter, x):
    with torch.no_grad():
        return model(x)


def reference(layer, adapter, x):
    """The outputs and θ_d's gradient of a layer whose weight is what was computed, plus B·A."""
    with torch.no_grad():
        layer(x)  # the old style computes as it is called, and is copied without a graph only
    plain = copy.deepcopy(layer)
    weight = plain.weight.detach().clone()
    (target,), theta_d = adapter.targets, adapter.theta_d
    A, B = adapter()[f"{target.name}.A"], adapter()[f"{target.name}.B"]
    update = (B @ A).T if isinstance(layer, nn.Embedding) else (B @ A).view(weight.shape)
    bias = getattr(layer, "bias", None)
    if isinstance(layer, nn.Embedding):
        output = nn.functional.embedding(x, weight + update)
    elif isinstance(layer, nn.Linear):
        output = nn.functional.linear(x, weight + update, bias)
    else:
        output = nn.functional.conv2d(x, weight + update, bias, layer.stride, layer.padding)
    (gradient,) = torch.autograd.grad(output.square().sum(), theta_d)
    return output.detach(), gradient


@pytest.mark.parametrize("computes", COMPUTES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("late", [False, True])
def test_beside_a_computed_weight(layer, computes, late):
    """``late``: the weight becomes computed after the adapter was put on."""
    make, x = LAYERS[layer]
    model = Net(make()).eval()
    if not late:
        COMPUTES[computes](model.fc)
    _, adapter = adapted(model=model, targets=["fc"], d=9, rank=2)
    if late:
        COMPUTES[computes](model.fc)
    model.eval()
    assert_same_run(run(model, adapter, x), reference(model.fc, adapter, x))
    state, before, inside = snapshot(model), without_gradient(model, adapter, x), set(vars(model.fc))
    for change in (adapter.merge, lambda: adapter.detach(merge=True)):
        with pytest.raises(TargetError, match=r"fc\.weight: the weight is no parameter of the .*computed of.*unmerged"):
            change()
        assert_unchanged(model, state)
        assert not adapter.merged
        assert torch.equal(without_gradient(model, adapter, x), before)
    assert set(vars(model.fc)) == inside
    adapter.detach()


@pytest.mark.parametrize("computes", ["weight norm, old", "weight norm", "spectral norm", "pruned"])
def test_once_it_is_a_parameter_again_it_takes_the_update(computes):
    model = Net(COMPUTES[computes](nn.Linear(6, 5))).eval()
    _, adapter = adapted(model=model, targets=["fc"], d=9, rank=2)
    with torch.no_grad():
        output = model(X)
        if parametrize.is_parametrized(model.fc):
            parametrize.remove_parametrizations(model.fc, "weight")
        elif computes == "pruned":
            prune.remove(model.fc, "weight")
        else:
            nn.utils.remove_weight_norm(model.fc)
        torch.testing.assert_close(model(X), output)
        adapter.detach(merge=True)
        torch.testing.assert_close(model(X), output)


@pytest.mark.parametrize("computes", COMPUTES)
def test_a_weight_that_is_computed_since_the_merge_is_not_written_to(computes):
    model, adapter = adapted(model=Net(nn.Linear(6, 5)).eval(), targets=["fc"], d=9, rank=2)
    adapter.merge()
    COMPUTES[computes](model.fc)
    state = snapshot(model)
    for change in (adapter.unmerge, adapter.detach, lambda: unilora_torch.switch(model, ())):
        with pytest.raises(TargetError, match=r"fc\.weight: the weight is no parameter"):
            change()
        assert_unchanged(model, state)
    with pytest.raises(TargetError, match=r"fc\.weight: the weight is no parameter"), adapter.disabled():
        pass
    assert_unchanged(model, state)
    adapter.detach(merge=True)
    assert not hasattr(model, "unilora")


def test_looking_at_a_weight_takes_no_step_of_spectral_normalisation():
    for layer in (nn.Linear(6, 5), nn.Conv2d(4, 5, 3), nn.Embedding(12, 6)):
        model = Net(parametrizations.spectral_norm(layer)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        _, adapter = adapted(model=model, targets=["fc"], d=9, rank=2)
        with pytest.raises(TargetError, match="no parameter"):
            adapter.merge()
        adapter.detach()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), type(layer)


class Reader(nn.Module):
    """It uses a matrix by itself."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        return x @ self.matrix.T


def parametrised(module, name):
    parametrize.register_parametrization(module, name, Doubled())


MATRICES = {
    "parametrised": parametrised,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "normalised, old": nn.utils.weight_norm,
}


@pytest.mark.parametrize("computes", MATRICES)
def test_a_matrix_that_a_module_uses_by_itself(computes):
    """What stands in for it would not be read, or be written over."""
    target = Target("m", "fc", 6, 5, parameter="matrix")
    model = Net(Reader())
    MATRICES[computes](model.fc, "matrix")
    state = snapshot(model)
    with pytest.raises(TargetError, match=r"m: the matrix is no parameter .*take off first what computes it.*exclude"):
        adapted(model=model, targets=[target], d=9)
    assert_unchanged(model, state)
    model, adapter = adapted(model=Net(Reader()), targets=[target], d=9)
    model(X)
    MATRICES[computes](model.fc, "matrix")
    for call in (model, model.fc):
        with pytest.raises(TargetError, match=r"m: the matrix of this .* is no parameter any more"):
            call(X)
    with adapter.disabled():
        model(X)
    with pytest.raises(TargetError, match="no parameter"):
        adapter.merge()
    adapter.detach()
    model(X)


def test_the_fused_matrix_of_an_attention():
    model, adapter = adapted(model=nn.MultiheadAttention(8, 2), d=9, rank=2)
    x = torch.randn(4, 1, 8)
    model(x, x, x)
    parametrised(model, "in_proj_weight")
    with pytest.raises(TargetError, match="in_proj_weight of this ParametrizedMultiheadAttention is no parameter"):
        model(x, x, x)
    with pytest.raises(TargetError, match="in_proj_weight is no parameter"):
        adapter.merge()


@pytest.mark.parametrize("computes", ["weight norm, old", "weight norm"])
def test_singular_vectors_of_a_computed_weight_are_refused(computes, tmp_path):
    """The old style holds the weight of its latest pass, whatever was loaded since."""
    plain = Net(nn.Linear(6, 5)).eval()
    model = copy.deepcopy(plain)
    COMPUTES[computes](model.fc)
    state = snapshot(model)
    with pytest.raises(TargetError, match=r"fc: the method is made of the singular vectors.*no parameter"):
        unilora_torch.attach(model, ["fc"], method="lora-xs", rank=2)
    assert_unchanged(model, state)
    adapter = unilora_torch.attach(plain, ["fc"], method="lora-xs", rank=2)
    move(adapter)
    adapter.save(tmp_path / "adapter.safetensors")
    unilora_torch.load(model, tmp_path / "adapter.safetensors", check_base=False)
    torch.testing.assert_close(model(X), plain(X))
