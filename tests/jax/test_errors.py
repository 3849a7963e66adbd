"""Bad input: an error that names the leaf and the remedy; parameters, files and folders are as they were."""

import dataclasses
import json
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_core
import unilora_jax
from unilora_core import CorruptFileError, MismatchError, SpecError, TargetError, UniLoraError, ValuesError
from unilora_jax import conv_target, embedding_target, linear_target

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def tree():
    """The same tree each time."""
    return {
        "up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "down": {"kernel": jnp.ones((6, 4))},
        "conv": {"kernel": jnp.ones((3, 3, 4, 6))},
        "codes": {"kernel": jnp.ones((4, 4), jnp.int8)},
        "layers": {"mlp": {"kernel": jnp.ones((3, 4, 4))}, "norm": jnp.ones((3, 4))},
    }


UP = linear_target("up/kernel", ones(4, 6))


def refused(error, match, targets=("up",), params=None, **kwargs):
    with pytest.raises(error, match=match):
        unilora_jax.plan(tree() if params is None else params, targets, **kwargs)


@pytest.fixture(scope="module")
def adapter():
    return unilora_jax.plan(tree(), ["up"], d=10, start="paper", bound=0.5)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [0, -3, 41, 10**9])
def test_d_out_of_range(d):
    refused(
        SpecError,
        rf"expected 1 ≤ d ≤ min\(D, 2\^31\), got d = {d} with D = 40; .* a sixteenth of the numbers of LoRA at rank 4",
        rank=4,
        d=d,
    )


@pytest.mark.parametrize("d", [1.5, "many", None])
def test_d_that_is_no_integer(d):
    refused(SpecError, "d must be an integer, got", d=d)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(rank):
    refused(SpecError, rf"expected rank ≥ 1, got {rank}; LoRA ranks are usually 4 to 64", rank=rank)


def test_rank_that_is_no_integer():
    refused(SpecError, r"rank ≥ 1, got 1\.5", rank=1.5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"seed": -1}, "0 ≤ seed < 2"),
        ({"grouping": "random"}, "unknown grouping 'random'; known: balanced"),
        ({"start": "warm"}, "unknown start 'warm'; known: paper, identity, zero"),
        ({"bound": float("nan")}, "bound must be a positive float32 number, got nan"),
        ({"groups": "x"}, "groups must be 'computed' or 'cached', got 'x'"),
    ],
)
def test_an_option_out_of_range(wrong, match):
    refused(SpecError, match, **wrong)


# ---- nothing to adapt -----------------------------------------------------------------------------------------------


def test_no_match_lists_the_nearest_paths():
    refused(TargetError, r"no leaf matches 'up/kernle'; the nearest paths are \['up/kernel'.*regular expr", "up/kernle")
    refused(TargetError, r"no leaf matches \('dwn/kernel',\); the nearest paths are \['down/kernel'", ["dwn/kernel"])
    refused(TargetError, r"no leaf matches \('zzz',\); the nearest paths are \['codes/kernel', 'conv/k", ["zzz"])


def test_nothing_to_choose_from():
    refused(TargetError, r"no leaf matches \(\)", [])
    refused(TargetError, r"no leaf matches '\.\*': the tree of parameters is empty", ".*", {})


def test_everything_excluded():
    refused(TargetError, r"all 2 leaves selected by .* are excluded by '\.\*'", ["up", "down"], exclude=".*")


@pytest.mark.parametrize("wrong", [{"targets": "*.up"}, {"targets": ".*", "exclude": "*.up"}])
def test_what_is_no_regular_expression(wrong):
    refused(TargetError, r"'\*\.up' is not a regular expression.*give a list for plain names", **wrong)


# ---- what cannot be adapted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("up/.*", r"^up/bias: expected a matrix, or a stack of matrices .* got shape \(6,\); exclude it"),
        (["codes"], "^codes/kernel: expected a floating-point weight, got int8.*Exclude it, or dequantise inside"),
    ],
)
def test_a_leaf_that_is_no_matrix(targets, match):
    refused(TargetError, match, targets)


@pytest.mark.parametrize("leaf", ["text", 3.0])
def test_a_leaf_that_is_no_array(leaf):
    match = f"^up: expected an array of JAX or NumPy, got builtins.{type(leaf).__name__}; convert .* or exclude it"
    refused(TargetError, match, params={"up": leaf})


