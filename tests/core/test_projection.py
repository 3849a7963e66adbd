"""project and project_transpose beyond the conformance suite: at any size, which only NumPy does quickly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import ProjectionSpec, ValuesError, project, project_transpose
from unilora_core.grouping import ALGORITHMS
from unilora_core.maps.gather import scatter_add
from unilora_core.testing.reference import LAYOUT, normal


@given(D=st.integers(1, 3000), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_distances_are_kept(spec_of, D, part, seed):
    spec = spec_of(D, 1 + int(part * (D - 1)), seed=seed)
    theta_d = normal(spec.d)
    np.testing.assert_allclose(project_transpose(spec, project(spec, theta_d)), theta_d, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("grouping", ALGORITHMS)
@given(D=st.integers(1, 3000), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_the_two_are_adjoint(spec_of, grouping, D, part, seed):
    spec = spec_of(D, 1 + int(part * (D - 1)), seed=seed, grouping=grouping)
    x, y = normal(spec.d, dtype=np.float64), normal(D, seed=1, dtype=np.float64)
    np.testing.assert_allclose(project(spec, x) @ y, x @ project_transpose(spec, y), rtol=1e-9, atol=1e-9)


def test_scaling_before_the_gather_gives_the_same_bits(spec_of):
    spec = spec_of(1001, 10)
    theta_d, groups = normal(10), spec.groups()
    assert (project(spec, theta_d) == theta_d[groups] * spec.scale()[groups]).all()


def as_by_hand(spec, theta_d):
    """Uni-LoRA's identity start in PyTorch: scale once, then a lookup for each factor."""
    import torch

    groups, scale = spec.groups(xp=torch), spec.scale(xp=torch)
    of = {"A": theta_d * scale, "B": (theta_d - spec.init(xp=torch)) * scale}
    return torch.cat([of[name[-1]].index_select(0, groups[at]) for name, at in spec.layout.slices.items()])


@pytest.mark.parametrize("grouping", ALGORITHMS)
def test_gradients_have_the_bits_of_a_lookup_for_each_factor(torch, grouping):
    """Sums of rounded numbers depend on their order: a training run that is taken up again goes on as it would have."""
    spec = ProjectionSpec(LAYOUT, 17, seed=1, grouping=grouping, start="identity")
    y, found = torch.from_numpy(normal(411)), []
    for function in (project, as_by_hand):
        theta = torch.from_numpy(normal(17)).requires_grad_()
        found += torch.autograd.grad(function(spec, theta), theta, y)
    assert (found[0] == found[1]).all()


class Lazy:
    """As an array of ndonnx: of a shape, and without values that NumPy could read."""

    shape = (4,)


def test_a_transpose_without_values_on_the_host_says_what_to_bring():
    strict = pytest.importorskip("array_api_strict")
    spec = ProjectionSpec(LAYOUT, 17, seed=1)
    elsewhere = strict.zeros(411, dtype=strict.float32, device=strict.Device("device1"))
    text = r"do not become NumPy arrays \(.+\), and .*; bring one, by project_transpose= .*, or differentiate project"
    with pytest.raises(ValuesError, match=rf"project_transpose: arrays of array_api_strict {text}"):
        project_transpose(spec, elsewhere)
    with pytest.raises(ValuesError, match=rf"project_transpose: arrays of \S+ {text}"):
        scatter_add(Lazy(), Lazy(), 2, strict)
