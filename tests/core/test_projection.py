"""project and project_transpose against P, built row by row from its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec, ValuesError, project, project_transpose

GROUPINGS = ["balanced", "iid", "numpy-shuffle"]
LAYOUT = Layout([("q.A", (3, 40)), ("q.B", (50, 3)), ("v.A", (3, 40)), ("v.B", (7, 3))])
"""D = 411."""


def dense(spec):
    """P: (D, d) float64, one row after the other."""
    rows = spec.groups().tolist()
    P = np.zeros((spec.D, spec.d))
    for i, group in enumerate(rows):
        P[i, group] = 1 / np.sqrt(rows.count(group))
    return P


def normal(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("d", [1, 64, 100, 411])
def test_project_is_the_product_with_P(namespace, grouping, d):
    spec = ProjectionSpec(LAYOUT, d, seed=3, grouping=grouping)
    theta_d = normal(d)
    theta_D = project(spec, namespace.asarray(theta_d))
    assert theta_D.dtype == namespace.load().float32
    np.testing.assert_allclose(np.asarray(theta_D), dense(spec) @ theta_d, rtol=3e-7)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("d", [1, 64, 100, 411])
def test_project_transpose_is_the_product_with_P_transposed(namespace, grouping, d):
    spec = ProjectionSpec(LAYOUT, d, seed=3, grouping=grouping)
    y = normal(spec.D)
    summed = project_transpose(spec, namespace.asarray(y))
    assert summed.dtype == namespace.load().float32
    np.testing.assert_allclose(np.asarray(summed), dense(spec).T @ y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouping", ["balanced", "numpy-shuffle"])
def test_P_is_an_isometry(namespace, grouping):
    """PᵀP = I_d to 1e-6 in float32, column by column (an empty group of ``iid`` would be a zero on the diagonal)."""
    spec = ProjectionSpec(LAYOUT, 37, grouping=grouping)
    product = [np.asarray(project_transpose(spec, project(spec, namespace.asarray(e)))) for e in np.eye(37, dtype="f4")]
    assert abs(np.stack(product) - np.eye(37)).max() <= 1e-6


@given(D=st.integers(1, 3000), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_distances_are_kept(spec_of, D, part, seed):
    spec = spec_of(D, 1 + int(part * (D - 1)), seed=seed)
    theta_d = normal(spec.d)
    np.testing.assert_allclose(project_transpose(spec, project(spec, theta_d)), theta_d, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("grouping", GROUPINGS)
@given(D=st.integers(1, 3000), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_the_two_are_adjoint(spec_of, grouping, D, part, seed):
    spec = spec_of(D, 1 + int(part * (D - 1)), seed=seed, grouping=grouping)
    x, y = normal(spec.d, np.float64), normal(D, np.float64, seed=1)
    np.testing.assert_allclose(project(spec, x) @ y, x @ project_transpose(spec, y), rtol=1e-9, atol=1e-9)


def test_scaling_before_the_gather_gives_the_same_bits(spec_of):
    spec = spec_of(1001, 10)
    theta_d, groups = normal(10), spec.groups()
    assert (project(spec, theta_d) == theta_d[groups] * spec.scale()[groups]).all()


# ---- start = "identity" ----


def test_the_identity_start_has_B_zero(namespace):
    spec = ProjectionSpec(LAYOUT, 50, start="identity")
    factors = LAYOUT.split(np.asarray(project(spec, namespace.asarray(spec.init()))))
    for name, factor in factors.items():
        assert (factor == 0).all() if name.endswith(".B") else (factor != 0).all()


def test_the_identity_start_moves_as_the_paper_start(namespace):
    paper, identity = (ProjectionSpec(LAYOUT, 50, start=start) for start in ("paper", "identity"))
    theta_d = paper.init() + normal(50)
    from_paper, from_identity = (
        LAYOUT.split(np.asarray(project(spec, namespace.asarray(theta_d)))) for spec in (paper, identity)
    )
    at_start = LAYOUT.split(project(paper, paper.init()))
    for name in LAYOUT.shapes:
        expected = from_paper[name] - at_start[name] if name.endswith(".B") else from_paper[name]
        np.testing.assert_allclose(from_identity[name], expected, atol=1e-6)


# ---- dtypes ----


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_that_comes_in_goes_out(dtype, start):
    spec = ProjectionSpec(LAYOUT, 50, start=start)
    theta_d, y = normal(50, dtype), normal(spec.D, dtype)
    assert project(spec, theta_d).dtype == dtype
    assert project_transpose(spec, y).dtype == dtype


def test_float16_is_computed_in_float32(namespace):
    if namespace.name == "STRICT":
        pytest.skip("array-api-strict has no float16")
    spec = ProjectionSpec(LAYOUT, 1)
    theta_d, y = np.float16([3]), np.full(411, 300, np.float16)
    theta_D = np.asarray(project(spec, namespace.asarray(theta_d)))
    assert (theta_D == np.float16(np.float32(3) * spec.scale())).all()
    summed = np.asarray(project_transpose(spec, namespace.asarray(y)))  # 411 · 300 is infinite in float16
    np.testing.assert_allclose(summed, [411**0.5 * 300], rtol=1e-3)


def test_bfloat16_is_computed_in_float32(torch):
    spec = ProjectionSpec(LAYOUT, 1)
    y = torch.ones(411, dtype=torch.bfloat16)  # a sum in bfloat16 would stop at 256
    summed = project_transpose(spec, y)
    assert summed.dtype == torch.bfloat16
    assert abs(float(summed[0]) - 411**0.5) < 0.1
    assert project(spec, y[:1]).dtype == torch.bfloat16


def test_float64_is_computed_in_float64(namespace):
    if namespace.name == "JAX":
        pytest.skip("JAX makes float32 of float64 unless jax_enable_x64 is set")
    spec = ProjectionSpec(LAYOUT, 50)
    theta_d, y = normal(50, np.float64), normal(411, np.float64)
    np.testing.assert_allclose(np.asarray(project(spec, namespace.asarray(theta_d))), dense(spec) @ theta_d, rtol=1e-15)
    summed = np.asarray(project_transpose(spec, namespace.asarray(y)))
    np.testing.assert_allclose(summed, dense(spec).T @ y, rtol=1e-13, atol=1e-14)


# ---- gradients ----


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_the_gradient_in_torch_is_P_transposed(torch, start):
    spec = ProjectionSpec(LAYOUT, 50, start=start)
    theta_d = spec.init(xp=torch).requires_grad_()
    y = normal(411)
    project(spec, theta_d).backward(torch.asarray(y))
    np.testing.assert_allclose(theta_d.grad.numpy(), project_transpose(spec, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_the_gradient_in_jax_is_P_transposed(jax, start):
    spec = ProjectionSpec(LAYOUT, 50, start=start)
    y = normal(411)
    gradient = jax.jit(jax.grad(lambda theta_d: (project(spec, theta_d) * y).sum()))(spec.init())
    np.testing.assert_allclose(np.asarray(gradient), project_transpose(spec, y), rtol=1e-5, atol=1e-6)


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("theta_d", "message"),
    [
        (np.zeros(49, np.float32), r"project: theta_d: expected shape \(50,\) and a floating-point dtype, got \(49,\)"),
        (np.zeros((50, 1), np.float32), r"got \(50, 1\) float32"),
        (np.zeros(50, np.int32), r"got \(50,\) int32"),
        (np.zeros(50, np.complex64), r"got \(50,\) complex64"),
    ],
)
def test_project_refuses_what_does_not_fit(theta_d, message):
    with pytest.raises(ValuesError, match=message):
        project(ProjectionSpec(LAYOUT, 50), theta_d)


def test_project_transpose_refuses_what_does_not_fit(namespace):
    spec = ProjectionSpec(LAYOUT, 50)
    with pytest.raises(ValuesError, match=r"project_transpose: y: expected shape \(411,\) .* got \(50,\)"):
        project_transpose(spec, namespace.asarray(np.zeros(50, np.float32)))
    with pytest.raises(ValuesError, match=r"got \(411,\) .*int32"):
        project_transpose(spec, namespace.asarray(np.zeros(411, np.int32)))
