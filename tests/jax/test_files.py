"""One file: the same bits and the same predictions in PyTorch and in every style of JAX; and its export to PEFT."""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file

import unilora_core
import unilora_jax
from unilora_core import AdapterFileError, SpecError

torch = pytest.importorskip("torch", reason="the files are exchanged with PyTorch")
unilora_torch = pytest.importorskip("unilora_torch")

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
LAYERS = ["q_proj", "v_proj", "lm_head"]
OPTIONS = {"rank": 3, "d": 90, "bound": 0.3, "grouping": "numpy-shuffle"}  # the grouping that compiles fastest


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the JAX twins.

    Attributes:
        apply: (params, inputs) → logits.
        inwards, outwards: from a layer's name in PyTorch to its name here, and back.
    """

    params: Any
    apply: Callable
    inwards: Callable[[str], str] = str
    outwards: Callable[[str], str] = str


def nnx_form(model):
    nnx = pytest.importorskip("flax.nnx", reason="this twin needs flax")
    graph, state = nnx.split(model)
    return Form(state, lambda state, x: nnx.merge(graph, state)(x))


@functools.cache
def llama_form(style):
    model = twins.torch_llama()
    if style == "stacked":
        return Form(twins.stacked_llama(model), twins.stacked_llama_apply)
    package = "equinox" if style == "eqx" else "flax"
    pytest.importorskip(package, reason=f"this twin needs {package}")
    if style == "nnx":
        return nnx_form(twins.nnx_llama(model))
    if style == "eqx":
        return Form(twins.eqx_llama(model), lambda model, tokens: jax.vmap(model)(tokens))
    module, params = twins.linen_llama(model)
    return Form(
        params,
        lambda params, tokens: module.apply({"params": params}, tokens),
        lambda name: name.replace("layers.", "layers_"),
        lambda name: name.replace("layers_", "layers."),
    )


@pytest.fixture(params=["nnx", "eqx", "linen", "stacked"], scope="module")
def form(request):
    return llama_form(request.param)


@pytest.fixture(scope="module")
def vit():
    pytest.importorskip("flax.nnx", reason="this twin needs flax")
    return nnx_form(twins.nnx_vit(twins.torch_vit()))


@functools.partial(jax.jit, static_argnums=0)
def compiled(apply, adapter, params, theta_d, x):
    return adapter.wrap(apply)(params, theta_d, x), adapter.factors(theta_d)


def run(form, adapter, theta_d, x=TOKENS):
    """(logits, factors) of one compiled program."""
    return compiled(form.apply, adapter, form.params, theta_d, x)


def torch_logits(model, x=TOKENS):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def saved_in_torch(path, model, targets=LAYERS, **options):
    """The model, adapted and moved, whose adapter lies at ``path``."""
    adapter = unilora_torch.attach(model, targets, **OPTIONS | options)
    with torch.no_grad():
        adapter.theta_d.add_(0.3 * torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(1)))
    adapter.save(path)
    return model


def planned(form, targets, **options):
    """An adapter whose layers are called as in PyTorch, and θ_d away from its start."""
    renamed = [
        dataclasses.replace(
            target, names=tuple(map(form.outwards, target.names)), modules=tuple(map(form.outwards, target.modules))
        )
        for target in targets
    ]
    adapter = unilora_jax.plan(form.params, renamed, **OPTIONS | options)
    return adapter, twins.moved(adapter)


def assert_same_bits(path, in_torch, in_jax):
    """NumPy, PyTorch and JAX make one θ_D of the file."""
    spec, theta_d = unilora_core.load_adapter(path)
    wanted = spec.layout.split(unilora_core.project(spec, theta_d))
    assert wanted.keys() == in_torch.keys() == in_jax.keys()
    for name, factor in wanted.items():
        assert factor.any()
        assert factor.shape == in_jax[name].shape
        assert factor.tobytes() == in_torch[name].detach().numpy().tobytes() == np.asarray(in_jax[name]).tobytes()


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# ---- from PyTorch to JAX --------------------------------------------------------------------------------------------


FROM_TORCH = [
    ("nnx", "paper", "balanced"),
    ("eqx", "identity", "iid"),
    ("linen", "identity", "balanced"),
    ("stacked", "paper", "numpy-shuffle"),
]


@pytest.mark.parametrize(("form", "start", "grouping"), FROM_TORCH, indirect=["form"])
def test_a_file_of_torch(path, form, start, grouping):
    model = saved_in_torch(path, twins.torch_llama(), start=start, grouping=grouping)
    adapter, theta_d = unilora_jax.load(form.params, path, rename=form.inwards)
    assert adapter.spec == model.unilora.spec
    found, factors = run(form, adapter, theta_d)
    assert_same_bits(path, model.unilora.factors(), factors)
    assert_close(found, torch_logits(model))
    assert np.abs(found - torch_logits(twins.torch_llama())).max() > 0.1


def test_names_that_differ_need_rename(path):
    saved_in_torch(path, twins.torch_llama())
    form = llama_form("linen")
    message = (
        r"no matrix for the layer 'layers.0.self_attn.q_proj'; the nearest are \['layers_0.self_attn.q_proj'.*rename="
    )
    with pytest.raises(unilora_core.MismatchError, match=message):
        unilora_jax.load(form.params, path)


# ---- from JAX to PyTorch, and to PEFT -------------------------------------------------------------------------------


FROM_JAX = {
    "nnx": {"start": "identity", "grouping": "iid"},
    "eqx": {"start": "identity", "grouping": "numpy-shuffle"},
    "linen": {"start": "paper", "grouping": "iid"},
    "stacked": {"start": "identity", "grouping": "balanced"},
}


@pytest.fixture(params=FROM_JAX, scope="module")
def from_jax(request):
    """(adapter, θ_d, (logits, factors)) of a plan made in JAX."""
    form = llama_form(request.param)
    adapter, theta_d = planned(form, unilora_jax.find_targets(form.params, LAYERS), **FROM_JAX[request.param])
    return adapter, theta_d, run(form, adapter, theta_d)


def loaded_in_torch(path, adapter, theta_d, model):
    adapter.save(path, theta_d)
    unilora_torch.load(model, path)
    return model


def test_a_file_of_jax(path, from_jax):
    adapter, theta_d, (wanted, factors) = from_jax
    model = loaded_in_torch(path, adapter, theta_d, twins.torch_llama())
    assert_same_bits(path, model.unilora.factors(), factors)
    assert_close(torch_logits(model), wanted)


def peft_logits(model, folder, x=TOKENS):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    return torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), x)


def test_peft_loads_the_export(tmp_path, from_jax):
    adapter, theta_d, (wanted, _) = from_jax
    adapter.export_lora(tmp_path, theta_d)
    assert_close(peft_logits(twins.torch_llama(), tmp_path), wanted)


def contents(folder):
    """Tensors as bytes, and the configuration."""
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return (
        {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()},
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")),
    )


def assert_same_export(tmp_path, model, adapter, theta_d, **names):
    model.unilora.export_lora(tmp_path / "torch", base_model="org/base")
    adapter.export_lora(tmp_path / "jax", theta_d, base_model="org/base", **names)
    assert contents(tmp_path / "torch") == contents(tmp_path / "jax")


def test_the_export_is_that_of_torch(tmp_path, path, from_jax):
    adapter, theta_d, _ = from_jax
    model = loaded_in_torch(path, adapter, theta_d, twins.torch_llama())
    assert_same_export(tmp_path, model, adapter, theta_d)


def test_the_export_renames_layers(tmp_path, path):
    model = saved_in_torch(path, twins.torch_llama())
    form = llama_form("linen")
    targets = unilora_jax.find_targets(form.params, LAYERS)
    adapter = unilora_jax.plan(form.params, targets, **OPTIONS)
    adapter.export_lora(tmp_path / "a", adapter.init(), rename=form.outwards)
    renamed, _ = planned(form, targets)
    renamed.export_lora(tmp_path / "b", adapter.init())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")[1]["target_modules"]) == {target.module for target in model.unilora.targets}


@pytest.mark.parametrize(
    ("engine", "rank", "written"), [(None, None, 3), ("vllm", None, 8), (None, 5, 5), ("lorax", 4, 4)]
)
def test_an_export_for_an_engine_has_the_rank_that_it_takes(tmp_path, engine, rank, written):
    params = {"layers": {"q_proj": {"kernel": np.ones((2, 4, 6), np.float32)}}}
    adapter = unilora_jax.plan(params, rank=3, start="paper", bound=0.5)
    theta_d = adapter.init()
    adapter.export_lora(tmp_path, theta_d, base_model="base", rank=rank, engine=engine)
    tensors, config = contents(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (written, written)
    A, B = (
        load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.layers.1.q_proj.lora_{x}.weight"]
        for x in "AB"
    )
    assert (A.shape, B.shape, len(tensors)) == ((written, 4), (6, written), 4)
    factors = adapter.factors(theta_d)
    np.testing.assert_allclose(B @ A, factors["layers.1.q_proj.B"] @ factors["layers.1.q_proj.A"], atol=1e-6)


def test_an_export_that_an_engine_would_not_serve_is_not_written(tmp_path):
    params = {"up": {"kernel": np.ones((4, 6), np.float32)}}
    adapter = unilora_jax.plan(params, rank=3)
    for wrong, error, match in (
        (
            {"engine": "sglang"},
            AdapterFileError,
            r"^sglang .* would not serve this export: .*no buffers for layers named up",
        ),
        ({"engine": "llama.cpp"}, AdapterFileError, "base_model_name_or_path is empty"),
        ({"engine": "nope"}, SpecError, "unknown engine 'nope'; known: vllm"),
        ({"rank": 2}, SpecError, "up: expected rank ≥ 3"),
    ):
        with pytest.raises(error, match=match):
            adapter.export_lora(tmp_path, adapter.init(), **wrong)
        assert not list(tmp_path.iterdir())


def test_a_file_of_jax_loads_where_it_was_made(path, form):
    adapter, theta_d = planned(form, unilora_jax.find_targets(form.params, LAYERS))
    adapter.save(path, theta_d, metadata={"base_model": "twin"})
    other, other_theta_d = unilora_jax.load(form.params, path, rename=form.inwards)
    assert (other.spec, other.targets, other.shapes) == (adapter.spec, adapter.targets, adapter.shapes)
    assert np.array_equal(other_theta_d, theta_d)
    assert unilora_core.read_adapter(path).metadata["base_model"] == "twin"


# ---- blocks of a fused qkv, and a head ------------------------------------------------------------------------------


def fused_in_torch():
    """q and v of the fused qkv, named as in unilora_timm, and a plain layer."""
    blocks = [f"blocks.{i}" for i in range(2)]
    qkv = [
        unilora_torch.Target(f"{block}.attn.qkv.{name}", f"{block}.attn.qkv", 32, 32, first_row)
        for block in blocks
        for name, first_row in (("q", 0), ("v", 64))
    ]
    return qkv + [unilora_torch.Target(f"{block}.mlp.fc1", f"{block}.mlp.fc1", 32, 64) for block in blocks]


def fused_in_jax(params):
    return [
        dataclasses.replace(whole, names=(f"{whole.names[0]}.{name}",), out_features=32, first_row=first_row)
        for whole in unilora_jax.find_targets(params, ["attn.qkv"])
        for name, first_row in (("q", 0), ("v", 64))
    ] + list(unilora_jax.find_targets(params, ["fc1"]))


def channels_last(images):
    return images.transpose(0, 2, 3, 1)


def test_blocks_of_a_fused_layer_from_torch(path, vit):
    model = saved_in_torch(path, twins.torch_vit(), fused_in_torch())
    adapter, theta_d = unilora_jax.load(vit.params, path)
    assert [target.first_row for target in adapter.targets] == [0, 64, 0, 64, 0, 0]
    found, factors = run(vit, adapter, theta_d, channels_last(IMAGES))
    assert_same_bits(path, model.unilora.factors(), factors)
    assert_close(found, torch_logits(model, IMAGES))


def test_blocks_of_a_fused_layer_from_jax(tmp_path, path, vit):
    adapter, theta_d = planned(vit, fused_in_jax(vit.params))
    model = loaded_in_torch(path, adapter, theta_d, twins.torch_vit())
    assert model.unilora.targets == tuple(fused_in_torch())
    wanted, factors = run(vit, adapter, theta_d, channels_last(IMAGES))
    assert_same_bits(path, model.unilora.factors(), factors)
    assert_close(torch_logits(model, IMAGES), wanted)
    assert_same_export(tmp_path, model, adapter, theta_d)
    assert_close(peft_logits(twins.torch_vit(), tmp_path / "jax", IMAGES), wanted)


def test_a_trained_head_is_named_and_can_be_put_in(path, vit):
    nnx = pytest.importorskip("flax.nnx", reason="this twin needs flax")
    model = twins.torch_vit()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    saved_in_torch(path, model, fused_in_torch(), modules_to_save=("head",))
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))}: the file also holds head, .*read_adapter"):
        adapter, theta_d = unilora_jax.load(vit.params, path)
    head = unilora_core.read_adapter(path).tensors
    twin = twins.nnx_vit(twins.torch_vit())
    nnx.update(twin, {"head": {"kernel": head["head.weight"].T, "bias": head["head.bias"]}})
    found, _ = compiled(vit.apply, adapter, nnx.state(twin), theta_d, channels_last(IMAGES))
    assert_close(found, torch_logits(model, IMAGES))


def test_what_is_trained_beside_theta_d_is_saved(path, vit):
    adapter, theta_d = planned(vit, fused_in_jax(vit.params))
    kernel = jnp.arange(6.0).reshape(2, 3)
    adapter.save(path, theta_d, tensors={"head.kernel": kernel})
    assert np.array_equal(unilora_core.read_adapter(path).tensors["head.kernel"], kernel)
    with pytest.warns(UserWarning, match="the file also holds head, trained with θ_d"):
        unilora_jax.load(vit.params, path)


def test_a_head_trained_in_jax_loads_in_torch(path, vit):
    adapter, theta_d = planned(vit, fused_in_jax(vit.params))
    head = {"head.weight": jnp.ones((5, 32)), "head.bias": jnp.arange(5.0)}
    adapter.save(path, theta_d, tensors=head)
    model = twins.torch_vit()
    unilora_torch.load(model, path)
    assert all((model.get_parameter(name).detach().numpy() == tensor).all() for name, tensor in head.items())


def test_a_file_says_the_names_by_which_others_look(path):
    form = llama_form("linen")
    adapter = unilora_jax.plan(form.params, LAYERS, **OPTIONS)
    theta_d = twins.moved(adapter)
    adapter.save(path, theta_d, rename=form.outwards)
    model = twins.torch_llama()
    unilora_torch.load(model, path)
    found, _ = run(form, adapter, theta_d)
    assert_close(found, torch_logits(model))


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_same_losses_from_the_same_file(path):
    optax = pytest.importorskip("optax", reason="this test trains with optax")
    model = saved_in_torch(path, twins.torch_llama(), bound=0.1)
    form = llama_form("stacked")
    adapter, theta_d = unilora_jax.load(form.params, path)
    optimiser = optax.adam(3e-2)

    @jax.jit
    def step(theta_d, state):
        def loss(theta_d):
            found = adapter.wrap(form.apply)(form.params, theta_d, TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(found, TOKENS[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(theta_d)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(theta_d, updates), state, value

    adam = torch.optim.Adam([model.unilora.theta_d], lr=3e-2)
    tokens, state, losses, wanted = torch.from_numpy(TOKENS), optimiser.init(theta_d), [], []
    for _ in range(8):
        theta_d, state, value = step(theta_d, state)
        losses.append(float(value))
        value = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        value.backward()
        adam.step()
        wanted.append(float(value.detach()))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-4)
    assert losses[-1] < losses[0] - 0.1


def test_an_adapter_of_parameters_is_refused(path):
    """A stack of experts that a PyTorch module keeps in one parameter has no layer of its own."""
    layout = unilora_core.Layout([("mlp.experts.up.A", (3, 2, 5)), ("mlp.experts.up.B", (3, 6, 2))])
    rows = json.dumps([["mlp.experts.up", "mlp.experts", 0, False, "up"]])
    spec = unilora_core.ProjectionSpec(layout, 4)
    unilora_core.save_adapter(path, spec, np.zeros(4, np.float32), metadata={"targets": rows})
    with pytest.raises(
        unilora_core.MismatchError, match=r"mlp\.experts\.up adapts the parameter 'up' of a PyTorch module"
    ):
        unilora_jax.load({"mlp.experts": {"kernel": np.ones((5, 6), np.float32)}}, path)
