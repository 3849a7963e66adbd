"""The low-rank path: equal to B·A added to the weights, through whatever a model does with a weight."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unilora_jax
from unilora_core import TargetError

IN, OUT, LAYERS = 12, 20, 3


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype) / shape[-1] ** 0.5


X = normal(5, IN, seed=9)
MATRIX = {"kernel": normal(IN, OUT)}
WEIGHT = {"weight": normal(OUT, IN)}
STACK = {"layers": {"kernel": normal(LAYERS, IN, IN)}}
FUSED = {"qkv": {"kernel": normal(IN, 3 * OUT)}}


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]


def reversed_scan(params, x):
    """The weights as constants and as slices, two outputs."""
    w = params["layers"]["kernel"]
    carry, ys = lax.scan(lambda x, i: (x + x @ w[0], x @ w[i]), x, jnp.arange(LAYERS), reverse=True, unroll=2)
    return carry + ys.sum(0)


def by_layer(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ params["layers"]["kernel"][i])
    return x


def heads(params, x):
    return jnp.einsum("ti,ihd->thd", x, params["kernel"].reshape(IN, 4, OUT // 4)).reshape(5, OUT)


def chosen(params, x):
    return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -x @ w, params["kernel"])


def looped(params, x):
    return lax.fori_loop(0, 3, lambda _, y: y + x @ params["kernel"], jnp.zeros((5, OUT)))


def split_fused(params, x):
    """Slices of a fused kernel, the middle one by a traced start."""
    w = params["qkv"]["kernel"]
    middle = lax.dynamic_slice(w, (0, jnp.asarray(x.shape[0] * 4)), (IN, OUT))
    return x @ w[:, :OUT] + x @ middle + x @ w[:, 2 * OUT :]


def split_unevenly(params, x):
    """Parts of several sizes, one of which no product reads."""
    q, _, v = jnp.split(params["qkv"]["kernel"], [OUT, OUT + 4], axis=1)
    return x @ q + (x @ v)[:, :OUT]


def split_inputs(params, x):
    first, second = jnp.split(params["kernel"], [4])
    return x[:, :4] @ first + x[:, 4:] @ second


def unstacked(params, x):
    """JAX 0.12 iterates over an array by `unstack`, too."""
    for w in jnp.unstack(params["layers"]["kernel"]):
        x = jnp.tanh(x @ w)
    for w in params["layers"]["kernel"]:
        x = jnp.tanh(x @ w)
    return x


def split_layers(params, x):
    for w in jnp.split(params["layers"]["kernel"], LAYERS):
        x = jnp.tanh(x @ w[0])
    return x


MODELS = {
    "x @ W": (MATRIX, lambda p, x: x @ p["kernel"]),
    "W.T @ x.T": (MATRIX, lambda p, x: p["kernel"].T @ x.T),
    "x @ W.T": (WEIGHT, lambda p, x: x @ p["weight"].T),
    "vmap of W @ x": (WEIGHT, lambda p, x: jax.vmap(lambda v: p["weight"] @ v)(x)),
    "nested jit": (MATRIX, lambda p, x: jax.jit(jnp.dot)(x, p["kernel"])),
    "heads by reshape": (MATRIX, heads),
    "new axis": (MATRIX, lambda p, x: jnp.matmul(x[None], p["kernel"][None])[0]),
    "strided slice": (MATRIX, lambda p, x: x[:, ::2] @ p["kernel"][::2, 1::3]),
    "in two halves": (MATRIX, lambda p, x: x[:, :4] @ p["kernel"][:4] + x[:, 4:] @ p["kernel"][4:]),
    "fused": (FUSED, split_fused),
    "split": (FUSED, lambda p, x: sum(x @ w for w in jnp.split(p["qkv"]["kernel"], 3, axis=1))),
    "split unevenly": (FUSED, split_unevenly),
    "split of the inputs": (MATRIX, split_inputs),
    "split of the layers": (STACK, split_layers),
    "unstack": (STACK, unstacked),
    "float16 and back": (MATRIX, lambda p, x: x @ p["kernel"].astype(jnp.float16).astype(jnp.float32)),
    "cond": (MATRIX, chosen),
    "fori_loop": (MATRIX, looped),
    "scan": (STACK, scanned),
    "layer by layer": (STACK, by_layer),
    "scan with constants": (STACK, reversed_scan),
    "vmap over layers": (STACK, lambda p, x: jax.vmap(lambda w: x @ w)(p["layers"]["kernel"])),
    "vmap over layers, W first": (STACK, lambda p, x: jax.vmap(lambda w: w.T @ x.T)(p["layers"]["kernel"])),
}


def planned(params, rank=3, d=40, groups="cached", **kwargs):
    """Cached groups, so that no kernel is compiled: test_factors.py shows that computed ones are the same."""
    adapter = unilora_jax.plan(params, ".*(kernel|weight)", rank=rank, d=d, bound=1.0, groups=groups, **kwargs)
    return adapter, adapter.init() + normal(d, seed=3)


@pytest.mark.parametrize("name", MODELS)
def test_wrap_equals_merge(name, start):
    params, model = MODELS[name]
    adapter, theta_d = planned(params, start=start)

    @functools.partial(jax.jit, static_argnums=1)
    def both(params, merged, theta_d, x):
        def loss(theta_d):
            if merged:
                y = model(adapter.merge(params, theta_d), x)
            else:
                y = adapter.wrap(model)(params, theta_d, x)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(theta_d)

    (_, ours), gradient = both(params, False, theta_d, X)
    (_, expected), expected_gradient = both(params, True, theta_d, X)
    base = model(params, X)
    tolerance = 3e-3 if "float16" in name else 1e-5
    assert abs(expected - base).max() > 0.05
    assert ours.dtype == base.dtype
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=10 * tolerance, atol=10 * tolerance)
    if start == "identity":
        (_, unmoved), _ = both(params, False, adapter.init(), X)
        np.testing.assert_allclose(unmoved, base, rtol=1e-6, atol=1e-6)


def rematerialised(params, x):
    body = jax.checkpoint(lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.nothing_saveable)
    return lax.scan(lambda x, w: (body(x, w), None), x, params["layers"]["kernel"])[0]


def test_rematerialised_scan_equals_scan():
    adapter, theta_d = planned(STACK)
    gradients, programs = [], []
    for model in (scanned, rematerialised):
        gradient = jax.grad(lambda t, model=model: (adapter.wrap(model)(STACK, t, X) ** 2).sum())
        gradients.append(jax.jit(gradient)(theta_d))
        programs.append(str(jax.make_jaxpr(gradient)(theta_d)))
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)
    assert "remat2" in programs[1]
    assert "remat2" not in programs[0]


@pytest.mark.parametrize("name", ["x @ W", "layer by layer"])
def test_the_identity_start_is_the_base_bit_for_bit(name):
    params, model = MODELS[name]
    adapter, _ = planned(params)
    assert (adapter.wrap(model)(params, adapter.init(), X) == model(params, X)).all()


def shapes_made(jaxpr):
    """The shapes of all intermediate results, in nested programs too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from shapes_made(getattr(inner, "jaxpr", inner))


