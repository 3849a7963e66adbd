"""Files of strangers: refused by name, in time and memory of the file and the tree, and before anything is made."""

import copy
import dataclasses
import hashlib
import json
import random
import sys
import tracemalloc
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_core
import unilora_jax
from unilora_core import Layout, MismatchError, ProjectionSpec, TargetError, UniLoraError, save_adapter

TREE = {
    "up": {"kernel": np.ones((4, 6), np.float32)},
    "qkv": {"kernel": np.ones((80, 240), np.float32)},
    "layers": {"mlp": {"kernel": np.ones((3, 4, 4), np.float32)}},
}


def write(path, pairs, rows=None, d=1, start="paper", **entries):
    """A file of pairs of factors: name → (rank, in, out)."""
    shapes = [f for name, (r, i, o) in pairs.items() for f in ((f"{name}.A", (r, i)), (f"{name}.B", (o, r)))]
    spec = ProjectionSpec(Layout(shapes), d, start=start)
    if rows is not None:
        entries["targets"] = json.dumps(rows)
    save_adapter(path, spec, np.full(d, 0.1, np.float32), metadata=entries)


def refused(path, match, params=TREE, error=MismatchError, **options):
    with pytest.raises(error, match=match) as caught:
        unilora_jax.load(params, path, **options)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "shape", "most"), [("up", (4, 6), 64), ("qkv", (80, 240), 80)])
@pytest.mark.parametrize("beyond", [1, 2**27])
def test_a_rank_that_the_layer_cannot_use_costs_nothing(path, layer, shape, most, beyond):
    write(path, {layer: (most + beyond, *shape)})
    tracemalloc.start()
    inputs, outputs = shape
    refused(
        path,
        rf"adapter.safetensors: {layer}: expected a rank of at most {most} for {inputs} inputs and {outputs} outputs, "
        rf"the file has {most + beyond}; .*say any_rank=True",
    )
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    if beyond == 1:
        adapter, theta_d = unilora_jax.load(TREE, path, any_rank=True)
        assert adapter.factors(theta_d)[f"{layer}.A"].shape == (most + 1, inputs)
    write(path, {layer: (most, *shape)})
    assert unilora_jax.load(TREE, path)[0].shapes[0][1] == shape


def test_blocks_whose_ranks_add_up_to_too_much(path):
    """Each is small, but each row of outputs has a block of its own."""
    pairs = {f"b{i}": (64, 80, 1) for i in range(6)}
    write(path, pairs, [[name, "qkv", i, False] for i, name in enumerate(pairs)])
    refused(path, r"qkv/kernel: expected blocks whose ranks add up to at most 320, .* add up to 384 and more.*any_rank")
    assert len(unilora_jax.load(TREE, path, any_rank=True)[0].targets) == 6
    pairs = dict(zip("qkv", [(80, 80, 80)] * 3, strict=True))
    write(path, pairs, [[name, "qkv", 80 * i, False] for i, name in enumerate(pairs)])
    assert len(unilora_jax.load(TREE, path)[0].targets) == 3


# ---- rows -----------------------------------------------------------------------------------------------------------


