"""project and project_transpose: against a dense P, against the core's, and what autograd may ask of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import dense_P, naive_factors

import unilora_core
from unilora_core import Layout, ProjectionSpec
from unilora_torch import project, project_transpose
from unilora_torch.gather import Gather

SIZES = [(1, 1), (7, 1), (7, 7), (97, 13), (101, 100), (101, 101), (64, 16)]
GROUPINGS = ["balanced", "iid", "numpy-shuffle"]


def flat(D, d, grouping="balanced", start="paper"):
    return ProjectionSpec(Layout([("m.A", (D,))]), d, seed=3, grouping=grouping, start=start)


def pair(start, d=11):
    return ProjectionSpec(Layout([("m.A", (3, 5)), ("m.B", (7, 3))]), d, seed=3, start=start, bound=0.5)


def tensors(spec, dtype=torch.float32, device="cpu"):
    theta_d = torch.randn(spec.d, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
    groups = torch.from_numpy(spec.groups()).to(device)
    return theta_d, groups, spec.scale(xp=torch, device=device, dtype=dtype)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("D", "d"), SIZES)
def test_forward_and_gradient_match_a_dense_P(D, d, grouping, device):
    spec = flat(D, d, grouping)
    theta_d, groups, scale = tensors(spec, device=device)
    y = torch.randn(D).to(device)
    theta_D = project(theta_d.requires_grad_(), groups, scale)
    theta_D.backward(y)
    P = dense_P(spec).to(device)
    torch.testing.assert_close(theta_D.double(), P @ theta_d.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theta_d.grad.double(), P.T @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("D", "d"), SIZES)
def test_bits_are_those_of_the_core(D, d, dtype):
    spec = flat(D, d)
    theta_d, groups, scale = tensors(spec, dtype)
    found = project(theta_d, groups, scale)
    assert found.dtype == dtype
    assert torch.equal(found, unilora_core.project(spec, theta_d))
    assert np.array_equal(found.numpy(), unilora_core.project(spec, theta_d.numpy()))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_identity_start_has_the_bits_of_the_core(grouping):
    spec = ProjectionSpec(pair("identity").layout, 11, seed=3, grouping=grouping, start="identity", bound=0.5)
    theta_d, _, scale = tensors(spec)
    origin = torch.from_numpy(spec.init())
    found = project(theta_d, Gather.of(spec).groups, scale, origin)
    assert np.array_equal(found.numpy(), unilora_core.project(spec, theta_d.numpy()))


@pytest.mark.parametrize(
    "spans",
    [
        [slice(20, 30), slice(0, 5), slice(5, 8)],
        [slice(0, 5), slice(20, 30), slice(5, 8)],
        [slice(0, 5), slice(20, 30), slice(30, 31), slice(31, 36)],
    ],
)
def test_slices_in_another_order(spans):
    """Those that lie side by side are joined, and no others."""
    spec = pair("paper")
    theta_d, groups, scale = tensors(spec)
    found = Gather.of(spec)(theta_d, spans)
    assert torch.equal(found, torch.cat([project(theta_d, groups, scale)[at] for at in spans]))


def test_slices_side_by_side_are_a_view():
    numbers = Gather.of(pair("paper"))
    found = numbers.groups_at([slice(3, 5), slice(5, 9), slice(9, 20)])
    assert found.data_ptr() == numbers.groups[3:].data_ptr()
    assert torch.equal(found, numbers.groups[3:20])


def test_factors_match_the_naive_ones(start):
    spec = pair(start)
    theta_d, _, scale = tensors(spec)
    origin = torch.from_numpy(spec.init()) if start == "identity" else None
    found = spec.layout.split(project(theta_d, Gather.of(spec).groups, scale, origin))
    for name, wanted in naive_factors(spec, theta_d.double()).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_identity_start_begins_at_B_equal_to_zero():
    spec = pair("identity")
    origin = torch.from_numpy(spec.init())
    found = spec.layout.split(project(origin.clone(), Gather.of(spec).groups, spec.scale(xp=torch), origin))
    assert not found["m.B"].any()
    assert found["m.A"].all()


def test_the_gradient_is_project_transpose():
    spec = flat(97, 13)
    theta_d, groups, scale = tensors(spec)
    y = torch.randn(97)
    project(theta_d.requires_grad_(), groups, scale).backward(y)
    assert torch.equal(theta_d.grad, project_transpose(y, groups, scale))
    torch.testing.assert_close(theta_d.grad, unilora_core.project_transpose(spec, y))


def test_transpose_has_the_same_bits_each_time():
    _, groups, scale = tensors(flat(10_007, 13))
    y = torch.randn(10_007)
    first = project_transpose(y, groups, scale)
    assert all(torch.equal(first, project_transpose(y, groups, scale)) for _ in range(5))


@settings(max_examples=40, deadline=None)
@given(D=st.integers(1, 60), data=st.data())
def test_P_is_an_isometry_and_its_transpose_the_adjoint(D, data):
    d = data.draw(st.integers(1, D))
    _, groups, scale = tensors(flat(D, d))
    generator = torch.Generator().manual_seed(D)
    theta_d, y = torch.randn(d, generator=generator), torch.randn(D, generator=generator)
    theta_D = project(theta_d, groups, scale)
    torch.testing.assert_close(theta_D.norm(), theta_d.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theta_D @ y, theta_d @ project_transpose(y, groups, scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_gradcheck_first_and_second_order(shifted):
    spec = pair("identity" if shifted else "paper")
    theta_d, _, scale = tensors(spec, torch.float64)
    groups = Gather.of(spec).groups
    origin = torch.from_numpy(spec.init()).double() if shifted else None

    def both(theta):
        return project(theta, groups, scale, origin)

    assert torch.autograd.gradcheck(both, (theta_d.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda theta: both(theta) ** 3, (theta_d,))


def test_groups_stay_int32_and_no_grad_is_kept_out():
    theta_d, groups, scale = tensors(flat(97, 13))
    assert groups.dtype == torch.int32
    assert not project(theta_d, groups, scale).requires_grad
    with torch.no_grad():
        assert not project(theta_d.requires_grad_(), groups, scale).requires_grad


def test_nothing_is_saved_for_the_backward_pass():
    """Non-reentrant checkpointing counts saved tensors: a projection inside and one outside must look alike."""
    theta_d, groups, scale = tensors(flat(97, 13))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        project(theta_d.requires_grad_(), groups, scale)
    assert saved == []


def test_deterministic_algorithms_are_honoured(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    theta_d, groups, scale = tensors(flat(20_011, 7), device=device)
    y = torch.randn(20_011).to(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(5):
            theta = theta_d.clone().requires_grad_()
            project(theta, groups, scale).backward(y)
            gradients.append(theta.grad)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


def test_functional_transforms():
    spec = flat(97, 13)
    theta_d, groups, scale = tensors(spec)
    y = torch.randn(4, 97)

    def loss(theta, y):
        return project(theta, groups, scale) @ y

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(theta_d, y)
    torch.testing.assert_close(gradients, torch.stack([project_transpose(row, groups, scale) for row in y]))
    many = torch.func.vmap(lambda theta: project(theta, groups, scale))(torch.stack([theta_d, 2 * theta_d]))
    torch.testing.assert_close(many[1], 2 * many[0])
