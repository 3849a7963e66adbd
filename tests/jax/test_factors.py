"""All factors at once, by bundles of equal shapes, against the projection of the core."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unilora_core import Layout, ProjectionSpec, project
from unilora_core import grouping as impl
from unilora_jax.gather import gathered

LAYOUT = Layout(
    [(f"layers.{i}.{m}.{f}", s) for i in range(3) for m in "qv" for f, s in (("A", (4, 24)), ("B", (20, 4)))]
    + [("head.A", (4, 20)), ("head.B", (7, 4))]
)
STACKS = [
    *((tuple(f"layers.{i}.{m}.{f}" for i in range(3)), f == "B") for m in "qv" for f in "AB"),
    (("head.A",), False),
    (("head.B",), True),
]


def named(arrays):
    """Name → factor."""
    return {name: np.asarray(array[i]) for names, array in arrays.items() for i, name in enumerate(names)}


def moved(spec):
    return (spec.init() + np.random.default_rng(0).normal(size=spec.d)).astype(np.float32)


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("grouping", ["balanced", "iid", "numpy-shuffle"])
def test_factors_have_the_bits_of_the_core(grouping, start, cached):
    spec = ProjectionSpec(LAYOUT, 77, seed=5, grouping=grouping, start=start)
    theta_d = moved(spec)
    ours = named(jax.jit(lambda f, theta_d: f(theta_d))(gathered(spec, STACKS, cached=cached), theta_d))
    assert ours.keys() == set(LAYOUT.shapes)
    for name, expected in LAYOUT.split(project(spec, theta_d)).items():
        assert (ours[name] == expected).all(), name


def test_the_layout_has_points_outside_the_domain():
    """Or the table by which a walk comes back would never be read in these tests."""
    assert impl.permutation(impl.Problem(LAYOUT.size, 77, 5), 0).outside


def test_nothing_is_stored_per_lora_parameter_unless_asked():
    computed = gathered(ProjectionSpec(LAYOUT, 77), STACKS, cached=False)
    cached = gathered(ProjectionSpec(LAYOUT, 77), STACKS, cached=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(computed)) == 77  # the scale
    tables = [table for table in cached.tables if table is not None]
    assert sum(table.nbytes for table in tables) == 4 * LAYOUT.size
    assert {table.dtype for table in tables} == {jnp.dtype("int32")}


def test_one_kernel_serves_all_factors_of_a_shape():
    """Four bundles: A and B of the stacks, A and B of the head."""
    factors = gathered(ProjectionSpec(LAYOUT, 77), STACKS, cached=False)
    program = str(jax.make_jaxpr(factors)(jnp.zeros(77)))
    assert program.count("name=_groups") == 4


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
def test_a_step_compiles_as_much_for_one_layer_as_for_many(cached):
    """One gather and one scatter-add for all factors of a shape: most of the time to compile went to one for each."""

    def operations(layers):
        shapes = [
            (f"l{i}.{m}.{f}", s) for i in range(layers) for m in "qv" for f, s in (("A", (4, 24)), ("B", (20, 4)))
        ]
        factors = gathered(ProjectionSpec(Layout(shapes), 77), [((n,), n[-1] == "B") for n, _ in shapes], cached=cached)
        step = jax.grad(lambda t: sum((array**2).sum() for array in factors(t).values()))
        text = jax.jit(step).lower(jnp.zeros(77)).as_text()
        return {name: text.count(f'"stablehlo.{name}"') for name in ("gather", "scatter")}

    assert operations(9) == operations(1)
    assert operations(9)["scatter"] == 2


@pytest.mark.parametrize("before", [2**31 - 48, 2**31 - 160, 2**31 + 8, 2**33])
def test_factors_past_and_across_position_2_31(before):
    layout = Layout([("far.A", (8, before // 8)), ("m.A", (4, 24)), ("m.B", (20, 4))])
    spec = ProjectionSpec(layout, 1000)
    arrays = named(gathered(spec, [(("m.A",), False), (("m.B",), True)], cached=False)(jnp.arange(1000.0)))
    for name in ("m.A", "m.B"):
        at = layout.slices[name]
        expected = (np.arange(1000, dtype=np.float32) * spec.scale())[spec.groups(at.start, at.stop)]
        assert (arrays[name].ravel() == expected).all(), name


def test_the_gradient_is_P_transposed(start):
    spec = ProjectionSpec(LAYOUT, 77, start=start)
    factors, y = gathered(spec, STACKS, cached=False), np.random.default_rng(1).normal(size=LAYOUT.size)

    def inner(theta_d):
        ours, theirs = factors(theta_d), LAYOUT.split(jnp.asarray(y, jnp.float32))
        return sum((array[i] * theirs[name]).sum() for names, array in ours.items() for i, name in enumerate(names))

    expected = np.zeros(77)
    np.add.at(expected, spec.groups(), y)
    gradient = jax.jit(jax.grad(inner))(jnp.asarray(moved(spec)))
    np.testing.assert_allclose(gradient, expected * spec.scale(), rtol=1e-5, atol=1e-5)