HALF = {"q": (2, 4, 3), "k": (2, 4, 3)}
ROWS = {
    "from the end": (
        [["q", "up", -3, False], ["k", "up", 0, False]],
        "up/kernel: expected a first row from 0 on, .* -3",
    ),
    "beyond": ([["q", "up", 4, False], ["k", "up", 0, False]], "up/kernel: .*at least 7 outputs, the tree has 4 and 6"),
    "far beyond": ([["q", "up", 2**63, False], ["k", "up", 0, False]], "up/kernel: .*at least 9223372036854775811 out"),
    "twice": ([["q", "up", 0, False], ["k", "up", 0, False]], "q and k both belong to the layer 'up'"),
    "overlapping": ([["q", "up", 2, False], ["k", "up", 0, False]], "k and q adapt the same outputs of up/kernel"),
    "no layer": (
        [["q", "uq", 0, False], ["k", "up", 0, False]],
        r"no matrix for the layer 'uq'; the nearest are \['up'",
    ),
    "no name": ([["q", "", 0, False], ["k", "up", 0, False]], "no matrix for the layer ''"),
    "parameter": (
        [["q", "up", 0, False, "kernel"], ["k", "up", 3, False]],
        "q adapts the parameter 'kernel' of a PyTo",
    ),
    "terminal": ([["q", "\x1b[2J\u202e", 0, False], ["k", "up", 0, False]], r"the layer '\\x1b\[2J\\u202e'"),
    "long": ([["q", "up" * 10**6, 0, False], ["k", "up", 0, False]], "no matrix for the layer 'upup"),
    "other width": ([["q", "qkv", 0, False], ["k", "up", 0, False]], "qkv/kernel: expected a layer of 4 inputs"),
    "part of a stack": ([["q", "layers.0.mlp", 0, False], ["k", "up", 0, False]], "is a stack of 3 layers"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_do_not_fit_the_tree(path, case):
    rows, match = ROWS[case]
    write(path, HALF, rows)
    refused(path, match)


def test_a_name_that_two_leaves_have(path):
    write(path, {"up": (2, 4, 6)})
    kernel = TREE["up"]["kernel"]
    refused(path, "up/kernel and up/weight both are the layer 'up'", {"up": {"kernel": kernel, "weight": kernel.T}})


def test_what_else_a_file_holds_is_said_briefly(path):
    write(path, {"up": (2, 4, 6)}, modules_to_save=json.dumps(["\x1b[2J", "a" * 10**6, *map(str, range(1000))]))
    with pytest.warns(UserWarning, match=r"holds \\x1b\[2J, aaa.* and 994 more, trained with θ_d; put") as caught:
        unilora_jax.load(TREE, path)
    assert len(str(caught[0].message)) < 600


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.uint8, np.complex64])
def test_leaves_that_hold_no_real_numbers(path, dtype):
    params = {"up": {"kernel": np.ones((4, 6), dtype)}}
    write(path, {"up": (2, 4, 6)})
    match = f"up/kernel: expected a floating-point weight, got {np.dtype(dtype).name}"
    with pytest.raises(TargetError, match=match):
        unilora_jax.load(params, path)
    with pytest.raises(TargetError, match=match):
        unilora_jax.plan(params, ["up"])
    adapter, theta_d = unilora_jax.load(TREE, path)
    with pytest.raises(TargetError, match=match):
        adapter.merge(params, theta_d)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def lines_of(action):
    """How many lines of this project's code run."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "unilora_" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def many(path, layers, blocks):
    """A tree of equal layers, and a file for so many blocks of each."""
    params = {f"l{i}": {"kernel": jnp.ones((4, 8))} for i in range(layers)}
    pairs = {f"l{i}.{b}": (1, 4, 8 // blocks) for i in range(layers) for b in range(blocks)}
    rows = [[name, name.partition(".")[0], int(name.partition(".")[2]) * 8 // blocks, False] for name in pairs]
    write(path, pairs, rows, d=8)
    return params


@pytest.mark.parametrize("blocks", [1, 4])
def test_loading_and_using_a_file_takes_lines_of_its_length(path, blocks):
    def work(layers):
        params = many(path, layers, blocks)

        def run():
            adapter, theta_d = unilora_jax.load(params, path, groups="cached")
            adapter.merge(params, theta_d)
            jax.make_jaxpr(adapter.wrap(lambda p, x: sum(x @ leaf["kernel"] for leaf in p.values())))(
                params, theta_d, jnp.ones((1, 4))
            )

        run()  # what JAX compiles once
        return lines_of(run) / layers

    few, more = work(4), work(32)
    assert more < 1.25 * few


def test_a_refusal_takes_lines_of_the_file_and_the_tree(path):
    def work(layers):
        params = many(path, layers, 4)
        del params[f"l{layers - 1}"]
        return lines_of(lambda: refused(path, f"no matrix for the layer 'l{layers - 1}'", params)) / layers

    few, more = work(16), work(256)
    assert more < 1.25 * few


def test_memory_is_bounded_by_the_file_and_the_tree(path):
    params = many(path, 64, 4)
    tracemalloc.start()
    unilora_jax.load(params, path)
    assert tracemalloc.get_traced_memory()[1] < 60 * path.stat().st_size
    tracemalloc.stop()


# ---- anything else --------------------------------------------------------------------------------------------------


VALUES = [None, True, 0, -1, 1.5, 2**63, 2**64, 10**30, "", "up", "\x1b[2J", "\ud800", "x" * 5000, [], {}, [[]], [None]]
TEXTS = ["", "nul", "NaN", "1e999", "[" * 50_000, "[" * 50_000 + "]" * 50_000, '{"a":1,"a":2}', "1" + "0" * 5000]


def places(value, where=()):
    """Every place in a JSON value."""
    yield where
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*where, key))


def mutated(rng, value):
    """The value with something else in one place, or less, or more of it."""
    value = copy.deepcopy(value)
    *above, last = rng.choice([place for place in places(value) if place])
    parent = value
    for key in above:
        parent = parent[key]
    change = rng.randrange(4)
    if change == 0 and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    elif change == 1:
        del parent[last]
    elif change == 2 and isinstance(parent[last], int):
        parent[last] += rng.choice([-1, 1, 7, 2**31])
    else:
        parent[last] = rng.choice(VALUES)
    return value


def test_mutated_headers_are_refused_clearly_or_mean_something(path):
    rng, accepted, said_of_it = random.Random(0), 0, []
    base = {"class": "X", "name": None, "embeddings": [[3, 4]], "values": "AAA="}
    rows = [["q", "up", 0, False], ["k", "up", 3, False], *([f"m{i}", f"layers.{i}.mlp", 0, False] for i in range(3))]
    pairs = {"q": (2, 4, 3), "k": (2, 4, 3)} | {f"m{i}": (2, 4, 4) for i in range(3)}
    said = {"targets": rows, "modules_to_save": ["head"], "labels": ["a"], "base": base, "base_arguments": {"seed": 3}}
    for _ in range(300):
        entries = {name: json.dumps(value) for name, value in said.items()}
        name = rng.choice([*said, "targets", "targets"])
        entries[name] = rng.choice(TEXTS) if rng.random() < 0.1 else json.dumps(mutated(rng, said[name]))
        write(path, pairs, d=16, **entries)
        try:
            with warnings.catch_warnings(action="ignore"):
                adapter, theta_d = unilora_jax.load(TREE, path)
        except UniLoraError as error:
            said_of_it.append(str(error))
        else:
            accepted += 1
            merged = adapter.merge(TREE, theta_d)
            assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), merged))
    assert 20 < accepted < 200
    assert all(len(message) < 2000 and message.replace("\n", "").isprintable() for message in said_of_it)


class Stranger:
    """A spec that says something else in a file, with a fingerprint that fits it."""

    def __init__(self, spec, said):
        layout = said.get("layout") if isinstance(said, dict) else None
        fingerprint = hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()
        self.spec, self.to_json, self.layout = spec, lambda: said, SimpleNamespace(fingerprint=fingerprint)

    def __getattr__(self, name):
        return getattr(self.spec, name)


@pytest.mark.parametrize("method", ["vera", "tied-lora", "lora-xs", "vb-lora", "fastfood", "gaussian"])
def test_mutated_files_of_other_methods_are_refused_clearly_or_mean_something(path, method):
    rng, accepted, said_of_it = random.Random(1), 0, []
    options = {"vera": {"rank": 3}, "vb-lora": {"vectors": 3, "length": 2}, "lora-xs": {"rank": 2}}.get(method, {})
    adapter = unilora_jax.plan(TREE, ["up", "mlp"], method=method, **options)
    adapter.save(path, adapter.init() + 0.1)
    file = unilora_core.read_adapter(path)
    said, rows = file.spec.to_json(), json.loads(file.metadata["targets"])
    layout = said.pop("layout")  # any change of which is refused
    for i in range(80):
        changed, entry = (mutated(rng, said), rows) if i % 2 else (said, mutated(rng, rows) if i else rows)
        spec = Stranger(file.spec, changed | {"layout": layout})
        metadata = file.metadata | {"targets": json.dumps(entry)}
        save_adapter(path, spec, file.theta_d, tensors=file.tensors, metadata=metadata)
        try:
            with warnings.catch_warnings(action="ignore"):
                adapter, theta_d = unilora_jax.load(TREE, path)
        except UniLoraError as error:
            said_of_it.append(str(error))
        else:
            accepted += 1
            adapter.chains.low_rank(theta_d)
    assert 1 <= accepted < 40  # the file as it was
    assert all(len(message) < 4001 and message.replace("\n", "").isprintable() for message in said_of_it)


def test_an_adapter_file_is_whole_before_it_is_believed(path):
    """A layout that was changed after training, with a checksum that fits it."""
    write(path, {"up": (2, 4, 6)})
    file = unilora_core.read_adapter(path)
    other = dataclasses.replace(file.spec, layout=Layout([("up.A", (3, 4)), ("up.B", (6, 3))]))
    save_adapter(path, other, file.theta_d, metadata=file.metadata)
    data = path.read_bytes().replace(other.layout.fingerprint.encode(), file.spec.layout.fingerprint.encode())
    path.write_bytes(data)
    with pytest.raises(UniLoraError, match="checksum"):
        unilora_jax.load(TREE, path)