def test_no_dense_update_and_no_gradient_of_the_weight_is_made():
    adapter, theta_d = planned(MATRIX)

    def shapes(adapted):
        return list(shapes_made(jax.make_jaxpr(jax.grad(lambda t: (adapted(t) ** 2).sum()))(theta_d).jaxpr))

    dense = {(IN, OUT), (OUT, IN)}
    assert not dense & set(shapes(lambda t: adapter.wrap(lambda p, x: x @ p["kernel"])(MATRIX, t, X)))
    assert dense & set(shapes(lambda t: X @ adapter.merge(MATRIX, t)["kernel"]))  # the test can see one


def test_bfloat16_rounds_the_factors_last():
    params = {"kernel": MATRIX["kernel"].astype(jnp.bfloat16)}
    adapter, theta_d = planned(params)
    x = X.astype(jnp.bfloat16)
    factors = adapter.factors(theta_d)
    assert {factor.dtype for factor in factors.values()} == {jnp.dtype("float32")}
    A, B = factors.values()
    ours = adapter.wrap(lambda p, x: x @ p["kernel"])(params, theta_d, x)
    assert ours.dtype == jnp.bfloat16
    assert (ours == x @ params["kernel"] + (x @ A.T.astype(x.dtype)) @ B.T.astype(x.dtype)).all()
    merged = adapter.merge(params, theta_d)["kernel"]
    exact = (params["kernel"].astype(jnp.float32) + (B @ A).T).astype(jnp.bfloat16)  # rounded once
    assert merged.dtype == jnp.bfloat16
    assert (merged == exact).mean() > 0.99


def test_integer_inputs_do_not_make_integer_factors():
    adapter, theta_d = planned(MATRIX)
    x = jnp.arange(5 * IN, dtype=jnp.int8).reshape(5, IN)
    numbers = (((1,), (0,)), ((), ()))

    def model(params, x):
        return lax.dot_general(x, params["kernel"], numbers, preferred_element_type=jnp.float32)

    ours, expected = adapter.wrap(model)(MATRIX, theta_d, x), model(adapter.merge(MATRIX, theta_d), x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)