def test_a_leaf_of_torch():
    torch = pytest.importorskip("torch", reason="this test needs torch")
    match = "^up/kernel: expected an array of JAX or NumPy, got torch.*Tensor; convert"
    refused(TargetError, match, params={"up": {"kernel": torch.ones(4, 6)}})
    refused(TargetError, match, [UP], {"up": {"kernel": torch.ones(4, 6)}})


@pytest.mark.parametrize(
    "change",
    [
        {"in_features": 7},
        {"out_features": 7},
        {"out_features": 3, "first_row": 4},
        {"first_row": -1},
        {"inputs": (1,)},
        {"inputs": (5,)},
        {"stacked": True},
        {"names": ("up", "again"), "modules": ("up", "again")},
    ],
)
def test_a_hand_written_target_that_does_not_fit(change):
    refused(TargetError, "^up/kernel: ", [dataclasses.replace(UP, **change)])


def test_a_hand_written_target_of_no_leaf():
    target = dataclasses.replace(UP, path="upp/kernel")
    refused(TargetError, r"^upp/kernel: no such leaf; the nearest are \['up/kernel'", [target])


def test_a_hand_written_target_of_integers():
    target = dataclasses.replace(UP, path="codes/kernel", out_features=4)
    refused(TargetError, "^codes/kernel: expected a floating-point weight, got int8", [target])


def test_two_ways_to_read_one_leaf():
    turned = dataclasses.replace(UP, names=("turned",), in_features=6, out_features=4, inputs=(1,))
    match = r"^up/kernel: expected targets that read it in one way, but turned and up take different axes.*inputs=\(…\)"
    refused(TargetError, match, [UP, turned])


@pytest.mark.parametrize("rows", [(0, 0), (0, 2), (2, 0), (3, 2)])
def test_overlapping_blocks(rows):
    blocks = [dataclasses.replace(UP, names=(n,), out_features=3, first_row=r) for n, r in zip("qk", rows, strict=True)]
    refused(TargetError, "(k and q|q and k) adapt the same outputs of up/kernel", blocks)


def test_two_blocks_of_one_name():
    blocks = [dataclasses.replace(UP, out_features=3, first_row=row) for row in (0, 3)]
    refused(SpecError, "'up.A' occurs twice", blocks)


def test_blocks_that_contract_different_axes():
    square = {"up": {"kernel": ones(4, 4)}}
    whole = linear_target("up/kernel", square["up"]["kernel"])
    q = dataclasses.replace(whole, names=("q",), out_features=2)
    k = dataclasses.replace(whole, names=("k",), out_features=2, first_row=2, inputs=(1,))
    refused(TargetError, "up/kernel", [q, k], square)


def test_names_and_targets_in_one_list():
    refused(TargetError, "expected a list of names or a list of Target, got both in one", ["down", UP])


def test_messages_are_those_of_one_family():
    for wrong in ({"targets": ["nope"]}, {"d": 0}):
        refused(UniLoraError, r"nope|d = 0", **wrong)
        refused(ValueError, r"nope|d = 0", **wrong)


# ---- a θ_d that does not fit ----------------------------------------------------------------------------------------


def use(adapter, how, theta_d, folder):
    """θ_d, everywhere that it is taken."""
    if how == "merge":
        return adapter.merge(tree(), theta_d)
    if how == "factors":
        return adapter.factors(theta_d)
    if how == "wrap":
        return adapter.wrap(lambda params, x: x @ params["up"]["kernel"])(tree(), theta_d, X)
    return getattr(adapter, how)(folder / how, theta_d)


WRONG = {
    "short": (lambda: jnp.ones(9), r"\(10,\).*got \(9,\) float32"),
    "column": (lambda: np.ones((10, 1)), r"\(10,\).*got \(10, 1\) float"),
    "integers": (lambda: jnp.ones(10, jnp.int32), r"\(10,\).*got \(10,\) int32"),
    "truth": (lambda: jnp.ones(10, bool), r"\(10,\).*floating-point dtype, got \(10,\) bool"),
    "complex": (lambda: jnp.ones(10, jnp.complex64), r"\(10,\).*floating-point dtype, got \(10,\) complex64"),
    "list": (lambda: [0.0] * 10, r"\(10,\).*got a builtins.list"),
    "torch": (
        lambda: pytest.importorskip("torch", reason="this case needs torch").ones(10),
        r"\(10,\).*got a torch.*Tensor",
    ),
}


