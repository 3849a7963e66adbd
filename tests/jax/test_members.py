"""Pᵀ as a sum over the members of each group: the same bits on every device, and no scatter where that is slow."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from test_factors import LAYOUT, STACKS, moved

import unilora_jax
from unilora_core import Layout, ProjectionSpec
from unilora_core.maps import MAPS
from unilora_jax.gather import gathered
from unilora_jax.members import TOGETHER, preferred
from unilora_jax.projection import _warn_of, here, slow_scatter

GROUPINGS = [name for name, each in MAPS.items() if each.groups is not None]
Y = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)


def added(values):
    """Float32 additions, from the first to the last."""
    total = np.float32(0)
    for value in values:
        total += value
    return total


def in_order(spec, y):
    """Pᵀ y by NumPy: 64 members at a time, then those sums."""
    offsets, positions = spec.members()
    of_groups = [y[positions[start:stop]] for start, stop in itertools.pairwise(offsets)]
    parts = [[added(each[k : k + TOGETHER]) for k in range(0, len(each), TOGETHER)] for each in of_groups]
    return np.array([added(each) for each in parts], np.float32) * spec.scale()


@jax.jit
def gradient(factors, theta_d, y=Y):
    def inner(theta_d):
        theirs = LAYOUT.split(jnp.asarray(y))
        return sum(
            (array[i] * theirs[name]).sum() for names, array in factors(theta_d).items() for i, name in enumerate(names)
        )

    return jax.grad(inner)(theta_d)


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("d", [7, 77])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_bits_of_an_ordered_sum(grouping, d, cached):
    """Groups of one part, and of two."""
    spec = ProjectionSpec(LAYOUT, d, seed=5, grouping=grouping, start="identity")
    ours, scattered = (gathered(spec, STACKS, cached=cached, sums_members=each) for each in (True, False))
    theta_d = jnp.asarray(moved(spec))
    found = gradient(ours, theta_d)
    assert np.asarray(found).tobytes() == in_order(spec, Y).tobytes()
    np.testing.assert_allclose(found, gradient(scattered, theta_d), rtol=1e-5, atol=1e-5)


def test_a_grown_spec():
    spec = ProjectionSpec(LAYOUT, 80, seed=5, start="identity", options=(("first_d", 20),))
    factors = gathered(spec, STACKS, cached=False, sums_members=True)
    assert np.asarray(gradient(factors, jnp.asarray(moved(spec)))).tobytes() == in_order(spec, Y).tobytes()


def test_many_at_once_and_in_64_bits(start):
    spec = ProjectionSpec(LAYOUT, 77, start=start)
    factors, theta_d = gathered(spec, STACKS, cached=False, sums_members=True), jnp.asarray(moved(spec))
    several = np.stack([Y, -Y, 2 * Y])
    found = jax.vmap(lambda y: gradient(factors, theta_d, y))(jnp.asarray(several))
    assert np.asarray(found).tobytes() == np.stack([in_order(spec, y) for y in several]).tobytes()
    with jax.enable_x64(True):
        found = gradient(factors, theta_d)
    assert np.asarray(found).tobytes() == in_order(spec, Y).tobytes()


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
def test_no_scatter_is_left(cached):
    def scatters(sums_members):
        factors = gathered(
            ProjectionSpec(LAYOUT, 77, start="identity"), STACKS, cached=cached, sums_members=sums_members
        )
        program = gradient.trace(factors, jnp.zeros(77)).lower(lowering_platforms=("cuda",))
        return program.as_text().count("stablehlo.scatter")

    assert scatters(True) == 0
    assert scatters(False) > 0


PARAMS = {
    "layers": {"proj": {"kernel": jax.random.normal(jax.random.key(0), (6, 16, 16)) / 4}},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (16, 9))},
}


def model(params, x):
    """Stacked layers under `scan`, computed again for the backward pass."""
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(layer, x, params["layers"]["proj"]["kernel"])[0] @ params["head"]["kernel"]


@pytest.mark.parametrize("groups", ["computed", "cached"])
def test_a_step_of_an_adapter(monkeypatch, groups, start):
    def step(theta_d, adapter):
        x = jnp.linspace(-1, 1, 32).reshape(2, 16)
        return jax.grad(lambda theta_d: jnp.square(adapter.wrap(model)(PARAMS, theta_d, x)).sum())(theta_d)

    def planned():
        return unilora_jax.plan(PARAMS, r".*kernel", rank=3, d=50, start=start, groups=groups)

    scattered = planned()
    theta_d = scattered.init() + 0.1
    monkeypatch.setattr("unilora_jax.gather.preferred", lambda *_: True)
    ours = planned()
    assert ours.chains.numbers.sums_members
    assert not scattered.chains.numbers.sums_members
    run, several = jax.jit(jax.vmap(step, (0, None))), jnp.stack([theta_d, -theta_d])
    np.testing.assert_allclose(run(several, ours), run(several, scattered), rtol=1e-4, atol=1e-5)


def test_beyond_2_31_positions_are_scattered():
    spec = ProjectionSpec(Layout([("far.A", (8, 2**28)), ("m.A", (4, 24))]), 1000)
    assert not gathered(spec, [(("m.A",), False)], cached=False, sums_members=True).sums_members


@pytest.mark.parametrize(
    ("where", "version", "slow"),
    [
        ("cuda", "0.10.1", False),
        ("cuda", "0.10.2", True),
        ("cuda", "0.10.2.dev20260101", True),
        ("cuda", "0.11.0", True),
        ("cuda", "0.11.0.1", True),
        ("cuda", "0.11.1", False),
        ("cuda", "0.12.0.1", False),
        ("rocm", "0.10.2", False),
        ("cpu", "0.10.2", False),
    ],
)
def test_which_scatter_is_slow(where, version, slow):
    said = slow_scatter(where, version)
    assert (said is not None) == preferred(where, version, "") == slow
    assert said is None or said.startswith(f"jaxlib {version} compiles a float32 scatter-add on CUDA to a loop")


@pytest.mark.parametrize(
    ("where", "flags", "members"),
    [
        ("cuda", "--xla_gpu_deterministic_ops=true", True),
        ("cuda", "--xla_dump_to=a --xla_gpu_exclude_nondeterministic_ops --xla_gpu_autotune_level=0", True),
        ("cuda", "--xla_gpu_deterministic_ops=1", True),
        ("cuda", "--xla_gpu_deterministic_ops=false", False),
        ("cuda", "", False),
        ("cpu", "--xla_gpu_deterministic_ops=true", False),
    ],
)
def test_members_are_summed_where_bits_are_to_be_the_same(where, flags, members):
    assert preferred(where, "0.12.0", flags) == members


def test_it_is_said_once():
    _warn_of.cache_clear()
    said = slow_scatter("cuda", "0.11.0")
    with pytest.warns(UserWarning, match=r"jaxlib 0\.11\.0 .* Take jaxlib 0\.12 or later"):
        _warn_of(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of(said)
        _warn_of(slow_scatter("cpu", "0.11.0"))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU's name is another")
def test_where_this_process_computes():
    assert here() == (jax.default_backend(), jaxlib.__version__)