def test_many_adapters_in_one_call():
    adapter, _ = planned(STACK)
    thetas = normal(6, 40, seed=4)
    xs = normal(6, 5, IN, seed=5)
    f = adapter.wrap(scanned)
    together = jax.jit(jax.vmap(f, in_axes=(None, 0, 0)))(STACK, thetas, xs)
    for i in range(6):
        np.testing.assert_allclose(together[i], f(STACK, thetas[i], xs[i]), rtol=1e-5, atol=1e-6)
    made = set(shapes_made(jax.make_jaxpr(jax.vmap(f, in_axes=(None, 0, 0)))(STACK, thetas, xs).jaxpr))
    assert not any(shape[:1] == (6,) and shape[-2:] == (IN, IN) for shape in made)  # one base for all


def test_training_by_gradient_moves_towards_the_target():
    adapter, _ = planned(STACK, d=100)
    target = normal(5, IN, seed=7)
    f = adapter.wrap(scanned)
    step = jax.jit(jax.value_and_grad(lambda t: ((f(STACK, t, X) - target) ** 2).mean()))
    theta_d, losses = adapter.init(), []
    for _ in range(30):
        loss, gradient = step(theta_d)
        theta_d = theta_d - 2.0 * gradient
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_a_hundred_steps_compile_once():
    """Also when the adapter is planned anew each time: equal plans are one static argument."""
    traces = []

    @jax.jit
    def step(adapter, params, theta_d, x):
        traces.append(1)
        return theta_d - 0.01 * jax.grad(lambda t: adapter.wrap(scanned)(params, t, x).sum())(theta_d)

    adapter, theta_d = planned(STACK)
    for i in range(100):
        again = planned(STACK)[0] if i % 25 == 0 else adapter
        theta_d = step(again, STACK, theta_d, X)
    assert len(traces) == 1
    assert jnp.isfinite(theta_d).all()


def test_nothing_is_promoted_by_guess():
    adapter, theta_d = planned(STACK)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        gradient = jax.jit(jax.grad(lambda t: adapter.wrap(scanned)(STACK, t, X).sum()))(theta_d)
    assert gradient.dtype == jnp.float32


def test_x64_changes_no_dtype():
    with jax.enable_x64(True):
        adapter, theta_d = planned(STACK)
        assert theta_d.dtype == jnp.float32
        y, gradient = jax.value_and_grad(lambda t: adapter.wrap(scanned)(STACK, t, X).sum())(theta_d)
    assert (y.dtype, gradient.dtype) == (jnp.float32, jnp.float32)


def test_x64_merges_float64_weights_in_float64():
    with jax.enable_x64(True):
        params = {"kernel": normal(IN, OUT, dtype=jnp.float64)}
        adapter, theta_d = planned(params)
        A, B = (np.asarray(factor, np.float64) for factor in adapter.factors(theta_d).values())
        with jax.numpy_dtype_promotion("strict"):
            merged, unmoved = (adapter.merge(params, theta)["kernel"] for theta in (theta_d, adapter.init()))
        assert (merged.dtype, unmoved.dtype) == (jnp.float64, jnp.float64)
        update = np.asarray(merged) - np.asarray(params["kernel"])
        np.testing.assert_allclose(update, (B @ A).T, rtol=1e-6, atol=1e-8)
        assert (unmoved == params["kernel"]).all()


@pytest.mark.parametrize("name", ["x @ W", "W.T @ x.T", "float16 and back", "scan", "cond"])
def test_numpy_s_float64_is_read_as_jax_reads_it(name):
    """As float32 without x64, in silence: a warning is an error here."""
    params, model = MODELS[name]
    adapter, theta_d = planned(params)
    wide, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, X))
    found, expected = adapter.wrap(model)(wide, theta_d, x), adapter.wrap(model)(params, theta_d, X)
    assert found.dtype == jnp.float32
    assert (found == expected).all()
    merged, expected = jax.tree.leaves(adapter.merge(wide, theta_d)), jax.tree.leaves(adapter.merge(params, theta_d))
    assert [leaf.dtype for leaf in merged] == [jnp.float32]
    assert (merged[0] == expected[0]).all()


