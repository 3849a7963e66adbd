"""Every method on one small model, and the naive reference: ΔW by the core, in float64, added to the weights."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import unilora_jax
from unilora_core import project
from unilora_core.frames import FRAMES, piece_names
from unilora_core.methods import METHODS

HERE = [name for name, method in METHODS.items() if not FRAMES[method.frame].dense]
"""The methods of factors."""

OPTIONS = {
    "vera": {"rank": 5},
    "lora-xs": {"rank": 3},
    "vb-lora": {"vectors": 6, "length": 2},
}
"""What a small model needs in place of the methods' defaults."""

LAYERS, WIDTH = 3, 16


def normal(*shape, seed=0, dtype=jnp.float32):
    return (jax.random.normal(jax.random.key(seed), shape) / shape[-1] ** 0.5).astype(dtype)


def parameters(dtype=jnp.float32):
    """A stack, (out, in), heads as axes, and a fused weight of which two blocks are adapted."""
    return {
        "layers": {"up": {"kernel": normal(LAYERS, WIDTH, WIDTH, dtype=dtype)}},
        "attn": {"query": {"kernel": normal(WIDTH, 2, 6, seed=1, dtype=dtype)}},
        "qkv": {"kernel": normal(12, 3 * WIDTH, seed=2, dtype=dtype)},
        "head": {"weight": normal(8, 3 * WIDTH, seed=3, dtype=dtype)},
    }


X = normal(5, WIDTH, seed=9)


def model(params, x):
    """In JAX, by a scan."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["up"]["kernel"])[0]
    x = jnp.einsum("ti,ihd->thd", x, params["attn"]["query"]["kernel"]).reshape(x.shape[0], -1)
    return jnp.tanh(x @ params["qkv"]["kernel"]) @ params["head"]["weight"].T


def in_numpy(params, x):
    """The same in NumPy."""
    for w in params["layers"]["up"]["kernel"]:
        x = np.tanh(x @ w)
    x = np.einsum("ti,ihd->thd", x, params["attn"]["query"]["kernel"]).reshape(x.shape[0], -1)
    return np.tanh(x @ params["qkv"]["kernel"]) @ params["head"]["weight"].T


def targets(params):
    whole = unilora_jax.find_targets(params, ["qkv"])[0]
    blocks = [
        unilora_jax.Target(whole.path, (f"qkv.{name}",), ("qkv",), 12, WIDTH, whole.inputs, False, row)
        for name, row in (("v", 2 * WIDTH), ("q", 2))
    ]
    return [*unilora_jax.find_targets(params, ["up", "query", "head"]), *blocks]


def planned(method, params=None, **options):
    """An adapter, and θ_d away from its start. Cached groups, so that no kernel is compiled unless asked for."""
    params = parameters() if params is None else params
    options = ({"groups": "cached"} if method == "uni-lora" else {}) | OPTIONS.get(method, {}) | options
    adapter = unilora_jax.plan(params, targets(params), method=method, **options)
    return adapter, adapter.init() + 0.3 * normal(1, adapter.spec.d, seed=5)[0] * adapter.spec.d**0.5


# ---- ΔW by NumPy ----------------------------------------------------------------------------------------------------


def updates(adapter, theta_d):
    """Name of each layer's target → ΔW (out, in), float64."""
    spec = adapter.spec
    factors = spec.layout.split(project(spec, np.asarray(theta_d, np.float64)))
    found = {}
    for target, kept in zip(adapter.targets, adapter.chains.frozen, strict=True):
        for i, name in enumerate(target.names):
            pieces = {piece: factors[factor] for piece, factor in piece_names(spec.form, name, target.sizes).items()}
            frozen = spec.form.frozen(target.sizes, spec.seed, spec.chosen)
            if spec.form.of_weight is not None:  # an SVD is not unique; that it is one has a test of its own
                frozen = {array: np.asarray(values[i]) for array, values in kept.items()}
            frozen = {array: values.astype(np.float64) for array, values in frozen.items()}
            found[name] = functools.reduce(lambda F, G: G @ F, spec.form.chain(pieces, frozen, spec.chosen))
    return found


def updated(params, adapter, theta_d):
    """W + ΔW, float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    found = updates(adapter, theta_d)
    params["layers"]["up"]["kernel"] += np.stack([found[f"layers.{i}.up"].T for i in range(LAYERS)])
    params["attn"]["query"]["kernel"] += found["attn.query"].T.reshape(WIDTH, 2, 6)
    params["qkv"]["kernel"][:, 2 : 2 + WIDTH] += found["qkv.q"].T
    params["qkv"]["kernel"][:, 2 * WIDTH :] += found["qkv.v"].T
    params["head"]["weight"] += found["head"]
    return params


def loss(y):
    """Each output counts differently."""
    return (y * np.cos(np.arange(y.size)).reshape(y.shape)).sum()


def slope(params, adapter, theta_d, direction):
    """The derivative of the loss along a direction, by differences, in float64."""
    theta_d, step = np.asarray(theta_d, np.float64), 1e-5 * np.asarray(direction, np.float64)
    x = np.asarray(X, np.float64)
    above, below = (loss(in_numpy(updated(params, adapter, theta_d + sign * step), x)) for sign in (1, -1))
    return (above - below) / 2e-5


# ---- in a process of its own ----------------------------------------------------------------------------------------


@jax.jit
def outputs(adapter, params, theta_d, x):
    """What the adapted model gives."""
    return adapter.wrap(model)(params, theta_d, x)


def outputs_of(path):
    """What a file makes of the model."""
    adapter, theta_d = unilora_jax.load(parameters(), path, groups="cached" if "uni-lora" in str(path) else "computed")
    return outputs(adapter, parameters(), theta_d, X)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({path: np.asarray(outputs_of(path)).tolist() for path in sys.argv[1:]}))
