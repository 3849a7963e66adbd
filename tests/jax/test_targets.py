"""Which leaves are adapted: paths of every kind of tree, patterns, stacks, and the axes that a model contracts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_jax
from unilora_core import TargetError
from unilora_jax import Target, find_targets, linear_target
from unilora_jax.targets import leaves_of


def ones(*shape):
    return np.ones(shape, np.float32)


LAYER = {"q_proj": {"kernel": ones(4, 6), "bias": ones(6)}, "o_proj": {"kernel": ones(6, 4)}}
TREE = {"layers": [LAYER, LAYER], "embed": {"embedding": ones(9, 4)}, "head": {"kernel": ones(4, 9)}}


def paths(*args, **kwargs):
    return [target.path for target in find_targets(*args, **kwargs)]


# ---- the paths of a tree --------------------------------------------------------------------------------------------


def test_paths_of_containers():
    found = leaves_of({"a": [ones(1), (ones(2), {"b": ones(3)})], "c": None, "d": {0: ones(4)}, "value": ones(5)})
    assert list(found) == ["a/0", "a/1/0", "a/1/1/b", "d/0", "value"]
    assert [leaf.size for leaf in found.values()] == [1, 2, 3, 4, 5]


def test_paths_are_in_the_order_of_the_leaves():
    found = leaves_of(TREE)
    assert all(a is b for a, b in zip(found.values(), jax.tree.leaves(TREE), strict=True))
    assert list(found)[:3] == ["embed/embedding", "head/kernel", "layers/0/o_proj/kernel"]


def nnx_model():
    nnx = pytest.importorskip("flax.nnx", reason="this test needs flax")

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
            self.value = nnx.Linear(2, 3, rngs=rngs)

    return nnx, Model()


def test_paths_of_nnx():
    nnx, model = nnx_model()
    wanted = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "value/bias", "value/kernel"]
    for tree in (model, nnx.state(model), nnx.split(model)[1], nnx.to_pure_dict(nnx.state(model))):
        assert sorted(leaves_of(tree)) == wanted


def test_paths_of_equinox():
    eqx = pytest.importorskip("equinox", reason="this test needs equinox")

    class Pair(eqx.Module):
        value: jax.Array
        bias: jax.Array

    class Model(eqx.Module):
        layers: list
        value: eqx.nn.Linear
        pair: Pair
        name: str = eqx.field(static=True)

    linear = eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(0))
    model = Model([linear, linear], linear, Pair(ones(2, 2), ones(2)), "static")
    wanted = ["layers/0/weight", "layers/1/weight", "value/weight", "pair/value", "pair/bias"]
    assert list(leaves_of(model)) == wanted
    assert [target.names for target in find_targets(model, ["value"])] == [("value",), ("pair.value",)]


def test_paths_of_linen_boxes():
    linen = pytest.importorskip("flax.linen", reason="this test needs flax")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), ("data", "model"))
            return linen.Dense(3, kernel_init=init, name="value")(x)

    boxed = jax.eval_shape(Model().init, jax.random.key(0), ones(1, 2))["params"]
    assert isinstance(boxed["value"]["kernel"], linen.Partitioned)
    assert list(leaves_of(boxed)) == list(leaves_of(linen.unbox(boxed))) == ["value/bias", "value/kernel"]
    assert find_targets(boxed, ["value"]) == find_targets(linen.unbox(boxed), ["value"])


def test_shapes_are_enough_to_plan():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    adapter, wanted = (unilora_jax.plan(tree, ["q_proj"]) for tree in (shapes, TREE))
    assert (adapter.targets, adapter.spec, adapter.shapes) == (wanted.targets, wanted.spec, wanted.shapes)


# ---- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (".*/(q|o)_proj/kernel", ["layers/0/o_proj", "layers/0/q_proj", "layers/1/o_proj", "layers/1/q_proj"]),
        ("layers/1/.*kernel", ["layers/1/o_proj", "layers/1/q_proj"]),
        (["q_proj"], ["layers/0/q_proj", "layers/1/q_proj"]),
        (["q_proj/kernel", "head"], ["head", "layers/0/q_proj", "layers/1/q_proj"]),
        (["0/q_proj"], ["layers/0/q_proj"]),
        (["layers.0.q_proj"], ["layers/0/q_proj"]),
        (iter(["layers/0/o_proj"]), ["layers/0/o_proj"]),
    ],
)
def test_a_regular_expression_matches_whole_paths_and_a_list_their_ends(pattern, wanted):
    assert paths(TREE, pattern) == [f"{path}/kernel" for path in wanted]


@pytest.mark.parametrize("pattern", ["q_proj", "q_proj/kernel", "layers/0", ["proj"], ["layers/0"], ["kernels"]])
def test_a_part_of_a_path_is_no_match(pattern):
    with pytest.raises(TargetError, match="no leaf matches"):
        find_targets(TREE, pattern)


@pytest.mark.parametrize("exclude", [".*/1/.*", ["layers/1/q_proj", "layers.1.o_proj.kernel"]])
def test_exclude(exclude):
    assert paths(TREE, ["q_proj", "o_proj"], exclude=exclude) == ["layers/0/o_proj/kernel", "layers/0/q_proj/kernel"]
    targets = unilora_jax.plan(TREE, ["q_proj", "o_proj"], exclude=exclude).targets
    assert [target.names for target in targets] == [("layers.0.o_proj",), ("layers.0.q_proj",)]


def test_a_list_of_targets_is_taken_as_it_is():
    targets = find_targets(TREE, ["head", "layers.1.q_proj"])[::-1]
    assert find_targets(TREE, targets) == targets
    assert unilora_jax.plan(TREE, list(targets)).targets == targets


# ---- all-linear -----------------------------------------------------------------------------------------------------


def test_all_linear_of_dictionaries():
    block = {
        "ln_1": {"weight": ones(4, 4)},
        "attn": {"query": {"kernel": ones(4, 2, 3)}, "out": {"kernel": ones(2, 3, 4), "bias": ones(4)}},
        "mlp": {"up": {"kernel": ones(4, 8)}, "norm_of_mlp": {"kernel": ones(8, 8)}},
        "conv": {"kernel": ones(3, 4, 4)},
        "gate": ones(4, 4),
    }
    stack = {"q": {"kernel": ones(2, 4, 6)}, "query": {"kernel": ones(2, 4, 2, 3)}, "norm": {"scale": ones(2, 4)}}
    tree = {
        "embed_tokens": {"weight": ones(9, 4)},
        "wte": {"kernel": ones(9, 4)},
        "tokens": {"embedding": ones(9, 4)},
        "blocks": [block],
        "layers": stack,
        "LayerNorm_0": {"weight": ones(4, 4)},
        "patch": {"kernel": ones(3, 3, 4, 6)},
        "pooler": {"kernel": ones(4, 4)},
        "lm_head": {"kernel": ones(4, 9)},
        "classifier": {"kernel": ones(4, 9)},
    }
    inside = [f"blocks/0/{name}/kernel" for name in ("attn/out", "attn/query", "mlp/up")]
    wanted = [*inside, "layers/q/kernel", "layers/query/kernel", "pooler/kernel"]
    assert paths(tree, "all-linear") == wanted
    assert [target.path for target in unilora_jax.plan(tree).targets] == wanted  # the default
    assert paths(tree, "all-linear", exclude=["pooler", "attn/out"]) == [*inside[1:], *wanted[3:5]]
    assert paths(tree, "all-linear", exclude=iter(["pooler"])) == wanted[:-1]


def test_all_linear_of_linen():
    linen = pytest.importorskip("flax.linen", reason="this test needs flax")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.LayerNorm()(linen.Embed(9, 4)(tokens))
            x = linen.MultiHeadDotProductAttention(2)(x)
            return linen.Dense(9, name="head")(linen.Dense(6)(linen.Conv(5, (3,))(x)))

    params = jax.eval_shape(Model().init, jax.random.key(0), np.ones((1, 7), int))["params"]
    attention = [f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("key", "out", "query", "value")]
    assert sorted(paths(params, "all-linear")) == ["Dense_0/kernel", *attention]


def test_all_linear_of_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="this test needs flax")

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed, self.norm = nnx.Embed(9, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Conv(4, 4, (3,), rngs=rngs)])
            self.head = nnx.Linear(4, 9, rngs=rngs)

    for tree in (Model(), nnx.state(Model())):
        assert paths(tree, "all-linear") == ["layers/0/kernel"]


def test_all_linear_of_equinox():
    """Modules say what they are, whatever they are called."""
    eqx = pytest.importorskip("equinox", reason="this test needs equinox")

    class Model(eqx.Module):
        table: eqx.nn.Embedding
        scaling: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        layers: list
        lm_head: eqx.nn.Linear

    keys = jax.random.split(jax.random.key(0), 5)
    attention = eqx.nn.MultiheadAttention(2, 4, key=keys[0])
    layers = [eqx.nn.Linear(4, 6, key=keys[1]), eqx.nn.Conv1d(4, 4, 3, key=keys[2])]
    head = eqx.nn.Linear(4, 9, key=keys[3])
    model = Model(eqx.nn.Embedding(9, 4, key=keys[4]), eqx.nn.LayerNorm((4, 4)), attention, layers, head)
    projections = [f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")]
    wanted = [*projections, "layers/0/weight"]
    assert paths(model, "all-linear") == wanted
    assert paths(eqx.filter(model, eqx.is_array), "all-linear") == wanted


def test_all_linear_skips_nothing_silently():
    with pytest.raises(TargetError, match=r"^codes/kernel: expected a floating-point weight, got int8"):
        find_targets({"codes": {"kernel": np.ones((4, 4), np.int8)}, "a": {"kernel": ones(4, 4)}}, "all-linear")
    with pytest.raises(TargetError, match=r"no leaf matches 'all-linear'; the nearest paths are \['a/w'\]"):
        find_targets({"a": {"w": ones(4, 4)}}, "all-linear")


# ---- orientation ----------------------------------------------------------------------------------------------------


def test_a_kernel_is_in_out_and_a_weight_out_in():
    assert linear_target("a/kernel", ones(4, 6)) == Target("a/kernel", ("a",), ("a",), 4, 6, (0,))
    assert linear_target("a/weight", ones(4, 6)) == Target("a/weight", ("a",), ("a",), 6, 4, (1,))
    assert linear_target("a/w", ones(4, 6)) == Target("a/w", ("a.w",), ("a.w",), 4, 6, (0,))
    assert linear_target("kernel", ones(4, 6)).names == ("kernel",)


@pytest.mark.parametrize(
    ("path", "shape", "inputs", "wanted"),
    [
        ("a/kernel", (3, 4, 5), 1, (3, 20, (0,))),
        ("a/kernel", (3, 4, 5), 2, (12, 5, (0, 1))),
        ("a/weight", (3, 4, 5), 1, (5, 12, (2,))),
        ("a/weight", (3, 4, 5), 2, (20, 3, (1, 2))),
        ("a/kernel", (2, 3, 4, 5), 2, (6, 20, (0, 1))),
        ("layers/kernel", (2, 3, 4, 5), 2, (12, 5, (1, 2))),
        ("out/kernel", (2, 3, 4), None, (6, 4, (0, 1))),
        ("query/kernel", (2, 3, 4), None, (2, 12, (0,))),
        ("layers/out/kernel", (7, 2, 3, 4), None, (6, 4, (1, 2))),
        ("layers/0/key/kernel", (2, 3, 4), None, (2, 12, (0,))),
    ],
)
def test_how_many_axes_the_model_contracts(path, shape, inputs, wanted):
    target = linear_target(path, ones(*shape), inputs=inputs)
    assert (target.in_features, target.out_features, target.inputs) == wanted
    assert target.stacked == path.startswith(("layers/kernel", "layers/out"))


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(TargetError, match=r"^a/kernel: two leaves of the tree have this path; rename one of them"):
        find_targets({"a/kernel": ones(2, 3), "a": {"kernel": ones(2, 3)}}, "a/kernel")


@pytest.mark.parametrize("inputs", [3, -1])
def test_as_many_inputs_as_axes_leave_no_outputs(inputs):
    with pytest.raises(TargetError, match=r"^a/kernel: expected a matrix.*got shape \(3, 4, 5\)"):
        linear_target("a/kernel", ones(3, 4, 5), inputs=inputs)


@pytest.mark.parametrize(
    ("path", "shape", "product"),
    [("a/kernel", (4, 6), "bi,io->bo"), ("a/weight", (6, 4), "bi,oi->bo"), ("a/kernel", (2, 2, 6), "bij,ijo->bo")],
)
def test_what_is_adapted_is_what_is_merged(path, shape, product):
    """B·A (out, in), written by hand into the axes of the leaf."""
    rng = np.random.default_rng(0)
    params = {"a": {path[2:]: rng.normal(size=shape).astype(np.float32)}}
    target = linear_target(path, params["a"][path[2:]], inputs=len(shape) - 1)
    adapter = unilora_jax.plan(params, [target], d=12, start="paper", bound=2.0)
    theta_d = adapter.init()
    A, B = (adapter.factors(theta_d)[f"a.{letter}"] for letter in "AB")
    update = np.asarray(B @ A) if path == "a/weight" else np.asarray(A.T @ B.T).reshape(shape)
    merged = adapter.merge(params, theta_d)["a"][path[2:]]
    np.testing.assert_allclose(merged, params["a"][path[2:]] + update, rtol=1e-5, atol=1e-6)
    x = ones(3, *shape[:-1]) if path == "a/kernel" else ones(3, shape[1])
    found = adapter.wrap(lambda params, x: jnp.einsum(product, x, params["a"][path[2:]]))(params, theta_d, x)
    np.testing.assert_allclose(found, jnp.einsum(product, x, merged), rtol=1e-5, atol=1e-5)
    assert np.abs(update).max() > 0.1


# ---- stacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("layers/mlp/up/kernel", ("layers.0.mlp.up", "layers.1.mlp.up")),
        ("blocks/kernel", ("blocks.0", "blocks.1")),
        ("model/h/w", ("model.h.0.w", "model.h.1.w")),
        ("stacked/q/kernel", ("stacked.0.q", "stacked.1.q")),
        ("decoder/layers", ("decoder.layers.0", "decoder.layers.1")),
        ("encoder/mlp/kernel", ("encoder.mlp.0", "encoder.mlp.1")),
        ("layers/3/mlp/kernel", ("layers.3.mlp.0", "layers.3.mlp.1")),
    ],
)
def test_three_axes_are_a_stack_whose_number_follows_the_subtree(path, names):
    target = linear_target(path, ones(2, 4, 6))
    assert target == Target(path, names, names, 4, 6, (1,), stacked=True)


def test_a_weight_may_be_stacked_too():
    target = linear_target("layers/q/weight", ones(2, 4, 6))
    assert (target.in_features, target.out_features, target.inputs) == (6, 4, (2,))


def test_a_stack_elsewhere():
    tree = {"encoder": {"mlp": {"kernel": ones(2, 4, 6)}, "query": {"kernel": ones(2, 4, 2, 3)}}}
    (mlp, query) = find_targets(tree, ["mlp", "query"], stacked="encoder")
    assert mlp.names == ("encoder.0.mlp", "encoder.1.mlp")
    assert (query.names, query.inputs) == (("encoder.0.query", "encoder.1.query"), (1,))
    assert unilora_jax.plan(tree, ["mlp"], stacked="enc.*").targets == (mlp,)
    with pytest.raises(TargetError, match=r"^encoder/query/kernel: expected a matrix.*got shape \(2, 4, 2, 3\)"):
        find_targets(tree, ["query"])


def test_a_list_of_layers_is_no_stack():
    assert [target.stacked for target in find_targets(TREE, ["q_proj"])] == [False, False]
    assert [target.names for target in find_targets(TREE, ["q_proj"])] == [("layers.0.q_proj",), ("layers.1.q_proj",)]


def test_a_stack_has_the_factors_of_its_layers():
    """Layer by layer, the same as the same layers unstacked."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 4, 6)).astype(np.float32)
    stack, separate = {"layers": {"q": {"kernel": kernels}}}, {"layers": [{"q": {"kernel": k}} for k in kernels]}
    options = {"d": 20, "start": "paper", "bound": 0.5}
    one, other = (unilora_jax.plan(tree, ["q"], **options) for tree in (stack, separate))
    assert one.spec == other.spec
    theta_d = one.init()
    factors = one.factors(theta_d)
    assert list(factors) == [f"layers.{i}.q.{letter}" for i in range(3) for letter in "AB"]
    for name, factor in other.factors(theta_d).items():
        assert np.array_equal(factors[name], factor)
    merged, wanted = one.merge(stack, theta_d), other.merge(separate, theta_d)
    wanted = np.stack([layer["q"]["kernel"] for layer in wanted["layers"]])
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], wanted, rtol=1e-6, atol=1e-6)


