"""Convolutions and embeddings: equal to B·A added to the weights, and the same numbers as in PyTorch."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax import lax

import unilora_jax
import unilora_torch
from unilora_core import MismatchError, TargetError
from unilora_jax import Target, conv_target, embedding_target, find_targets

IMAGES = jax.random.normal(jax.random.key(1), (2, 9, 7, 4))
TOKENS = jnp.array([[3, 0, 8], [8, 8, 1]])
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) / 4


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def check(function, params, targets, x, start="paper"):
    """Compare the adapted model and its gradient with W + B·A; return the adapter."""
    adapter = unilora_jax.plan(params, targets, rank=3, start=start, **({"bound": 0.5} if start == "paper" else {}))

    def run(model):
        def loss(theta_d):
            output = model(params, theta_d, x)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.grad(loss, has_aux=True))

    low_rank, dense = run(adapter.wrap(function)), run(lambda *args: function(adapter.merge(params, args[1]), x))
    (found, output), (wanted, merged) = low_rank(adapter.init() + 0.1), dense(adapter.init() + 0.1)
    close(output, merged)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert not np.allclose(output, low_rank(jnp.zeros(adapter.spec.d))[1], atol=1e-3)
    return adapter


# ---- convolutions ---------------------------------------------------------------------------------------------------


CONVOLUTIONS = {
    "3x3": ((3, 3, 4, 6), {"window_strides": (1, 1), "padding": "SAME"}),
    "stride and padding": ((3, 2, 4, 6), {"window_strides": (2, 3), "padding": ((1, 0), (0, 2))}),
    "dilation": ((2, 2, 4, 6), {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)}),
    "transposed": ((3, 2, 4, 6), {"window_strides": (1, 1), "padding": ((2, 1), (1, 1)), "lhs_dilation": (2, 2)}),
    "groups": ((3, 3, 2, 6), {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}),
    "depthwise": ((3, 3, 1, 8), {"window_strides": (2, 1), "padding": "SAME", "feature_group_count": 4}),
    "1x1": ((1, 1, 4, 6), {"window_strides": (1, 1), "padding": "VALID"}),
    "one output": ((3, 1, 4, 1), {"window_strides": (1, 1), "padding": "SAME"}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_equals_the_merged_one(case):
    shape, how = CONVOLUTIONS[case]

    def function(params, x):
        return lax.conv_general_dilated(x, params["conv"]["kernel"], dimension_numbers=NHWC, **how)

    check(function, {"conv": {"kernel": normal(*shape)}}, ["conv"], IMAGES)


def test_the_identity_start():
    def function(params, x):
        x = lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)
        return jnp.tanh(x) @ params["embed"]["embedding"].T

    params = {"conv": {"kernel": normal(3, 3, 4, 6)}, "embed": {"embedding": normal(9, 6)}}
    adapter = check(function, params, ["conv", "embed"], IMAGES, "identity")
    np.testing.assert_array_equal(
        jax.jit(adapter.wrap(function))(params, adapter.init(), IMAGES), jax.jit(function)(params, IMAGES)
    )


def test_a_flipped_kernel():
    def function(params, x):
        return lax.conv_transpose(x, params["conv"]["kernel"], (2, 2), "SAME", transpose_kernel=True)

    check(function, {"conv": {"kernel": normal(3, 2, 6, 4)}}, [turned("conv/kernel", (3, 2, 6, 4))], IMAGES)


def turned(path, shape):
    """A kernel (*kernel, out, in)."""
    return unilora_jax.linear_target(path, jax.ShapeDtypeStruct(shape, jnp.float32), inputs=(3, 0, 1))


def test_a_stack_of_kernels_in_a_scan():
    def function(params, x):
        def layer(x, kernel):
            return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC), None

        return lax.scan(layer, x, params["blocks"]["conv"]["kernel"])[0]

    params = {"blocks": {"conv": {"kernel": normal(3, 3, 3, 4, 4)}}}
    adapter = check(function, params, ["conv"], IMAGES)
    assert adapter.targets[0].names == tuple(f"blocks.{i}.conv" for i in range(3))


def test_bfloat16_rounds_the_update_once():
    def function(params, x):
        return lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)

    params = {"conv": {"kernel": normal(3, 3, 4, 6).astype(jnp.bfloat16)}}
    adapter = unilora_jax.plan(params, ["conv"], rank=3, start="paper", bound=0.5)
    found = adapter.wrap(function)(params, adapter.init(), IMAGES.astype(jnp.bfloat16))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), adapter.wrap(function)(wide, adapter.init(), IMAGES), atol=0.06, rtol=0.03
    )


def test_many_adapters_by_vmap():
    def function(params, x):
        return lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)

    params = {"conv": {"kernel": normal(3, 3, 4, 6)}}
    adapter = unilora_jax.plan(params, ["conv"], rank=2)
    thetas = jnp.stack([adapter.init(), 2 * adapter.init(), -adapter.init()])
    each = [adapter.wrap(function)(params, theta_d, IMAGES) for theta_d in thetas]
    close(jax.vmap(adapter.wrap(function), (None, 0, None))(params, thetas, IMAGES), jnp.stack(each))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3,), name="one")(linen.Embed(9, 4, name="embed")(x))
        return linen.Dense(2, name="out")(x)


def test_linen():
    net = LinenNet()
    params = net.init(jax.random.key(0), TOKENS)
    targets = [
        conv_target("params/one/kernel", params["params"]["one"]["kernel"]),
        *find_targets(params, ["embed", "out"]),
    ]
    assert [target.table for target in targets] == [False, True, False]
    check(net.apply, params, targets, TOKENS)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(9, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (2,), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.up(self.conv(self.embed(x))))


def test_nnx_with_a_tied_head():
    graph, params = nnx.split(NNXNet())
    kernels = [conv_target(f"{name}/kernel", params[name]["kernel"][...]) for name in ("conv", "up")]
    check(lambda params, x: nnx.merge(graph, params)(x), params, [*find_targets(params, ["embed"]), *kernels], TOKENS)


class EquinoxNet(equinox.Module):
    embed: equinox.nn.Embedding
    conv: equinox.nn.Conv1d
    out: equinox.nn.Linear

    def __call__(self, x):
        x = jax.vmap(self.embed)(x)  # (tokens, 4)
        return jax.vmap(self.out)(self.conv(x.T).T)


def equinox_net():
    a, b, c = jax.random.split(jax.random.key(0), 3)
    return EquinoxNet(
        equinox.nn.Embedding(9, 4, key=a), equinox.nn.Conv1d(4, 6, 2, key=b), equinox.nn.Linear(6, 4, key=c)
    )


def test_equinox_says_what_its_modules_are():
    net = equinox_net()
    found = find_targets(net, ["embed", "conv", "out"])
    assert [(target.path, target.in_features, target.out_features, target.table) for target in found] == [
        ("embed/weight", 9, 4, True),
        ("conv/weight", 8, 6, False),
        ("out/weight", 6, 4, False),
    ]
    params, static = equinox.partition(net, equinox.is_array)
    check(lambda params, x: jax.vmap(equinox.combine(params, static))(x), params, found, TOKENS)
    assert [target.path for target in find_targets(net, "all-linear")] == ["out/weight"]


# ---- embeddings -----------------------------------------------------------------------------------------------------


TABLE = {"embed": {"embedding": normal(9, 5)}}
LOOKUPS = {
    "rows": lambda params, x: params["embed"]["embedding"][x],
    "take": lambda params, x: jnp.take(params["embed"]["embedding"], x, axis=0),
    "one by one": lambda params, x: jax.vmap(jax.vmap(lambda i: params["embed"]["embedding"][i]))(x),
    "clipped": lambda params, x: params["embed"]["embedding"].at[x + 4].get(mode="clip"),
    "filled": lambda params, x: params["embed"]["embedding"].at[x + 4].get(mode="fill", fill_value=7.0),
    "transposed": lambda params, x: params["embed"]["embedding"].T[:, x],
    "scaled": lambda params, x: 2.0 * params["embed"]["embedding"][x].swapaxes(0, 1),
    "one-hot": lambda params, x: jax.nn.one_hot(x, 9) @ params["embed"]["embedding"],
    "tied": lambda params, x: params["embed"]["embedding"][x] @ params["embed"]["embedding"].T,
    "tied, the head first": lambda params, x: (
        jnp.einsum("vd,btd->btv", params["embed"]["embedding"], jnp.ones((2, 3, 5))) @ params["embed"]["embedding"]
    ),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_a_lookup_equals_the_merged_one(case):
    adapter = check(LOOKUPS[case], TABLE, ["embed"], TOKENS)
    assert adapter.targets == (Target("embed/embedding", ("embed",), ("embed",), 9, 5, (0,), table=True),)


def test_no_table_of_updates_is_made():
    params = {"embed": {"embedding": jax.ShapeDtypeStruct((5_000, 64), jnp.float32)}}
    adapter = unilora_jax.plan(params, ["embed"], rank=2)
    theta_d = jax.ShapeDtypeStruct((adapter.spec.d,), jnp.float32)

    def loss(params, theta_d, x):
        return adapter.wrap(LOOKUPS["rows"])(params, theta_d, x).sum()

    text = jax.jit(jax.grad(loss, 1)).lower(params, theta_d, TOKENS).as_text()
    assert text.count("tensor<5000x64xf32>") <= 2  # the argument, and its row lookup


def test_a_square_weight_that_is_a_table_is_told_from_a_matrix():
    params = {"embed": {"weight": normal(6, 6)}}

    def function(params, x):
        return params["embed"]["weight"][x]

    linear = unilora_jax.plan(params, ["embed"], rank=2)
    with pytest.raises(
        TargetError, match=r"^embed/weight: the plan takes the axes \[1\].*looks up \[0\].*embedding_target"
    ):
        linear.wrap(function)(params, linear.init(), TOKENS[:1])
    check(function, params, [embedding_target("embed/weight", params["embed"]["weight"])], TOKENS % 6)


# ---- the same file in PyTorch ---------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.conv = torch.nn.Conv1d(4, 6, 2)
        self.patch = torch.nn.Conv2d(1, 5, (3, 2))

    def forward(self, x):
        x = self.conv(self.embed(x).mT)
        return self.patch(x[:, None])


def in_jax(net):
    """The parameters of the net as Flax keeps them, and its function."""
    weights = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    params = {
        "embed": {"embedding": weights["embed.weight"]},
        "conv": {"kernel": weights["conv.weight"].transpose(2, 1, 0), "bias": weights["conv.bias"]},
        "patch": {"kernel": weights["patch.weight"].transpose(2, 3, 1, 0), "bias": weights["patch.bias"]},
    }

    def function(params, x):
        x = params["embed"]["embedding"][x]
        x = lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = (x + params["conv"]["bias"]).swapaxes(1, 2)[..., None]
        x = lax.conv_general_dilated(x, params["patch"]["kernel"], (1, 1), "VALID", dimension_numbers=NHWC)
        return (x + params["patch"]["bias"]).transpose(0, 3, 1, 2)

    return jax.tree.map(jnp.asarray, params), function


def test_a_file_of_pytorch_gives_the_same_model(path):
    net, tokens = Net(), np.random.default_rng(0).integers(0, 9, (2, 8))
    params, function = in_jax(net)
    with torch.no_grad():
        adapter = unilora_torch.attach(net, ["embed", "conv", "patch"], rank=2, start="paper", bound=0.5)
        wanted = net(torch.from_numpy(tokens)).numpy()
        adapter.save(path)
        adapter.detach()
        assert not np.allclose(net(torch.from_numpy(tokens)).numpy(), wanted, atol=1e-3)
    loaded, theta_d = unilora_jax.load(params, path)
    assert {target.path: target.inputs for target in loaded.targets} == {
        "embed/embedding": (0,),
        "conv/kernel": (1, 0),
        "patch/kernel": (2, 0, 1),
    }
    close(jax.jit(loaded.wrap(function))(params, theta_d, tokens), wanted)


def test_a_file_of_jax_gives_the_same_model(path):
    net, tokens = Net(), np.random.default_rng(0).integers(0, 9, (2, 8))
    params, function = in_jax(net)
    targets = [
        *find_targets(params, ["embed", "patch"]),
        conv_target("conv/kernel", params["conv"]["kernel"]),
    ]
    adapter = unilora_jax.plan(params, targets, rank=2, start="paper", bound=0.5)
    adapter.save(path, adapter.init())
    unilora_torch.load(net, path)
    with torch.no_grad():
        close(adapter.wrap(function)(params, adapter.init(), tokens), net(torch.from_numpy(tokens)).numpy())


def test_a_file_of_another_kernel_is_refused(path):
    params, _ = in_jax(Net())
    adapter = unilora_jax.plan(params, ["patch"], rank=2)
    adapter.save(path, adapter.init())
    params["patch"]["kernel"] = jnp.ones((3, 3, 1, 5))
    with pytest.raises(MismatchError, match=r"patch/kernel: expected a layer of 6 inputs .* the tree has 9 and 5"):
        unilora_jax.load(params, path)