@pytest.mark.parametrize("how", ["merge", "factors", "wrap", "save", "export_lora"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_theta_d_that_does_not_fit(tmp_path, adapter, how, wrong):
    make, match = WRONG[wrong]
    with pytest.raises(ValuesError, match=match):
        use(adapter, how, make(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["merge", "factors", "wrap", "save", "export_lora"])
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_a_narrow_theta_d_or_a_cast_adapter_would_not_start_as_the_base(tmp_path, how, start, dtype):
    adapter = unilora_jax.plan(tree(), ["up"], d=10, start=start)
    name = jnp.dtype(dtype).name
    match = (
        rf"theta_d: expected float32, got {name}, in which .* not start as the base. Keep θ_d in float32; A and B are"
    )
    for theta_d in (adapter.init().astype(dtype), np.asarray(adapter.init().astype(dtype))):
        with pytest.raises(ValuesError, match=match):
            use(adapter, how, theta_d, tmp_path)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), adapter)
    match = (
        rf"the arrays of an adapter are float32 and int32, got {name}: this one was cast.*Cast the parameters without"
    )
    with pytest.raises(ValuesError, match=match):
        use(cast, how, adapter.init(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_float64_is_wide_enough(start):
    with jax.enable_x64(True):
        adapter = unilora_jax.plan(tree(), ["up"], d=10, start=start)
        theta_d = adapter.init().astype(jnp.float64)
        found = adapter.wrap(lambda params, x: x @ params["up"]["kernel"])(tree(), theta_d, X)
        assert start == "paper" or (found == X @ tree()["up"]["kernel"]).all()


@pytest.mark.parametrize("how", ["merge", "save", "export_lora"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_theta_d_that_is_not_finite(tmp_path, adapter, how, bad):
    with pytest.raises(ValuesError, match=r"theta_d.* NaN or infini.*training diverged.*[Nn]othing was written"):
        use(adapter, how, adapter.init().at[3].set(bad), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_old_file_and_folder_stay(tmp_path, adapter):
    for how in ("save", "export_lora"):
        use(adapter, how, adapter.init(), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 3
    for theta_d in (adapter.init().at[0].set(jnp.nan), jnp.ones(9)):
        for how in ("save", "export_lora"):
            with pytest.raises(ValuesError, match="theta_d"):
                use(adapter, how, theta_d, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_export_that_does_not_fit_the_disk_leaves_the_old_one(tmp_path):
    params = {"up": {"kernel": ones(256, 256)}}
    adapter = unilora_jax.plan(params, ["up"], rank=64, grouping="numpy-shuffle")
    adapter.export_lora(tmp_path, adapter.init(), base_model="old")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            adapter.export_lora(tmp_path, adapter.init() + 1, base_model="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "adapter_model.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_an_export_of_factors_that_are_no_numbers(tmp_path):
    """θ_d is finite, θ_d - θ_d⁰ is not."""
    identity = unilora_jax.plan(tree(), ["up"], d=10, start="identity", bound=3e38)
    theta_d = np.where(identity.init() < 0, 3e38, -3e38).astype(np.float32)
    assert np.isfinite(theta_d).all()
    with pytest.raises(ValuesError, match=r"export_lora: up\.B holds NaN or infinity.*Nothing was written"):
        identity.export_lora(tmp_path, theta_d)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_merge_that_the_weights_cannot_hold(adapter, dtype):
    params = {**tree(), "up": {"kernel": jnp.ones((4, 6), dtype)}}
    large, match = adapter.init() + (3e3 if dtype == jnp.float16 else 3e19), rf"{jnp.dtype(dtype).name} holds"
    with pytest.raises(
        ValuesError, match=rf"merge: up/kernel: \d+ of 24 values of W \+ B·A are no numbers that {match}"
    ):
        adapter.merge(params, large)
    assert (params["up"]["kernel"] == 1).all()
    merged = jax.jit(adapter.merge)(params, large)["up"]["kernel"]  # where no value can be looked at
    assert not jnp.isfinite(merged).all()
    assert jnp.isfinite(adapter.merge(params, adapter.init())["up"]["kernel"]).all()


def test_a_weight_that_is_infinite_already_is_none_of_the_merge(adapter):
    params = {**tree(), "up": {"kernel": jnp.ones((4, 6)).at[0, 0].set(-jnp.inf)}}
    merged = adapter.merge(params, adapter.init())["up"]["kernel"]
    assert merged[0, 0] == -jnp.inf
    assert jnp.isfinite(merged.flatten()[1:]).all()


# ---- parameters that are not the plan's -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        (
            {"upp": {"kernel": ones(4, 6)}},
            MismatchError,
            r"^up/kernel: expected a weight of shape \(4, 6\), the tree has no such leaf; the nearest .*'upp/kernel'",
        ),
        ({"up": {"kernel": ones(4, 7)}}, MismatchError, r"^up/kernel: expected shape \(4, 6\), got \(4, 7\).*another"),
        ({"up": {"kernel": ones(1, 4, 6)}}, MismatchError, r"^up/kernel: expected shape \(4, 6\), got \(1, 4, 6\)"),
        ({"up": {"kernel": ones(4, 6, dtype=np.int8)}}, UniLoraError, "^up/kernel: expected a floating-point .* int8"),
        ({"up": {"kernel": "text"}}, UniLoraError, "^up/kernel: expected an array of JAX or NumPy, got builtins.str"),
    ],
)
def test_another_tree(adapter, params, error, match):
    before = jax.tree.map(np.array, params)
    with pytest.raises(error, match=match):
        adapter.merge(params, adapter.init())
    with pytest.raises(error, match=match):
        adapter.wrap(lambda params, x: x)(params, adapter.init(), X)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))


def test_params_and_theta_d_swapped(adapter):
    match = r"^expected a tree of parameters with up/kernel, got a single \w+; params and theta_d seem to be swapped"
    adapted = adapter.wrap(lambda params, x: x @ params["up"]["kernel"])
    for call in (adapter.merge, lambda *args: adapted(*args, X), lambda *args: jax.jit(adapted)(*args, X)):
        with pytest.raises(MismatchError, match=match):
            call(adapter.init(), tree())


def test_another_tree_altogether_says_what_it_has(adapter):
    with pytest.raises(MismatchError, match=r"^up/kernel: .* the nearest are \['x', 'yy'\]\.$"):
        adapter.merge({"x": ones(2), "yy": ones(2)}, adapter.init())


# ---- what an adapter says of itself ---------------------------------------------------------------------------------


def test_an_adapter_prints_in_a_line():
    params = {f"layer_{i}": {"kernel": ones(8, 8)} for i in range(100)}
    for options in ({}, {"groups": "cached"}, {"method": "vera"}):
        adapter = unilora_jax.plan(params, **options)
        assert repr(adapter) == f"Adapter({adapter.summary()})"
        assert len(repr(adapter)) + len(repr(adapter.chains)) < 400


def test_an_adapter_has_no_hash_and_says_what_has_one(adapter):
    with pytest.raises(
        TypeError, match=r"no hash: pass it to a jitted function as an argument.*key take adapter\.spec"
    ):
        hash(adapter)
    with pytest.raises(ValueError, match=r"hash"):
        jax.jit(lambda adapter: adapter.init(), static_argnums=0)(adapter)
    again = unilora_jax.plan(tree(), ["up"], d=10, start="paper", bound=0.5)
    assert {(adapter.spec, adapter.targets): 1}[again.spec, again.targets] == 1
    assert adapter != again  # no arrays are compared


# ---- models that do not multiply by what is adapted ------------------------------------------------------------------


def swapped_in_a_scan(params, x):
    weights = params["up"]["kernel"], params["down"]["kernel"].T
    return x @ jax.lax.fori_loop(0, 3, lambda _, pair: pair[::-1], weights)[0]


def swapped_in_a_loop(params, x):
    weights = params["up"]["kernel"], params["down"]["kernel"].T
    state = jax.lax.while_loop(
        lambda state: state[0] < x.sum(), lambda state: (state[0] + 1, *state[:0:-1]), (0.0, *weights)
    )
    return x @ state[1]


def chosen_by_a_branch(params, x):
    weights = params["up"]["kernel"], params["down"]["kernel"].T
    return x @ jax.lax.cond(x[0, 0] > 0, lambda pair: pair[0], lambda pair: pair[1], weights)


UNREACHED = {
    "never": (
        lambda params, x: x @ params["down"]["kernel"].T,
        r"^up/kernel: the model never multiplies by this weight.*would do nothing. Exclude it",
    ),
    "sin": (
        lambda params, x: x @ jnp.sin(params["up"]["kernel"]),
        "^up/kernel: the model reads this weight in `sin`, .*no low-rank path. Exclude it, or use merge",
    ),
    "lookup of outputs": (
        lambda params, x: params["up"]["kernel"][:, jnp.array([0, 1])],
        r"^up/kernel: the plan takes the axes \[0\] .* but the model looks up \[1\].*embedding_target\(path, leaf\)",
    ),
    "parts of rows": (
        lambda params, x: jax.vmap(lambda i: jax.lax.dynamic_slice(params["up"]["kernel"], (i, 0), (1, 3)))(
            jnp.array([0, 1])
        ),
        r"^up/kernel: the plan takes the axes \[0\] .* but the model looks up \[0, 1\]",
    ),
    "blocks of rows": (
        lambda params, x: jax.vmap(lambda i: jax.lax.dynamic_slice(params["up"]["kernel"], (i, 0), (2, 6)))(
            jnp.array([0, 1])
        ),
        "^up/kernel: the model looks up blocks of this weight, not rows, .* or use merge",
    ),
    "lookup and head": (
        lambda params, x: params["up"]["kernel"][jnp.array([0, 1])] @ params["up"]["kernel"].T,
        r"^up/kernel: the plan takes the axes \[1\] .* but the model contracts \[0\]",
    ),
    "sum": (lambda params, x: x.sum() + params["up"]["kernel"].sum(), "^up/kernel: .*`reduce_sum`"),
    "inside jit": (lambda params, x: jax.jit(jnp.sin)(params["up"]["kernel"]), "^up/kernel: .*`sin`"),
    "itself": (lambda params, x: params["up"]["kernel"].T @ params["up"]["kernel"], "^up/kernel and up/kernel are mul"),
    "orientation": (
        lambda params, x: ones(2, 6) @ params["up"]["kernel"].T,
        r"^up/kernel: the plan takes .*\(4, 6\).*inputs.*contracts .*linear_target\(path, leaf, inputs=\(…,\)\)",
    ),
    "reshape": (
        lambda params, x: ones(2, 8) @ params["up"]["kernel"].reshape(8, 3),
        r"^up/kernel: the model reshapes this weight \(4, 6\) to \(8, 3\), which mixes its inputs and its outputs",
    ),
    "repeat": (
        lambda params, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(params["up"]["kernel"], (2, 4, 6))),
        "^up/kernel: the model repeats this weight along a new axis",
    ),
    "scan": (swapped_in_a_scan, "^up/kernel: this weight is in the carry of a scan.*exclude it"),
    "while": (swapped_in_a_loop, "^up/kernel: this weight is in the carry of a while loop.*exclude it"),
    "branch": (chosen_by_a_branch, "^up/kernel: this weight is in the outputs of a branch.*exclude it"),
}


@pytest.mark.parametrize("case", UNREACHED)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_model_that_does_not_multiply_by_the_weight(adapter, case, jit):
    function, match = UNREACHED[case]
    adapted = adapter.wrap(function)
    with pytest.raises(TargetError, match=match):
        (jax.jit(adapted) if jit else adapted)(tree(), adapter.init(), X)


@dataclasses.dataclass
class Output:
    """A dataclass that JAX does not know as a tree."""

    logits: object


class Arraylike:
    def __jax_array__(self):
        return jnp.ones(3)


OUTPUTS = {
    "text": (lambda y: (y, {"name": "text"}), r"got a builtins\.str in its output\[1\]\['name'\]"),
    "dataclass": (lambda y: Output(y), r"got a [\w.]*test_errors\.Output in its output\. .*register_dataclass"),
    "function": (lambda y: [y, len], r"got a builtins\.builtin_function_or_method in its output\[1\]"),
    "array-like": (lambda y: {"y": Arraylike()}, r"got a [\w.]*test_errors\.Arraylike in its output\['y'\]"),
    "NumPy's objects": (lambda y: (y, np.array(["a"])), r"got a numpy\.ndarray of <U1 in its output\[1\]"),
}


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_model_that_returns_what_is_no_array(adapter, case, jit):
    make, match = OUTPUTS[case]
    adapted = adapter.wrap(lambda params, x: make(x @ params["up"]["kernel"]))
    with pytest.raises(ValuesError, match=f"^wrap: the function: expected arrays and numbers.*{match}"):
        (jax.jit(adapted) if jit else adapted)(tree(), adapter.init(), X)


@pytest.mark.parametrize(
    ("make", "path", "shape", "match"),
    [
        (
            conv_target,
            "conv/kernel",
            (3, 4),
            r"^conv/kernel: expected the kernel of a convolution, \(\*kernel, in, out\)",
        ),
        (conv_target, "layers/conv/weight", (2, 6, 4), "weight, after the axis of the layers; got shape"),
        (embedding_target, "embed/embedding", (9,), r"^embed/embedding: expected the table.*got shape \(9,\)"),
        (embedding_target, "embed/embedding", (2, 9, 4), r"expected the table.*got shape \(2, 9, 4\)"),
    ],
)
def test_what_is_no_kernel_and_no_table(make, path, shape, match):
    with pytest.raises(TargetError, match=match):
        make(path, ones(*shape))


def test_a_kernel_that_is_the_image():
    def function(params, x):
        return jax.lax.conv(params["image"]["kernel"], jnp.ones((5, 4, 1, 1)), (1, 1), "SAME")

    params = {"image": {"kernel": jnp.ones((2, 4, 3, 3))}}
    adapter = unilora_jax.plan(params, ".*", rank=2)
    with pytest.raises(TargetError, match="image/kernel: the model convolves this weight with a kernel; exclude it"):
        adapter.wrap(function)(params, adapter.init(), X)


# ---- quantised weights ----------------------------------------------------------------------------------------------


def quantised_model():
    """(functions of the quantised and of the whole weights, quantised parameters, their dequantisation, x)."""
    linen = pytest.importorskip("flax.linen", reason="this test needs flax")
    qwix = pytest.importorskip("qwix", reason="this test needs qwix")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8, name="down")(jnp.tanh(linen.Dense(16, name="up")(x)))

    x = jax.random.normal(jax.random.key(1), (3, 4))
    rules = qwix.PtqProvider([qwix.QtRule(module_path=".*", weight_qtype=jnp.int8)])
    model, params = Model(), Model().init(jax.random.key(0), x)["params"]
    shapes = jax.eval_shape(qwix.quantize_model(model, rules).init, jax.random.key(0), x)["params"]

    def holds(node):
        return hasattr(node, "array")

    def dequantised(tree):
        return jax.tree.map(lambda w: qwix.dequantize(w.array) if holds(w) else w, tree, is_leaf=holds)

    return lambda params, x: model.apply({"params": params}, x), qwix.quantize_params(params, shapes), dequantised, x


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # of qwix 0.1.8 with Flax 0.12
def test_a_quantised_weight_is_refused_and_its_remedy_works():
    model, params, dequantised, x = quantised_model()
    match = (
        r"^down/kernel: expected an array, this weight holds array/qvalue, array/scale, as a quantised .*dequantise in"
    )
    for targets in ("all-linear", ".*/kernel", ["down"]):
        refused(TargetError, match, targets, params)
    adapter = unilora_jax.plan(jax.eval_shape(dequantised, params), rank=2)
    theta_d = adapter.init()

    def adapted(theta_d, params, x):
        return adapter.wrap(model)(dequantised(params), theta_d, x)

    assert (jax.jit(adapted)(theta_d, params, x) == jax.jit(lambda p, x: model(dequantised(p), x))(params, x)).all()
    merged = adapter.merge(dequantised(params), theta_d + 1)
    np.testing.assert_allclose(jax.jit(adapted)(theta_d + 1, params, x), model(merged, x), rtol=1e-4, atol=1e-4)


def test_a_stack_that_is_planned_as_a_matrix():
    params = tree()
    adapter = unilora_jax.plan(params, "layers/norm")
    match = r"^layers/norm: the model scans over axis 0 of this weight \(3, 4\), which the plan takes for a part"

    def model(params, x):
        return jax.lax.scan(lambda x, scale: (x * scale, None), x, params["layers"]["norm"])[0]

    with pytest.raises(TargetError, match=match):
        adapter.wrap(model)(params, adapter.init(), X)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(path):
    """(path, adapter) of a file for up and for all layers of mlp."""
    adapter = unilora_jax.plan(tree(), ["up", "mlp"], d=10, start="paper", bound=0.5)
    adapter.save(path, adapter.init())
    return path, adapter


def assert_load_refused(path, params, error, match):
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        unilora_jax.load(params, path)
    assert path.read_bytes() == before


def changed(**leaves):
    """`tree` with other leaves, None for none."""
    return {name: leaf for name, leaf in {**tree(), **leaves}.items() if leaf is not None}


def test_a_missing_layer(saved):
    path, _ = saved
    message = r"adapter.safetensors: the tree has no matrix for the layer 'up'; the nearest are \['upp'\].*rename="
    assert_load_refused(path, changed(up=None, upp={"kernel": ones(4, 6)}), MismatchError, message)


@pytest.mark.parametrize(("shape", "inputs", "outputs"), [((8, 6), 8, 6), ((4, 5), 4, 5), ((6, 4), 6, 4)])
def test_another_width(saved, shape, inputs, outputs):
    path, _ = saved
    message = (
        rf"adapter.safetensors: up/kernel: expected a layer of 4 inputs and at least 6 outputs, "
        rf"the tree has {inputs} and {outputs}; the adapter was trained on another model"
    )
    assert_load_refused(path, changed(up={"kernel": ones(*shape)}), MismatchError, message)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (ones(4, 6, dtype=np.int8), "up/kernel: expected a floating-point weight, got int8"),
        (ones(6), r"up/kernel: expected a matrix.*got shape \(6,\); .*conv_target\(path, leaf\) or"),
        (ones(3, 3, 4, 6), "up/kernel: expected a layer of 4 inputs and at least 6 outputs, the tree has 36 and 6"),
    ],
)
def test_a_layer_that_cannot_be_adapted(saved, leaf, match):
    path, _ = saved
    assert_load_refused(path, changed(up={"kernel": leaf}), UniLoraError, match)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_stack_of_another_height(saved, layers):
    path, _ = saved
    message = r"layers/mlp/kernel is a stack of 4 layers; expected .* the file has 3 layers.*Unstack the parameters"
    if layers == 2:
        message = r"no matrix for the layer 'layers.2.mlp'; the nearest are \['layers.1.mlp'"
    assert_load_refused(path, changed(layers={"mlp": {"kernel": ones(layers, 4, 4)}}), MismatchError, message)