def test_numpy_s_float64_in_a_table_and_a_convolution():
    params = {"embedding": np.asarray(normal(8, IN), np.float64), "conv": np.asarray(normal(3, IN, 4), np.float64)}
    targets = [
        unilora_jax.embedding_target("embedding", params["embedding"]),
        unilora_jax.conv_target("conv", params["conv"]),
    ]
    adapter = unilora_jax.plan(params, targets, rank=2, d=20)
    theta_d = adapter.init() + 1

    def model(params, rows):
        x = jnp.asarray(params["embedding"])[rows]
        return lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    rows = np.arange(10).reshape(2, 5) % 8
    found = adapter.wrap(model)(params, theta_d, rows)
    expected = model(adapter.merge(params, theta_d), rows)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_arguments_that_are_no_arrays_are_static():
    def model(params, x, *, train, act, scale=1.0):
        y = x @ params["kernel"]
        return {"y": act(y) if train else y, "scaled": [y * scale]}

    adapter, theta_d = planned(MATRIX)
    out = adapter.wrap(model)(MATRIX, theta_d, X, train=True, act=jnp.tanh, scale=2.0)
    expected = model(adapter.merge(MATRIX, theta_d), X, train=True, act=jnp.tanh, scale=2.0)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    np.testing.assert_allclose(out["y"], expected["y"], atol=1e-5)
    np.testing.assert_allclose(out["scaled"][0], expected["scaled"][0], atol=1e-5)


def test_none_and_numbers_among_the_outputs():
    adapter, theta_d = planned(MATRIX)
    out = adapter.wrap(lambda p, x: (x @ p["kernel"], None, {"steps": 3, "none": None}))(MATRIX, theta_d, X)
    assert out[1:] == (None, {"steps": 3, "none": None})
    assert jax.jit(adapter.wrap(lambda p, x: (None, x @ p["kernel"])))(MATRIX, theta_d, X)[0] is None


def test_a_weight_that_the_model_returns_is_the_base_s():
    adapter, theta_d = planned(MATRIX)
    _, params = adapter.wrap(lambda p, x: (x @ p["kernel"], p))(MATRIX, theta_d, X)
    assert (params["kernel"] == MATRIX["kernel"]).all()


def test_nothing_is_mutated():
    params = {"kernel": np.asarray(MATRIX["kernel"]), "other": [1, "two", None]}
    before = params["kernel"].copy()
    adapter = unilora_jax.plan(params, "kernel")
    adapter.wrap(lambda p, x: x @ p["kernel"])(params, adapter.init(), X)
    merged = adapter.merge(params, adapter.init() + 1)
    assert (params["kernel"] == before).all()
    assert merged["other"] == params["other"]
    assert not np.array_equal(merged["kernel"], before)


