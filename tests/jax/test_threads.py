"""One adapter in several threads, each with a θ_d of its own: all is functional, so nothing can be shared."""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_jax

PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (8, 16))},
    "layers": {"mlp": {"kernel": jax.random.normal(jax.random.key(1), (3, 16, 16)) / 4}},
}
X = jax.random.normal(jax.random.key(2), (4, 8))


def model(params, x):
    hidden = x @ params["up"]["kernel"]
    return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["kernel"]), None), hidden, params["layers"]["mlp"])[0]


def run(adapter, theta_d):
    """(outputs, gradient, a merged weight)."""
    adapted = adapter.wrap(model)
    gradient = jax.grad(lambda theta_d: adapted(PARAMS, theta_d, X).sum())(theta_d)
    return adapted(PARAMS, theta_d, X), gradient, adapter.merge(PARAMS, theta_d)["up"]["kernel"]


@pytest.mark.parametrize(("jit", "passes"), [(True, 50), (False, 2)], ids=["jit", "eager"])
def test_threads_with_vectors_of_their_own(jit, passes, path):
    options = {"d": 64, "bound": 0.5, "grouping": "numpy-shuffle"}  # the grouping that compiles fastest
    adapter = unilora_jax.plan(PARAMS, ["up", "mlp"], **options)
    thetas = [adapter.init() + 0.3 * jax.random.normal(jax.random.key(i), (64,)) for i in range(4)]
    adapter.save(path, thetas[0])
    wanted = [[np.asarray(part) for part in run(adapter, theta_d)] for theta_d in thetas]
    assert np.abs(wanted[0][0] - wanted[1][0]).max() > 0.1
    compiled = jax.jit(lambda adapter, theta_d: run(adapter, theta_d)) if jit else run
    wrong, switch, start = [], sys.getswitchinterval(), threading.Barrier(4)

    def work(i):
        start.wait()
        try:
            for _ in range(passes):
                loaded, _ = unilora_jax.load(PARAMS, path)
                for found, want in zip(compiled(loaded, thetas[i]), wanted[i], strict=True):
                    if not np.allclose(found, want, rtol=1e-4, atol=1e-5):
                        wrong.append((i, np.abs(found - want).max()))
        except BaseException as error:  # seen by the test, not by the thread alone
            wrong.append((i, error))
            raise

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    finally:
        sys.setswitchinterval(switch)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