# ---- Flax's attention -----------------------------------------------------------------------------------------------


HEADS = {
    "query": ((0,), 4, 8),
    "key": ((0,), 4, 8),
    "value": ((0,), 4, 8),
    "out": ((0, 1), 8, 5),
}


def assert_heads_are_adapted(apply, params, x):
    adapter = unilora_jax.plan(params, list(HEADS), rank=2, d=20, start="paper", bound=0.5, grouping="numpy-shuffle")
    found = {
        target.path.split("/")[-2]: (target.inputs, target.in_features, target.out_features)
        for target in adapter.targets
    }
    assert found == HEADS
    theta_d, run = adapter.init(), jax.jit(apply)
    adapted, merged = jax.jit(adapter.wrap(apply))(params, theta_d, x), run(adapter.merge(params, theta_d), x)
    np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - run(params, x)).max() > 1e-2


def test_the_attention_of_linen():
    linen = pytest.importorskip("flax.linen", reason="this test needs flax")
    module = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=5)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert_heads_are_adapted(lambda params, x: module.apply({"params": params}, x), params, x)


def test_the_attention_of_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="this test needs flax")
    model = nnx.MultiHeadAttention(2, 4, 8, 5, decode=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert_heads_are_adapted(lambda params, x: nnx.merge(graph, params)(x), params, x)


# ---- targets written by hand ----------------------------------------------------------------------------------------


def test_blocks_of_the_outputs():
    params = {"qkv": {"kernel": ones(4, 9)}, "up": {"kernel": ones(4, 3)}}
    whole = linear_target("qkv/kernel", params["qkv"]["kernel"])
    q, v = (
        dataclasses.replace(whole, names=(f"qkv.{name}",), out_features=3, first_row=row)
        for name, row in (("q", 0), ("v", 6))
    )
    adapter = unilora_jax.plan(params, [v, q], d=10, start="paper", bound=0.5)
    theta_d = adapter.init()
    factors = {name: np.asarray(factor) for name, factor in adapter.factors(theta_d).items()}
    assert set(factors) == {"qkv.q.A", "qkv.q.B", "qkv.v.A", "qkv.v.B"}
    update = adapter.merge(params, theta_d)["qkv"]["kernel"] - params["qkv"]["kernel"]
    wanted = np.zeros((4, 9), np.float32)
    wanted[:, :3] = (factors["qkv.q.B"] @ factors["qkv.q.A"]).T
    wanted[:, 6:] = (factors["qkv.v.B"] @ factors["qkv.v.A"]).T
    np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-6)
