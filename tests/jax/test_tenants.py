"""Tenants of one step train as each alone; rows are routed, on one device and on eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unilora_jax
from unilora_core import ValuesError

U, D_IN, CLASSES = 3, 6, 4
BATCHES = [[0, 1, 2, 0], [1, 1, 0], [2, 2, 2, 0], [1], [0, 1, 2]]
RATES = np.array([0.02, 0.05, 0.01], np.float32), np.array([0.01, 0.03, 0.02], np.float32)


def parameters():
    keys = jax.random.split(jax.random.key(0), 2)
    up, down = (jax.random.normal(key, shape) / 3 for key, shape in zip(keys, [(D_IN, 8), (8, 8)], strict=True))
    return {"up": {"kernel": up}, "down": {"kernel": down}}


def loss_of(params, head, batch, mask):
    """The mean over the rows of one tenant; each has a head of its own."""
    x, y = batch
    hidden = jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    logits = hidden @ head["kernel"]
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
    return (each * mask).sum() / mask.sum()


def data(tenant, step):
    rng = np.random.default_rng(step)
    return rng.standard_normal((len(tenant), D_IN), np.float32), rng.integers(0, CLASSES, len(tenant))


def start_of(adapter):
    rng = np.random.default_rng(9)
    thetas = adapter.init() + 0.1 * rng.standard_normal((U, adapter.spec.d), np.float32)
    return thetas, {"kernel": jnp.asarray(rng.standard_normal((U, 8, CLASSES), np.float32))}


def rates_at(step, stop):
    """Tenant 2 stops at a step."""
    stopped = (np.arange(U) == 2) & (stop is not None and step >= stop)
    return tuple(np.where(stopped, 0, rate) for rate in RATES)


def together(adapter, stop):
    made = unilora_jax.tenants(adapter, loss_of, optax.adam(1.0))
    params, trained = parameters(), start_of(adapter)
    state, step, losses = made.init(trained), jax.jit(made.step), []
    for i, tenant in enumerate(BATCHES):
        routed, rates = unilora_jax.route(tenant, U, capacity=3), rates_at(i, stop)
        trained, state, found = step(params, trained, state, data(tenant, i), *routed, rates)
        losses.append(np.asarray(found))
    return losses, trained


def alone(adapter, slope, which, stop):
    """One tenant by plain optax, rows of it only; the losses of the steps that it takes part in."""
    params, trained = parameters(), jax.tree.map(lambda leaf: leaf[which], start_of(adapter))
    optimizer = optax.adam(1.0)
    state, losses = optimizer.init(trained), {}
    for i, tenant in enumerate(BATCHES):
        mine = np.flatnonzero(np.array(tenant) == which)
        if not mine.size:
            continue
        x, y = data(tenant, i)
        losses[i], gradient = slope(trained, params, (x[mine], y[mine]), np.ones(mine.size, np.float32))
        if stop is None or i < stop or which != 2:
            updates, state = optimizer.update(gradient, state, trained)
            (theta, head), (of_theta, of_head) = trained, updates
            theta = theta + RATES[0][which] * of_theta
            trained = theta, {"kernel": head["kernel"] + RATES[1][which] * of_head["kernel"]}
    return losses, trained


@pytest.mark.parametrize(("groups", "start", "stop"), [("computed", "identity", None), ("cached", "paper", 2)])
def test_together_as_alone(groups, start, stop):
    adapter = unilora_jax.plan(parameters(), rank=2, d=20, start=start, groups=groups)
    adapted = adapter.wrap(loss_of)
    slope = jax.jit(jax.value_and_grad(lambda trained, params, *rest: adapted(params, *trained, *rest)))
    losses, trained = together(adapter, stop)
    for which in range(U):
        theirs, wanted = alone(adapter, slope, which, stop)
        for i, found in enumerate(losses):
            assert found[which] == pytest.approx(float(theirs.get(i, 0.0)), abs=1e-5)
        for ours, each in zip(jax.tree.leaves(trained), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours[which], each, rtol=1e-4, atol=1e-5)


def test_a_fixed_capacity_compiles_once():
    adapter = unilora_jax.plan(parameters(), rank=2, d=20)
    made = unilora_jax.tenants(adapter, loss_of, optax.sgd(1.0))
    params, trained, counted = parameters(), start_of(adapter), 0

    def step(*args):
        nonlocal counted
        counted += 1
        return made.step(*args)

    state, jitted = made.init(trained), jax.jit(step)
    for i in (0, 2):  # both of four rows
        jitted(params, trained, state, data(BATCHES[i], i), *unilora_jax.route(BATCHES[i], U, 3), RATES)
    assert counted == 1


def test_rows_are_routed():
    rows, mask = unilora_jax.route([2, 0, 2], 4)
    assert rows.tolist() == [[1, 0], [0, 0], [0, 2], [0, 0]]
    assert mask.tolist() == [[1, 0], [0, 0], [1, 1], [0, 0]]
    assert unilora_jax.route([0], 1, 3)[1].tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("tenant", "match"),
    [
        ([0, 3], "row 1 names tenant 3; expected 0 to 2"),
        ([-1], "row 0 names tenant -1; expected 0 to 2"),
        ([0.5], r"tenant: expected \(rows,\) integers, got \(1,\) float64"),
        ([1, 1, 1], "tenant 1 has 3 rows, more than capacity = 2; give a larger one"),
    ],
)
def test_rows_without_a_tenant(tenant, match):
    with pytest.raises(ValuesError, match=match):
        unilora_jax.route(tenant, 3, 2)


def sharded():
    """Eight tenants on eight devices: losses of both ways, how the result lies, and collectives over θ_d."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    adapter, rng, tenant = unilora_jax.plan(parameters(), rank=2, d=20), np.random.default_rng(0), [*range(8), 3]
    made = unilora_jax.tenants(adapter, loss_of, optax.adam(1.0))
    thetas = np.asarray(adapter.init()) + 0.1 * rng.standard_normal((8, 20), np.float32)
    trained = thetas, {"kernel": rng.standard_normal((8, 8, CLASSES), np.float32)}
    rates, routed = (np.full(8, 0.02, np.float32),) * 2, unilora_jax.route(tenant, 8)
    args = parameters(), trained, made.init(trained)
    mesh = jax.make_mesh((8,), ("tenants",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("tenants"))
    placed = args[0], *jax.device_put(args[1:], split)
    losses = []
    for held, more in ((args, (*routed, rates)), (placed, jax.device_put((*routed, rates), split))):
        params, now, state = held
        compiled = jax.jit(made.step).lower(params, now, state, data(tenant, 0), *more).compile()
        for i in range(4):
            now, state, found = compiled(params, now, state, data(tenant, i), *more)
            losses.append(found.tolist())
    text = compiled.as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    return {
        "one": losses[:4],
        "eight": losses[4:],
        "parts": len({str(shard.index) for shard in now[0].addressable_shards}),
        "collectives": [kind for kind in kinds if f" {kind}(" in text],
    }


def test_tenants_over_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found["eight"], found["one"], rtol=0, atol=1e-5)
    assert found["parts"] == 8
    assert found["collectives"] == []


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.stdout.write(json.dumps(sharded()))
