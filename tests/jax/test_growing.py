"""Another d for the same function, functionally; the torch backend reads what it writes."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
from methods import HERE, X, model, outputs, parameters, planned

import unilora_jax
from unilora_core import SpecError, ValuesError
from unilora_core.resizing import carried, grow

P = parameters()
EVERY = [method for method in HERE if method != "vb-lora"]


@pytest.mark.parametrize("method", EVERY)
def test_the_function_stays(method):
    adapter, theta_d = planned(method, grouping="balanced", d=8, groups="cached")
    before = outputs(adapter, P, theta_d, X)
    larger, theta = adapter.grow(theta_d, 3)
    assert (larger.spec.d, larger.spec.first, theta.dtype) == (24, adapter.spec, jnp.float32)
    np.testing.assert_allclose(outputs(larger, P, theta, X), before, rtol=0, atol=2e-6 * abs(before).max())
    expected = methods.in_numpy(methods.updated(P, larger, theta), np.asarray(X, np.float64))
    np.testing.assert_allclose(outputs(larger, P, theta, X), expected, rtol=1e-5, atol=1e-5)
    smaller, again = larger.shrink(theta, 3)
    assert smaller.spec == adapter.spec
    np.testing.assert_allclose(again, theta_d, rtol=0, atol=1e-6 * abs(theta_d).max())


@pytest.mark.parametrize("groups", ["cached", "computed"])
def test_groups_are_cached_where_they_were(groups):
    adapter, theta_d = planned("uni-lora", d=8, groups=groups)
    larger, theta = adapter.grow(theta_d)
    assert {table is None for table in larger.chains.numbers.tables} == {groups == "computed"}
    again, _ = planned("uni-lora", d=8, groups="cached")
    np.testing.assert_allclose(outputs(larger, P, theta, X), outputs(again, P, theta_d, X), rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_larger_P():
    adapter, theta_d = planned("uni-lora", d=8)
    larger, theta = adapter.grow(theta_d)

    def gradient(adapter, theta_d):
        return jax.jit(jax.grad(lambda theta_d: methods.loss(adapter.wrap(model)(P, theta_d, X))))(theta_d)

    small, large = gradient(adapter, theta_d), gradient(larger, theta)
    joined = carried(larger.spec, adapter.spec, np.asarray(large))
    np.testing.assert_allclose(joined, small, rtol=1e-4, atol=1e-5 * abs(small).max())


def test_inside_jit_and_an_optimiser_that_goes_on():
    adapter, theta_d = planned("uni-lora", d=8)
    larger, theta = adapter.grow(theta_d)
    found = jax.jit(lambda theta_d: grow(adapter.spec, theta_d)[1])(theta_d)
    np.testing.assert_allclose(found, theta, rtol=1e-6)
    mu, nu = theta_d / 3, theta_d**2
    mu, nu = (carried(adapter.spec, larger.spec, each, power) for each, power in ((mu, 1), (nu, 2)))
    assert mu.shape == nu.shape == theta.shape
    np.testing.assert_array_equal(nu[:8], nu[8:])
    assert larger.learning_rate(1.0) == pytest.approx(adapter.learning_rate(1.0) * 2**-0.75)


def test_a_file_of_it(tmp_path):
    adapter, theta_d = planned("uni-lora", d=8)
    larger, theta = adapter.grow(theta_d, 4)
    larger.save(tmp_path / "a", theta)
    again, read = unilora_jax.load(P, tmp_path / "a", stacked="layers", groups="cached")
    assert again.spec == larger.spec
    assert read.tobytes() == theta.tobytes()
    np.testing.assert_allclose(outputs(again, P, read, X), outputs(larger, P, theta, X), rtol=1e-6, atol=1e-6)


def test_what_is_refused():
    adapter, theta_d = planned("uni-lora", d=8)
    with pytest.raises(SpecError, match=r"^grow: 1000 times d = 8 would be more than min.D, 2.31. = \d+; the largest"):
        adapter.grow(theta_d, 1000)
    with pytest.raises(SpecError, match=r"^shrink: d = 8 is no multiple of 3; factors of it are 2, 4, 8"):
        adapter.shrink(theta_d, 3)
    with pytest.raises(ValuesError, match=r"grow: theta_d: expected shape \(8,\) and a floating-point dtype"):
        adapter.grow(theta_d[1:])
    other, start = planned("fastfood", d=8)
    with pytest.raises(SpecError, match=r"^shrink: the grouping 'fastfood' has another P for another d"):
        other.shrink(start)
