"""Every method of factors: what it computes, trains, keeps in a file, exports, and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
from methods import HERE, OPTIONS, X, model, normal, outputs, parameters, planned, targets
from safetensors.numpy import load_file

import unilora_jax
from unilora_core import (
    AdapterFileError,
    MismatchError,
    SpecError,
    TargetError,
    ValuesError,
    draws,
    project,
    read_adapter,
)
from unilora_core import save_adapter as save
from unilora_core.frames import FRAMES, Frame
from unilora_core.header import write_targets
from unilora_core.methods import METHODS, Method, plan_spec
from unilora_jax import generic

DENSE = [name for name in METHODS if name not in HERE]
P = parameters()

every = pytest.mark.parametrize("method", HERE)


def test_all_methods_are_here_or_refused():
    assert len(HERE) == 9
    assert set(DENSE) == {"fourierft", "gpart", "intrinsic-dimension"}


# ---- what it computes -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_outputs_are_those_of_the_updated_weights(method, dtype):
    params = parameters(dtype)
    adapter, theta_d = planned(method, params)
    found = outputs(adapter, params, theta_d, X.astype(dtype))
    expected = methods.in_numpy(methods.updated(params, adapter, theta_d), np.asarray(X.astype(dtype), np.float64))
    base = methods.in_numpy(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(X, np.float64))
    tolerance = {"float32": 1e-5, "bfloat16": 4e-2}[dtype]
    assert found.dtype == dtype
    assert abs(expected - base).max() > 0.05
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


@every
def test_the_gradient_is_that_of_the_updated_weights(method):
    adapter, theta_d = planned(method)
    gradient = jax.jit(jax.grad(lambda theta_d: methods.loss(adapter.wrap(model)(P, theta_d, X))))(theta_d)
    assert gradient.dtype == jnp.float32
    for seed in range(6):
        direction = normal(1, adapter.spec.d, seed=seed)[0]
        found = np.asarray(gradient, np.float64) @ np.asarray(direction, np.float64)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / adapter.spec.d**0.5
        assert abs(found - methods.slope(P, adapter, theta_d, direction)) < 1e-4 * scale


@every
def test_merged_is_adapted(method):
    adapter, theta_d = planned(method)
    merged = jax.jit(adapter.merge)(P, theta_d)
    for found, expected in zip(*map(jax.tree.leaves, (merged, methods.updated(P, adapter, theta_d))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(jax.jit(model)(merged, X), outputs(adapter, P, theta_d, X), rtol=0, atol=1e-5)


@every
def test_it_starts_as_the_base(method):
    adapter, _ = planned(method)
    found, base = outputs(adapter, P, adapter.init(), X), jax.jit(model)(P, X)
    at_zero = [not up.any() for _, up in jax.jit(adapter.chains.low_rank)(adapter.init())]
    if method == "vb-lora":  # its own start, where an update is small
        assert not any(at_zero)
        assert 0 < abs(found - base).max() < 0.01
    else:
        assert all(at_zero)
        np.testing.assert_allclose(found, base, rtol=1e-6, atol=1e-6)


@every
def test_twenty_steps_lower_the_loss(method):
    optax = pytest.importorskip("optax", reason="this test trains with optax")
    adapter, _ = planned(method)
    goal = 0.5 * normal(5, 8, seed=7)
    adam = optax.adam(adapter.learning_rate(5e-3))

    @jax.jit
    def step(adapter, theta_d, moments):
        value, gradient = jax.value_and_grad(lambda t: ((adapter.wrap(model)(P, t, X) - goal) ** 2).mean())(theta_d)
        change, moments = adam.update(gradient, moments)
        return value, optax.apply_updates(theta_d, change), moments

    theta_d, losses = adapter.init(), []
    moments = adam.init(theta_d)
    for _ in range(20):
        value, theta_d, moments = step(adapter, theta_d, moments)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0], losses


@every
def test_many_adapters_in_one_call(method):
    adapter, theta_d = planned(method)
    several = jnp.stack([theta_d, 0.5 * theta_d])
    together = jax.jit(jax.vmap(adapter.wrap(model), in_axes=(None, 0, None)))(P, several, X)
    one_by_one = [outputs(adapter, P, theta_d, X) for theta_d in several]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), rtol=1e-5, atol=1e-5)


@every
def test_nothing_is_promoted_by_guess(method):
    adapter, theta_d = planned(method)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(jax.grad(lambda theta_d: adapter.wrap(model)(P, theta_d, X).sum()))(theta_d)


@pytest.mark.parametrize("method", ["gaussian", "vera", "lora-xs", "vb-lora"])
def test_x64_changes_no_dtype(method):
    with jax.enable_x64(True):
        adapter, theta_d = planned(method)
        y, gradient = jax.jit(jax.value_and_grad(lambda t: adapter.wrap(model)(P, t, X).sum()))(theta_d)
    assert (theta_d.dtype, y.dtype, gradient.dtype) == (jnp.float32,) * 3


def test_a_narrow_theta_d_is_computed_with_in_float32():
    """By the projection, that is; an adapter refuses it."""
    adapter, theta_d = planned("gaussian")
    narrow = theta_d.astype(jnp.bfloat16)
    found, wide = map(jax.jit(adapter.chains.factors), (narrow, narrow.astype(jnp.float32)))
    assert all((found[name] == wide[name].astype(jnp.bfloat16)).all() for name in found)


@pytest.mark.parametrize("grouping", ["balanced", "local", "by-factor", "unnormalised"])
@pytest.mark.parametrize("method", ["uni-lora", "vera", "tied-lora"])
def test_any_gather_serves_any_frame(method, grouping):
    """With the bits of the core, whether groups are computed or cached."""
    options = {"grouping": grouping, "d": 40}
    (computed, theta_d), (cached, _) = (planned(method, **options, groups=how) for how in ("computed", "cached"))
    expected = computed.spec.layout.split(methods.project(computed.spec, np.asarray(theta_d)))
    for adapter in (computed, cached):
        found = jax.jit(lambda adapter, theta_d: adapter.factors(theta_d))(adapter, theta_d)
        assert found.keys() == expected.keys()
        assert all((found[name] == factor).all() for name, factor in expected.items())


@pytest.mark.parametrize("method", ["gaussian", "uni-lora"])
def test_a_zero_start_where_every_piece_may_be_zero(method):
    adapter, theta_d = planned("vera", grouping=METHODS[method].grouping, d=12)
    assert adapter.spec.start == "zero"
    assert not adapter.init().any()
    merged = jax.jit(adapter.merge)(P, theta_d)
    np.testing.assert_allclose(jax.jit(model)(merged, X), outputs(adapter, P, theta_d, X), atol=1e-5)


def test_a_gaussian_P_is_never_whole(monkeypatch):
    """In blocks of a few rows, forward and backward, the last one not full; the same numbers as in one block."""
    adapter, theta_d = planned("gaussian", d=20)

    def value(theta_d):
        return adapter.wrap(model)(P, theta_d, X).sum()

    expected = jax.jit(jax.value_and_grad(value))(theta_d)
    assert max(sizes_made(jax.make_jaxpr(jax.grad(value))(theta_d).jaxpr)) >= 20 * adapter.spec.D  # it can be seen
    monkeypatch.setattr(generic, "ENTRIES", 20 * 7)
    jax.clear_caches()
    assert adapter.spec.D % 7
    assert max(sizes_made(jax.make_jaxpr(jax.grad(value))(theta_d).jaxpr)) < 3 * adapter.spec.D
    found = jax.jit(jax.value_and_grad(value))(theta_d)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def sizes_made(jaxpr):
    """The sizes of all intermediate results, in nested programs too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from sizes_made(getattr(inner, "jaxpr", inner))


