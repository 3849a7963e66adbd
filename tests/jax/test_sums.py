"""Several adapters at once: what merging each in turn gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_jax
from unilora_core import SpecError, TargetError, ValuesError

KEYS = jax.random.split(jax.random.key(0), 4)
TREE = {name: {"kernel": jax.random.normal(key, (8, 8)) / 3} for name, key in zip("abc", KEYS, strict=False)}
X = jax.random.normal(KEYS[3], (5, 8))


def model(params, x, *, scale=1.0):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return x * scale


@pytest.fixture(scope="module")
def adapters():
    """Of other ranks, d, seeds, targets and methods."""
    plans = [
        {"targets": ["a", "b"], "rank": 2, "d": 20, "groups": "cached"},
        {"targets": ["b", "c"], "rank": 3, "d": 30, "seed": 1, "groups": "cached"},
        {"targets": ["b"], "method": "lora", "rank": 1},
    ]
    return [unilora_jax.plan(TREE, bound=1.0, **plan) for plan in plans]


@pytest.fixture(scope="module")
def thetas(adapters):
    return [adapter.init() + 0.3 * (i + 1) for i, adapter in enumerate(adapters)]


def weighted(adapters, thetas, weights):
    """W + Σ_k w_k (W_k - W), of what each merge makes."""
    merged = [adapter.merge(TREE, theta_d) for adapter, theta_d in zip(adapters, thetas, strict=True)]

    def summed(base, *others):
        return base + sum(w * (other - base) for w, other in zip(weights, others, strict=True))

    return jax.tree.map(summed, TREE, *merged)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3, -1.5)])
def test_updates_add_up(adapters, thetas, weights):
    found = jax.jit(unilora_jax.wrap(adapters, model, weights))(TREE, thetas, X)
    expected = model(weighted(adapters, thetas, weights or (1, 1, 1)), X)
    assert abs(expected - model(TREE, X)).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_merge_of_each_in_turn_is_the_sum(adapters, thetas):
    merged = TREE
    for adapter, theta_d in zip(adapters, thetas, strict=True):
        merged = adapter.merge(merged, theta_d)
    found = unilora_jax.wrap(adapters, model)(TREE, thetas, X, scale=2.0)
    np.testing.assert_allclose(found, model(merged, X, scale=2.0), rtol=1e-5, atol=1e-5)


def test_gradients_reach_each_theta_d_and_the_weights(adapters, thetas):
    def loss(thetas, weights):
        return unilora_jax.wrap(adapters, model, weights)(TREE, thetas, X).sum()

    def expected(thetas, weights):
        return model(weighted(adapters, thetas, weights), X).sum()

    weights = jnp.asarray([0.5, 1.0, 2.0])
    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(thetas, weights) for f in (loss, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_one_adapter_is_what_its_own_wrap_gives(adapters, thetas):
    (adapter, *_), (theta_d, *_) = adapters, thetas
    assert (unilora_jax.wrap([adapter], model)(TREE, [theta_d], X) == adapter.wrap(model)(TREE, theta_d, X)).all()


def test_what_does_not_fit_is_refused(adapters, thetas):
    with pytest.raises(SpecError, match=r"^wrap: expected one adapter or more, and as many weights, got 0 and no wei"):
        unilora_jax.wrap([], model)
    with pytest.raises(SpecError, match=r"got 3 and 2 weights\.$"):
        unilora_jax.wrap(adapters, model, [1, 2])
    for wrong, match in ((thetas[:2], "got 2"), (thetas[0], "got a ArrayImpl")):
        with pytest.raises(
            ValuesError, match=rf"^wrap: thetas: expected a list of one theta_d for each of 3 .*{match}"
        ):
            unilora_jax.wrap(adapters, model)(TREE, wrong, X)
    turned = unilora_jax.linear_target("b/kernel", TREE["b"]["kernel"], inputs=(1,))
    other = unilora_jax.plan(TREE, [turned], rank=1, groups="cached")
    with pytest.raises(TargetError, match=r"^wrap: b/kernel: the adapters were planned for different weights"):
        unilora_jax.wrap([adapters[0], other], model)(TREE, [thetas[0], other.init()], X)