def test_two_layers_of_the_file_in_one_place(saved):
    path, _ = saved
    with pytest.raises(MismatchError, match=r"layers.0.mlp and layers.1.mlp both belong to the layer 'layers.0.mlp'"):
        unilora_jax.load(tree(), path, rename=lambda name: re.sub(r"\d", "0", name))


@pytest.mark.parametrize("rows", [(-2, 3), (0, 2)], ids=["outside", "overlapping"])
def test_blocks_of_a_file_that_do_not_fit(path, rows):
    """As somebody else's program might write them."""
    blocks = [dataclasses.replace(UP, names=(n,), out_features=3, first_row=r) for n, r in (("q", 0), ("k", 3))]
    adapter = unilora_jax.plan(tree(), blocks, d=10)
    entries = [[name, "up", row, False] for name, row in zip("qk", rows, strict=True)]
    adapter.save(path, adapter.init(), metadata={"targets": json.dumps(entries)})
    assert_load_refused(path, tree(), UniLoraError, "up/kernel")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    assert_load_refused(path, tree(), CorruptFileError, "adapter.safetensors: ")


def test_a_flipped_bit(saved):
    path, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    assert_load_refused(path, tree(), CorruptFileError, "do not match the checksum")


def test_no_such_file(path):
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        unilora_jax.load(tree(), path)


def test_a_file_without_targets_is_read_by_its_names(saved):
    path, adapter = saved
    unilora_core.save_adapter(path, adapter.spec, np.asarray(adapter.init()))
    assert unilora_jax.load(tree(), path)[0].targets == adapter.targets