# ---- a method of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def of_ones_own(monkeypatch):
    """A is the same for all layers: random and frozen, or trained; B is each layer's."""

    def pieces(sizes, options):
        return {"B": (sizes.out_features, int(options["rank"]))}

    def common(sizes, options):
        return {"A": (int(options["rank"]), sizes.in_features)} | pieces(sizes, options)

    def frozen(sizes, seed, options):
        return {"A": draws.uniform(f"test seed={seed}", (int(options["rank"]), sizes.in_features), 0.3)}

    def chain(pieces, frozen, options):
        return {**frozen, **pieces}["A"], pieces["B"]

    zero, names = frozenset({"B"}), ("A", "B")
    alone = Frame(1, ("B",), zero, pieces, chain, "test", frozen=frozen)
    monkeypatch.setitem(FRAMES, "alone", alone)
    monkeypatch.setitem(FRAMES, "common", Frame(1, names, zero, common, chain, "test", shared=frozenset({"A"})))
    monkeypatch.setitem(METHODS, "alone", Method("alone", "identity", "zero", 3, "test"))
    monkeypatch.setitem(METHODS, "common", Method("common", "balanced", "identity", 3, "test"))


@pytest.mark.parametrize("method", ["alone", "common"])
@pytest.mark.usefixtures("of_ones_own")
def test_a_method_of_ones_own(path, method):
    """A factor without an axis of layers beside a stack of them."""
    adapter, theta_d = planned(method)
    merged = jax.jit(adapter.merge)(P, theta_d)
    for found, expected in zip(*map(jax.tree.leaves, (merged, methods.updated(P, adapter, theta_d))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    expected = outputs(adapter, P, theta_d, X)
    np.testing.assert_allclose(jax.jit(model)(merged, X), expected, rtol=0, atol=1e-5)
    adapter.save(path, theta_d)
    loaded, read = unilora_jax.load(P, path)
    assert (outputs(loaded, P, read, X) == expected).all()


# ---- what stands beside the pieces ----------------------------------------------------------------------------------


def frozen_by_name(adapter):
    return {target.names[0]: arrays for target, arrays in zip(adapter.targets, adapter.chains.frozen, strict=True)}


def test_what_is_frozen_is_one_array_for_all_layers_of_a_width():
    adapter, _ = planned("vera")
    by_name = frozen_by_name(adapter)
    assert by_name["layers.0.up"]["A"] is by_name["attn.query"]["A"]
    assert by_name["qkv.q"]["B"] is by_name["layers.0.up"]["B"]
    assert by_name["head"]["A"].shape == (5, 48)


def test_a_tied_pair_is_trained_once_for_all_layers_of_a_size():
    adapter, theta_d = planned("tied-lora")
    names = adapter.factors(theta_d).keys()
    assert {"shared.16x16.A", "shared.12x16.B", "layers.2.up.u", "qkv.v.v"} < names
    assert len([name for name in names if name.startswith("shared.")]) == 8  # four sizes
    assert all(len(set(stack)) == len(stack) for stack in adapter.chains.numbers.stacks)  # nor made for each layer


def test_the_singular_vectors_are_those_of_each_layer():
    """The best approximation of rank 3 of what is adapted, (out, in)."""
    adapter, _ = planned("lora-xs")
    kept = frozen_by_name(adapter)
    matrices = {
        "layers.0.up": P["layers"]["up"]["kernel"].swapaxes(1, 2),
        "attn.query": P["attn"]["query"]["kernel"].reshape(1, 16, 12).swapaxes(1, 2),
        "qkv.v": P["qkv"]["kernel"][None, :, 32:].swapaxes(1, 2),
        "qkv.q": P["qkv"]["kernel"][None, :, 2:18].swapaxes(1, 2),
        "head": P["head"]["weight"][None],
    }
    assert kept.keys() == matrices.keys()
    for name, weights in matrices.items():
        U, S, V = np.linalg.svd(np.asarray(weights, np.float64), full_matrices=False)
        best = (U[..., :3] * S[:, None, :3]) @ V[:, :3]
        np.testing.assert_allclose(kept[name]["U"] @ kept[name]["V"], best, atol=1e-5)
        np.testing.assert_allclose(kept[name]["V"] @ kept[name]["V"].swapaxes(1, 2), [np.eye(3)] * len(best), atol=1e-5)


def test_the_singular_vectors_of_a_narrow_weight_are_in_float32():
    adapter, _ = planned("lora-xs", parameters(jnp.bfloat16))
    assert {array.dtype for arrays in adapter.chains.frozen for array in arrays.values()} == {jnp.dtype("float32")}


def test_shapes_are_enough_to_plan_but_for_what_is_made_of_weights():
    shapes = jax.eval_shape(parameters)
    for method in HERE:
        options = {"method": method, **OPTIONS.get(method, {})}
        if method in ("lora-xs", "tinylora"):
            with pytest.raises(TargetError, match=r"attn/query/kernel: this method is made of the weight's values"):
                unilora_jax.plan(shapes, targets(P), **options)
        else:
            assert unilora_jax.plan(shapes, targets(P), **options).spec == planned(method)[0].spec


def test_a_weight_without_singular_vectors():
    bad = parameters()
    bad["head"]["weight"] = bad["head"]["weight"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValuesError, match=r"head/weight: the weight holds NaN or infinity, so it has no singular"):
        planned("lora-xs", bad)


def test_the_summary_names_the_method():
    assert planned("lora")[0].summary() == "θ_d: 944 numbers for D = 944 LoRA parameters of 7 targets"
    assert planned("vera")[0].summary() == "θ_d: 135 numbers for D = 135 (vera) of 7 targets"
    assert "(core)" in planned("lora-xs", grouping="balanced", d=20)[0].summary()


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Method → (path, adapter, θ_d, outputs)."""
    folder, found = tmp_path_factory.mktemp("methods"), {}
    for method in HERE:
        adapter, theta_d = planned(method)
        adapter.save(folder / f"{method}.safetensors", theta_d)
        found[method] = folder / f"{method}.safetensors", adapter, theta_d, outputs(adapter, P, theta_d, X)
    return found


@pytest.fixture(scope="module")
def in_a_new_process(files):
    """Method → outputs of its file."""
    command = [sys.executable, "-W", "error", methods.__file__, *(str(path) for path, *_ in files.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(path).stem: np.array(outputs, np.float32) for path, outputs in json.loads(done.stdout).items()}


@every
def test_a_file_gives_the_same_outputs(files, in_a_new_process, method):
    path, adapter, theta_d, expected = files[method]
    loaded, read = unilora_jax.load(P, path)
    assert loaded.spec == adapter.spec
    assert sorted(loaded.targets, key=str) == sorted(adapter.targets, key=str)
    assert (read == theta_d).all()
    assert (methods.outputs_of(path) == expected).all()
    assert (in_a_new_process[method] == expected).all()


def test_a_file_keeps_the_singular_vectors(files):
    """By layer; they are no trained head, of which `load` would warn."""
    path, adapter, *_ = files["lora-xs"]
    tensors, kept = read_adapter(path).tensors, frozen_by_name(adapter)
    assert len(tensors) == 14
    assert tensors["frozen.layers.1.up.V"].tobytes() == np.asarray(kept["layers.0.up"]["V"][1]).tobytes()
    other = jax.tree.map(lambda leaf: 2 * leaf, P)  # whose singular values are others
    assert (frozen_by_name(unilora_jax.load(other, path)[0])["head"]["U"] == kept["head"]["U"]).all()


def test_a_head_beside_singular_vectors_is_still_named(path):
    adapter, theta_d = planned("lora-xs")
    adapter.save(path, theta_d, tensors={"classifier.weight": np.ones((2, 3), np.float32)})
    with pytest.warns(UserWarning, match=r"the file also holds classifier, trained with"):
        unilora_jax.load(P, path)
    assert "frozen.head.U" in read_adapter(path).tensors


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda array: None, "none"),
        (lambda array: array[:, :2], r"\(3, 2\) float32"),
        (lambda array: array.astype(np.float64), r"\(3, 16\) float64"),
    ],
)
def test_a_file_without_its_singular_vectors(path, files, change, found):
    file = read_adapter(files["lora-xs"][0])
    name = "frozen.layers.1.up.V"
    tensors = file.tensors | {name: change(file.tensors[name])}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save(path, file.spec, file.theta_d, tensors=tensors, metadata=file.metadata)
    with pytest.raises(MismatchError, match=rf"expected the tensor '{name}' \(3, 16\) float32, .*got {found}"):
        unilora_jax.load(P, path)


def test_the_rank_of_a_file_is_bounded_by_what_is_usual_of_its_frame(path):
    """256 is usual for VeRA, however narrow the layer."""
    params = P | {"wide": {"kernel": jnp.zeros((1025, 1025))}}  # which gives reason for more
    for rank, usual in ((256, True), (1025, False)):
        adapter = unilora_jax.plan(params, ["up", "wide"], method="vera", rank=rank)
        adapter.save(path, adapter.init())
        if usual:
            assert unilora_jax.load(params, path)[0].spec == adapter.spec
        else:
            with pytest.raises(MismatchError, match=r"expected a rank of at most 1024 .*any_rank=True"):
                unilora_jax.load(params, path)
            assert unilora_jax.load(params, path, any_rank=True)[0].spec == adapter.spec


@every
def test_the_export_is_the_update(tmp_path, method):
    adapter, theta_d = planned(method)
    adapter.export_lora(tmp_path, theta_d)
    state = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"]
    expected = methods.updates(adapter, theta_d)
    fused = np.zeros((48, 12))
    fused[2:18], fused[32:] = expected.pop("qkv.q"), expected.pop("qkv.v")
    assert set(config["target_modules"]) == {*expected, "qkv"}
    for name, update in {**expected, "qkv": fused}.items():
        A, B = (state[f"base_model.model.{name}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        assert (A.shape[0], B.shape[1]) == (config["r"],) * 2
        np.testing.assert_allclose(B @ A, update, rtol=0, atol=1e-6 * max(1, abs(update).max()))


# ---- the same file in PyTorch ---------------------------------------------------------------------------------------


def twin():
    """The layers of the model in PyTorch, by the same names, without its function."""
    torch = pytest.importorskip("torch", reason="the other half is PyTorch")
    sizes = {f"layers.{i}.up": (16, 16) for i in range(3)} | {"attn.query": (16, 12), "qkv": (12, 48), "head": (48, 8)}
    root = torch.nn.Module()
    for name, shape in sizes.items():
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, torch.nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, torch.nn.Linear(*shape, bias=False))
    weights = {f"layers.{i}.up": P["layers"]["up"]["kernel"][i].T for i in range(3)}
    weights |= {"attn.query": P["attn"]["query"]["kernel"].reshape(16, 12).T, "qkv": P["qkv"]["kernel"].T}
    for name, weight in {**weights, "head": P["head"]["weight"]}.items():
        root.get_submodule(name).weight.data.copy_(torch.from_numpy(np.array(weight)))
    return root


def in_torch(root, x):
    """The model's function."""
    torch = pytest.importorskip("torch", reason="the other half is PyTorch")
    x = torch.from_numpy(np.array(x))
    for i in range(3):
        x = root.get_submodule(f"layers.{i}.up")(x).tanh()
    return root.head(root.qkv(root.get_submodule("attn.query")(x)).tanh()).detach().numpy()


@every
def test_a_file_of_jax_in_torch(files, method):
    unilora_torch = pytest.importorskip("unilora_torch", reason="the other half is PyTorch")
    path, adapter, _, expected = files[method]
    root = twin()
    unilora_torch.load(root, path)
    assert root.unilora.spec == adapter.spec
    np.testing.assert_allclose(in_torch(root, X), expected, rtol=0, atol=1e-5)


@every
def test_a_file_of_torch_in_jax(path, method):
    torch = pytest.importorskip("torch", reason="the other half is PyTorch")
    unilora_torch = pytest.importorskip("unilora_torch", reason="the other half is PyTorch")
    root = twin()
    blocks = [unilora_torch.Target(f"qkv.{name}", "qkv", 12, 16, row) for name, row in (("q", 2), ("v", 32))]
    layers = [unilora_torch.Target(f"layers.{i}.up", f"layers.{i}.up", 16, 16) for i in range(3)]
    others = [unilora_torch.Target("attn.query", "attn.query", 16, 12), unilora_torch.Target("head", "head", 48, 8)]
    adapter = unilora_torch.attach(root, [*blocks, *layers, *others], method=method, **OPTIONS.get(method, {}))
    with torch.no_grad():
        adapter.theta_d.add_(torch.from_numpy(np.array(0.3 * normal(adapter.spec.d, seed=5))))
    adapter.save(path)
    loaded, theta_d = unilora_jax.load(P, path)
    assert loaded.spec == adapter.spec
    found = jax.jit(loaded.factors)(theta_d)
    for name, factor in adapter.factors().items():
        close = {"rtol": 0, "atol": 0} if adapter.spec.map.exact else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(found[name], factor.detach().numpy(), **close)
    np.testing.assert_allclose(outputs(loaded, P, theta_d, X), in_torch(root, X), rtol=0, atol=1e-5)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "verra"}, SpecError, r"unknown method 'verra'; the nearest are vera"),
        ({"method": "lora", "vectors": 3}, SpecError, r"method 'lora' has no option 'vectors'"),
        ({"method": "vb-lora", "topK": 3}, SpecError, r"method 'vb-lora' has no option 'topK'.*known: .*topk"),
        ({"grouping": "balance"}, SpecError, r"unknown grouping 'balance'; the nearest are balanced"),
        ({"method": "lora", "d": 64}, SpecError, r"method 'lora' trains d = 944 numbers here, got d = 64"),
        ({"method": "vb-lora", "d": 64, "length": 2}, SpecError, r"'vb-lora' trains d = \d+ numbers here, got d = 64"),
        ({"method": "vb-lora", "length": 5}, SpecError, r"length = 5 does not divide .*take one that divides"),
        ({"method": "lora-xs", "rank": 9}, SpecError, r"head: expected rank ≤ 8, the singular vectors"),
        ({"method": "vera", "initial": -1.0}, SpecError, r"initial must be a positive number, got -1.0"),
        ({"method": "vb-lora", "length": 2, "start": "identity"}, SpecError, r"not linear, so it has start='paper'"),
        ({"start": "zero"}, SpecError, r"start='zero' with the frame 'pair' would leave every factor at zero"),
        ({"method": "fastfood", "groups": "cached"}, SpecError, r"'fastfood' has no groups to be cached"),
        ({"method": "fastfood", "groups": "stored"}, SpecError, r"groups must be 'computed' or 'cached'"),
        *(
            ({"method": name}, SpecError, rf"plan: the method '{name}' makes ΔW itself.*in PyTorch .*of factors")
            for name in DENSE
        ),
    ],
)
def test_a_plan_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        unilora_jax.plan(P, targets(P), **options)