def test_custom_derivatives_beside_the_weights_are_kept():
    """Equations without an adapted weight stay as they are: a custom gradient of an activation is not lost."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))
    adapter, theta_d = planned(MATRIX)
    f = adapter.wrap(lambda p, x: straight_through(x @ p["kernel"]).sum())
    assert abs(jax.grad(f, argnums=1)(MATRIX, theta_d, X)).max() > 0.1


def test_the_names_that_profilers_show_are_kept():
    def model(params, x):
        with jax.named_scope("attention"):
            return x @ params["kernel"]

    adapter, theta_d = planned(MATRIX)
    program = jax.jit(adapter.wrap(model)).lower(MATRIX, theta_d, X).compile().as_text()
    assert "attention/dot_general" in program


def test_a_custom_derivative_of_the_weight_is_refused():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    adapter, theta_d = planned(MATRIX)
    with pytest.raises(TargetError, match=r"kernel: the model reads this weight in `custom_vjp_call`"):
        adapter.wrap(lambda p, x: product(x, p["kernel"]))(MATRIX, theta_d, X)


def test_the_other_orientation_is_refused_and_can_be_said():
    adapter, theta_d = planned(MATRIX)
    with pytest.raises(TargetError, match=r"kernel: the plan takes the axes \[0\] .* but the model contracts \[1\]"):
        adapter.wrap(lambda p, x: p["kernel"] @ x[0])({"kernel": MATRIX["kernel"]}, theta_d, normal(1, OUT))
    other = unilora_jax.linear_target("kernel", MATRIX["kernel"], inputs=(1,))
    assert (other.in_features, other.out_features) == (OUT, IN)
    adapter = unilora_jax.plan(MATRIX, [other], rank=3, d=40)
    y = adapter.wrap(lambda p, x: p["kernel"] @ x[0])(MATRIX, adapter.init() + 1, normal(1, OUT))
    expected = adapter.merge(MATRIX, adapter.init() + 1)["kernel"] @ normal(1, OUT)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# ---- what `jax.jit` sees of the wrapped function ---------------------------------------------------------------------


def switched(params, x, train, *, act="tanh"):
    """``train`` and ``act`` must be static."""
    y = x @ params["kernel"]
    return (getattr(jnp, act)(y) if train else y) + 0 * x.sum()


def test_the_signature_is_the_function_s_with_theta_d_behind_the_first():
    adapter, _ = planned(MATRIX)
    shown = inspect.signature(adapter.wrap(switched)).parameters.values()
    assert [parameter.name for parameter in shown] == ["params", "theta_d", "x", "train", "act"]
    assert list(shown)[2:] == list(inspect.signature(switched).parameters.values())[1:]
    assert [*inspect.signature(adapter.wrap(lambda *args: args[0])).parameters] == ["params", "theta_d", "args"]
    assert adapter.wrap(switched).__name__ == "switched"
    assert not hasattr(adapter.wrap(switched), "__wrapped__")


@pytest.mark.parametrize(
    "static", [{"static_argnums": (3,)}, {"static_argnames": ("train",)}, {"static_argnames": ("train", "act")}]
)
def test_static_arguments_keep_their_names_and_move_one_place(static):
    adapter, theta_d = planned(MATRIX)
    f = jax.jit(adapter.wrap(switched), **static)
    expected = switched(adapter.merge(MATRIX, theta_d), X, True)
    np.testing.assert_allclose(f(MATRIX, theta_d, X, True), expected, atol=1e-5)
    if "static_argnames" in static:
        np.testing.assert_allclose(f(MATRIX, theta_d, X, train=True), expected, atol=1e-5)
    if "act" in static.get("static_argnames", ()):
        expected = switched(adapter.merge(MATRIX, theta_d), X, True, act="sin")
        np.testing.assert_allclose(f(MATRIX, theta_d, X, True, act="sin"), expected, atol=1e-5)


@pytest.mark.parametrize("donated", [{"donate_argnums": (2,)}, {"donate_argnames": ("x",)}])
def test_what_is_donated_is_what_was_meant(donated):
    adapter, theta_d = planned(MATRIX)
    x = jnp.ones((5, OUT))
    f = jax.jit(adapter.wrap(lambda params, x: x + jnp.ones((5, IN)) @ params["kernel"]), **donated)
    f(MATRIX, theta_d, x)
    assert x.is_deleted()
    assert not theta_d.is_deleted()
    assert not MATRIX["kernel"].is_deleted()


class Bilinear:
    def __call__(self, params, x):
        return x @ params["kernel"]

    def method(self, params, x):
        return x @ params["kernel"]


class Unreadable:
    __signature__ = "none"

    def __call__(self, params, x):
        return x @ params["kernel"]


FUNCTIONS = {
    "partial": functools.partial(lambda scale, params, x: scale * x @ params["kernel"], 1.0),
    "partial by name": functools.partial(lambda params, x, scale: scale * x @ params["kernel"], scale=1.0),
    "method": Bilinear().method,
    "object": Bilinear(),
    "jitted": jax.jit(lambda params, x: x @ params["kernel"]),
    "no signature": Unreadable(),
    "only *args": lambda *args: args[1] @ args[0]["kernel"],
    "another theta_d": lambda params, theta_d: theta_d @ params["kernel"],
    "positions only": lambda params, x, /: x @ params["kernel"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_callable_can_be_wrapped_and_jitted(name):
    adapter, theta_d = planned(MATRIX)
    found = jax.jit(adapter.wrap(FUNCTIONS[name]), donate_argnums=())(MATRIX, theta_d, X)
    np.testing.assert_allclose(found, X @ adapter.merge(MATRIX, theta_d)["kernel"], atol=1e-5)


def test_a_builtin_can_be_wrapped():
    adapter, theta_d = planned({"kernel": MATRIX["kernel"]})
    with pytest.raises(TargetError, match="the model never multiplies by this weight"):
        adapter.wrap(dict)(MATRIX, theta_d)  # it runs, and returns the weights


# ---- other seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["computed", "cached"])
def test_a_seed_s_arrays_run_in_the_program_of_another_where_groups_are_cached(groups):
    """What docs/jax.md says of seeds."""
    first, second = (planned(MATRIX, seed=seed, groups=groups)[0] for seed in (0, 1))
    traces = []

    @jax.jit
    def step(adapter, theta_d):
        traces.append(1)
        return adapter.wrap(lambda p, x: x @ p["kernel"])(MATRIX, theta_d, X)

    theta_d = second.init() + 1
    step(first, theta_d)
    found = step(jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(second)), theta_d)
    assert len(traces) == 1
    expected = second.wrap(lambda p, x: x @ p["kernel"])(MATRIX, theta_d, X)
    assert bool(abs(found - expected).max() < 1e-5) == (groups == "cached")
