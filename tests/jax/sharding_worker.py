"""Twenty steps of a small scanned model on eight host devices, in the way named on the command line; prints JSON.

A process of its own, because JAX reads the number of host devices once, when it starts.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import unilora_jax
from unilora_jax import gather

VOCABULARY, WIDTH, HIDDEN, LAYERS = 64, 24, 48, 3
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 5))
PARTS = {
    "data": {"up": P(), "down": P(), "head": P()},
    "fsdp": {"up": P(None, "data", None), "down": P(None, None, "data"), "head": P("data", None)},
    "tensor": {"up": P(None, None, "model"), "down": P(None, "model", None), "head": P(None, "model")},
    "both": {"up": P(None, "data", "model"), "down": P(None, "model", "data"), "head": P("data", "model")},
}
"""How the weights lie on a mesh of 4 (data) x 2 (model)."""


def parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (VOCABULARY, WIDTH), (LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH), (WIDTH, VOCABULARY)
    embed, up, down, head = (
        jax.random.normal(key, shape) / shape[-2] ** 0.5 for key, shape in zip(keys, shapes, strict=True)
    )
    return {"embed": embed, "layers": {"up": {"kernel": up}, "down": {"kernel": down}}, "head": {"kernel": head}}


def model(params, tokens, explicit=False):
    """On an explicit mesh the model says how what is ambiguous lies, and gathers what FSDP split over the data axis."""

    def laid(*spec):
        return {"out_sharding": P(*spec)} if explicit else {}

    def gathered(w):
        spec = P(*(None if axis == "data" else axis for axis in jax.typeof(w).sharding.spec))
        return jax.sharding.reshard(w, spec) if explicit else w

    def block(x, layer):
        up, down = gathered(layer["up"]["kernel"]), gathered(layer["down"]["kernel"])
        hidden = jnp.tanh(jnp.einsum("bti,io->bto", x, up))
        return x + jnp.einsum("bti,io->bto", hidden, down, **laid("data", None, None)), None

    x = params["embed"].at[tokens].get(**laid("data", None, None))
    x, _ = jax.lax.scan(block, x, params["layers"])
    return jnp.einsum("bti,io->bto", x, gathered(params["head"]["kernel"]))


def place(params, mesh, parts):
    layers = {name: {"kernel": parts[name]} for name in ("up", "down")}
    specs = {"embed": P(), "layers": layers, "head": {"kernel": parts["head"]}}
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)


def collectives(text):
    """Of a compiled program: [kind, [numbers of each array]] for each."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= (\([^=]*\)|\S+) ({kinds})\S*\(", text)
    return [[kind, [sizes(shape) for shape in re.findall(r"\[([\d,]*)\]", shapes)]] for shapes, kind in found]


def sizes(shape):
    return [int(size) for size in shape.split(",") if size]


OPTIONS = {
    "computed": {"rank": 4, "d": 256, "groups": "computed"},
    "cached": {"rank": 4, "d": 256, "groups": "cached"},
    "members": {"rank": 4, "d": 256, "groups": "computed"},
    "gaussian": {"method": "gaussian", "d": 64},
    "scattered": {"method": "vera", "rank": 16, "grouping": "balanced"},
    "tied-lora": {"method": "tied-lora"},
    "lora-xs": {"method": "lora-xs", "rank": 4},
    "vb-lora": {"method": "vb-lora", "vectors": 8, "length": 8},
}


def train(way, options):
    """Losses and collectives; ``way``: one, or PARTS-auto, PARTS-explicit, or shard_map."""
    name, _, mode = way.partition("-")
    params, tokens = parameters(), jnp.asarray(TOKENS)
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    if name in PARTS:
        params = place(params, mesh, PARTS[name])
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    gather.preferred = lambda *_: options == "members"
    adapter = unilora_jax.plan(params, "(layers|head)/.*kernel", **OPTIONS[options])
    adapted = adapter.wrap(lambda params, tokens: model(params, tokens, mode == "explicit"))
    optimiser = optax.adam(1e-2)

    def loss_of(theta_d, params, tokens):
        wanted = jax.nn.one_hot(tokens[:, 1:], VOCABULARY)
        return -(jax.nn.log_softmax(adapted(params, theta_d, tokens)[:, :-1]) * wanted).sum(-1).mean()

    def gradient(theta_d, params, tokens):
        loss, gradient = jax.value_and_grad(loss_of)(theta_d, params, tokens)
        return jax.lax.pmean(loss, "data"), gradient / 4

    if name == "shard_map":
        split = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    else:
        split = jax.value_and_grad(loss_of)

    def step(theta_d, moments, params, tokens):
        loss, slope = split(theta_d, params, tokens)
        updates, moments = optimiser.update(slope, moments)
        return loss, optax.apply_updates(theta_d, updates), moments

    theta_d = adapter.init()
    moments = optimiser.init(theta_d)
    if name in PARTS:
        theta_d, moments = jax.device_put((theta_d, moments), NamedSharding(mesh, P()))
    losses, whole = [], NamedSharding(mesh, P()) if name in PARTS else None
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, out_shardings=whole).lower(theta_d, moments, params, tokens).compile()
        for _ in range(20):
            loss, theta_d, moments = compiled(theta_d, moments, params, tokens)
            losses.append(float(loss))
    return {"losses": losses, "collectives": collectives(compiled.as_text())}


def blocks():
    """The largest differences between an explicit mesh and one device: outputs and merged weights of a fused qkv."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 24), (8, 8)]))
    whole = unilora_jax.linear_target("qkv/kernel", w)
    parts = [
        dataclasses.replace(whole, names=(f"qkv.{name}",), out_features=8, first_row=row)
        for name, row in (("q", 0), ("v", 16))
    ]
    params = {"qkv": {"kernel": w}}
    adapter = unilora_jax.plan(params, parts, rank=2, d=20)
    theta_d, adapted = adapter.init() + 1, adapter.wrap(lambda params, x: x @ params["qkv"]["kernel"])
    one = adapted(params, theta_d, x), adapter.merge(params, theta_d)["qkv"]["kernel"]
    with jax.set_mesh(mesh):
        params, x = {"qkv": {"kernel": jax.device_put(w, P(None, "model"))}}, jax.device_put(x, P("data", None))
        many = jax.jit(adapted)(params, theta_d, x), jax.jit(adapter.merge)(params, theta_d)["qkv"]["kernel"]
    assert [str(jax.typeof(array)) for array in many] == ["float32[8@data,24@model]", "float32[8,24@model]"]
    return [float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(one, many, strict=True)]


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"blocks": blocks()} | {way: train(*way.split(" ")) for way in sys.argv[1:]}))