@pytest.mark.parametrize("method", DENSE)
def test_a_file_of_a_dense_method(path, method):
    sizes = unilora_jax.find_targets(P, ["head"])[0].sizes
    options = {"frequencies": 9} if method == "fourierft" else {}
    spec = plan_spec([("head", sizes)], method=method, options=options)
    written = write_targets([("head", "head", 0, False, None, sizes.in_features, sizes.out_features, 0)])
    save(path, spec, spec.init(), metadata=written)
    with pytest.raises(AdapterFileError, match=rf"{path.name}: its method, '{method}', makes ΔW itself.*in PyTorch"):
        unilora_jax.load(P, path)


def test_a_file_of_another_model(files):
    other = parameters() | {"head": {"weight": normal(9, 3 * 16)}}
    for method in ("vera", "lora-xs"):
        smaller = other | {"attn": {"query": {"kernel": normal(16, 2, 5)}}}
        with pytest.raises(MismatchError, match=r"attn/query/kernel: expected a layer of 16 inputs and at least 12"):
            unilora_jax.load(smaller, files[method][0])


def test_a_rank_for_each_layer(path):
    """The update of each is that of the core; layers of one stack have one rank."""
    ranks = {"up": 3, "query": 2, "qkv.q": 4, "v": 5, "head": 1}
    adapter = unilora_jax.plan(P, targets(P), rank=ranks, d=20, start="paper", bound=1.0)
    theta_d = adapter.init()
    factors = adapter.factors(theta_d)
    assert {len(factor) for name, factor in factors.items() if name.endswith("up.A")} == {3}
    assert [factors[f"{name}.A"].shape[0] for name in ("attn.query", "qkv.v", "qkv.q", "head")] == [2, 5, 4, 1]
    wanted = adapter.spec.layout.split(project(adapter.spec, np.asarray(theta_d)))
    assert all((np.asarray(factor) == wanted[name]).all() for name, factor in factors.items())
    found = outputs(adapter, P, theta_d, X)
    np.testing.assert_allclose(found, model(adapter.merge(P, theta_d), X), rtol=2e-5, atol=2e-5)
    adapter.save(path, theta_d)
    again, theta = unilora_jax.load(P, path)
    assert again.spec == adapter.spec
    np.testing.assert_allclose(outputs(again, P, theta, X), found, rtol=1e-6, atol=1e-6)
    with pytest.raises(
        SpecError, match=r"layers/up/kernel is a stack of 3 layers; expected one rank .* got 2, 3\. Uns"
    ):
        unilora_jax.plan(P, ["up"], rank={"layers.0.up": 2, "up": 3})
