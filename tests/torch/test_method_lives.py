"""Every method's adapter from attach to detach: its state; on, off, merged; swapped, beside another; its training."""

import copy
import pickle

import pytest
import torch
from methods import METHODS, attached, moved, run
from small_models import assert_same_run, hooks, move
from torch import nn

import unilora_torch
from unilora_core import MismatchError, ValuesError
from unilora_torch.chains import Chains

every_method = pytest.mark.parametrize("method", METHODS)
PLACES = ("linear", "blocks of a linear", "transposed, beside", "embedding", "convolution", "attention", "experts")
every_place = pytest.mark.parametrize("place", PLACES)


# ---- state ----------------------------------------------------------------------------------------------------------


@every_method
def test_the_state_is_theta_d(method):
    base, model, adapter, _ = attached(method)
    assert model.state_dict().keys() - base.state_dict().keys() == {"unilora.theta_d"}
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["unilora.theta_d"]
    assert (adapter.theta_d.shape, adapter.theta_d.dtype) == ((adapter.spec.d,), torch.float32)
    assert not list(adapter.buffers())


@every_method
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_computes_the_same_and_is_its_own(method, copied):
    _, model, adapter, x = moved(method)
    wanted = run(model, adapter, x)
    twin = copied(model)
    with torch.no_grad():
        adapter.theta_d.add_(1)
        for arrays in adapter.chains.frozen.values():
            for array in arrays.values():
                array.zero_()
    for found, expected in zip(run(twin, twin.unilora, x), wanted, strict=True):
        assert torch.equal(found, expected)
    assert twin.unilora.model is twin


@every_method
@every_place
def test_inference_mode_computes_the_same_and_training_goes_on(method, place):
    _, model, adapter, x = moved(method, place)
    wanted = run(model, adapter, x)
    with torch.inference_mode():
        assert torch.allclose(model(x), wanted[0], atol=1e-5)  # attention has another kernel without gradients
    for found, expected in zip(run(model, adapter, x), wanted, strict=True):
        assert torch.equal(found, expected)


@every_method
def test_shapes_without_values(method):
    """A model that went to the meta device still says which shapes it gives, and a copy of it with values computes."""
    _, model, _, x = moved(method)
    wanted = model(x)
    empty = copy.deepcopy(model).to("meta")
    assert (empty(x.to("meta")).shape, empty.unilora.theta_d.device.type) == (wanted.shape, "meta")
    back = empty.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert torch.equal(back(x), wanted)


# ---- on, off, merged ------------------------------------------------------------------------------------------------


@every_method
def test_disabled_and_switched(method):
    base, model, adapter, x = moved(method)
    adapted, plain = model(x), base(x)
    with adapter.disabled():
        assert torch.equal(model(x), plain)
    unilora_torch.switch(model, ())
    assert torch.equal(model(x), plain)
    unilora_torch.switch(model, "unilora")
    assert torch.equal(model(x), adapted)


@every_method
def test_strength(method):
    base, model, adapter, x = moved(method, "blocks of a linear")
    update = model(x) - base(x)
    unilora_torch.switch(model, {"unilora": -0.5})
    torch.testing.assert_close(model(x), base(x) - 0.5 * update, rtol=1e-5, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(model(x), base(x) - 0.5 * update, rtol=1e-5, atol=1e-5)


@every_place
@every_method
def test_merged_is_adapted_and_unmerge_is_exact(method, place):
    base, model, adapter, x = moved(method, place)
    base.requires_grad_(False)
    with torch.no_grad():
        adapted, plain = model(x), base(x)
        adapter.merge()
        torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5 * max(1.0, float(adapted.abs().max())))
        with adapter.disabled():
            assert torch.equal(model(x), plain)
        adapter.unmerge()
        assert torch.equal(model(x), adapted)
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@every_place
@every_method
def test_detach(method, place):
    base, model, adapter, x = moved(method, place)
    adapted = model(x).detach()
    kept = copy.deepcopy(model)
    adapter.detach()
    assert list(model.state_dict()) == list(base.state_dict())
    assert hooks(model) == hooks(base)
    assert torch.equal(model(x), base(x))
    kept.unilora.detach(merge=True)
    assert hooks(kept) == hooks(base)
    torch.testing.assert_close(kept(x), adapted, rtol=1e-5, atol=1e-5 * max(1.0, float(adapted.abs().max())))


@every_method
def test_two_adapters_of_different_methods(method):
    base, model, first, x = moved(method)
    other = unilora_torch.attach(model, method="lora" if method != "lora" else "gpart", name="other")
    move(other, 2)
    outputs = {}
    for names in (("unilora",), ("other",), ("unilora", "other")):
        unilora_torch.switch(model, names)
        outputs[names] = [layer(torch.ones(layer.in_features)) for layer in model if isinstance(layer, nn.Linear)]
    plain = [layer(torch.ones(layer.in_features)) for layer in base if isinstance(layer, nn.Linear)]
    for both, one, two, none in zip(
        outputs["unilora", "other"], outputs[("unilora",)], outputs[("other",)], plain, strict=True
    ):
        torch.testing.assert_close(both, one + two - none, rtol=1e-5, atol=1e-5)
    other.detach()
    unilora_torch.switch(model, "unilora")
    assert torch.equal(model(x), moved(method)[1](x))


@every_method
def test_rename(method):
    _, model, adapter, x = moved(method)
    wanted = model(x)
    adapter.rename("mine")
    assert list(unilora_torch.adapters(model)) == ["mine"]
    assert torch.equal(model(x), wanted)


# ---- another file in its place --------------------------------------------------------------------------------------


@every_method
def test_swap(tmp_path, method):
    """What is frozen and follows from the seed is another's, too."""
    _, other, theirs, x = moved(method, seed=7)
    move(theirs, 2)
    theirs.save(tmp_path / "other")
    _, model, adapter, _ = moved(method)
    theta_d, before = adapter.theta_d, model(x)
    adapter.swap(tmp_path / "other")
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), before)
    assert adapter.theta_d is theta_d
    assert adapter.spec == theirs.spec


OTHERS = [
    ("lora", "vera", {}, r"same frame as the attached adapter's \(scaled\), the file has pair; detach the adapter"),
    ("vera", "lora", {}, "same frame"),
    ("gpart", "fourierft", {}, "same frame"),
    (
        "lora-xs",
        "tinylora",
        {"rank": 3},
        r"same kind of map as the attached adapter's \(gaussian\), the file has ident",
    ),
    (
        "gpart",
        "intrinsic-dimension",
        {},
        r"same kind of map as the attached adapter's \(fastfood\), the file has balanced",
    ),
    ("uni-lora", "lora", {}, "same kind of map"),
    ("fastfood", "gaussian", {}, r"same kind of map as the attached adapter's \(gaussian\), the file has fastfood"),
    (
        "vera",
        "vera",
        {"initial": 0.2},
        r"same options as the attached adapter's \(.*'initial': 0.2.*file has .*'initial': 0.1",
    ),
    ("vera", "vera", {"rank": 4}, "same options"),
    ("fourierft", "fourierft", {"scaling": 10.0}, "same options"),
    ("vb-lora", "vb-lora", {"topk": 1}, "same options"),
    ("lora-xs", "lora-xs", {"rank": 2}, "same options"),
    ("tied-lora", "tied-lora", {"rank": 2}, "same options"),
    ("gpart", "gpart", {"d": 49}, "same d as"),
]


@pytest.mark.parametrize(("file", "method", "options", "text"), OTHERS)
def test_a_swap_that_is_refused(tmp_path, file, method, options, text):
    moved(file)[2].save(tmp_path / "other")
    _, model, adapter, x = moved(method, **options)
    before, spec = model(x), adapter.spec
    with pytest.raises(MismatchError, match=text):
        adapter.swap(tmp_path / "other")
    assert adapter.spec is spec
    assert torch.equal(model(x), before)


def test_a_swap_between_gathers(tmp_path):
    _, other, theirs, x = moved("gpart", grouping="iid", seed=3)
    theirs.save(tmp_path / "other")
    _, model, adapter, _ = moved("gpart")
    adapter.swap(tmp_path / "other")
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("method", ["vera", "lora-xs", "gaussian"])
def test_a_swap_that_fails_halfway_is_undone(tmp_path, monkeypatch, method):
    moved(method, seed=7)[2].save(tmp_path / "other")
    _, model, adapter, x = moved(method)
    before = run(model, adapter, x)
    failures, copied = iter([KeyboardInterrupt()]), Chains.copy_

    def copy_(self, frozen):
        copied(self, frozen)
        for failure in failures:
            raise failure

    monkeypatch.setattr(Chains, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        adapter.swap(tmp_path / "other")
    for found, wanted in zip(run(model, adapter, x), before, strict=True):
        assert torch.equal(found, wanted)


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_vector_that_was_stepped_in_between():
    """The gradient of a map that is not linear needs θ_d as it was; of another map it does not."""
    for method in ("vb-lora", "gaussian"):
        _, model, adapter, x = moved(method)
        output = model(x)
        with torch.no_grad():
            adapter.theta_d.mul_(2)
        if method == "gaussian":
            output.sum().backward()
        else:
            with pytest.raises(ValuesError, match="theta_d was changed between the forward and the backward pass"):
                output.sum().backward()


@every_method
@pytest.mark.traces
def test_a_compiled_model_is_one_graph(method):
    torch.compiler.reset()
    _, model, adapter, x = moved(method)
    wanted = run(model, adapter, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_run(run(compiled, adapter, x), wanted)
    torch.compiler.reset()


@every_method
@pytest.mark.traces
def test_an_exported_model_trains(method):
    _, model, adapter, x = moved(method)
    wanted = run(model, adapter, x)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert_same_run(run(exported, exported.unilora, x), wanted)


@every_method
def test_a_second_gradient_is_that_of_the_first(method):
    """Against differences of the first; a map that is not linear has none, and says so."""
    _, model, adapter, x = moved(method)
    model.double(), torch.nn.Module.double(adapter)
    x, theta_d, before = x.double(), adapter.theta_d, adapter.theta_d.detach().clone()

    def gradient(step=0.0, way=0.0, **how):
        with torch.no_grad():
            theta_d.copy_(before + step * way)
        return torch.autograd.grad(model(x).square().sum(), theta_d, **how)[0]

    first = gradient(create_graph=True)
    if adapter.spec.map.transpose is None:
        with pytest.raises(ValuesError, match="is not linear, and has no second gradient here"):
            torch.autograd.grad(first.square().sum(), theta_d)
        return
    (found,) = torch.autograd.grad(first.square().sum(), theta_d)
    way = 2 * first.detach()
    expected = (gradient(1e-3, way / way.norm()) - gradient(-1e-3, way / way.norm())) * way.norm() / 2e-3
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


LEAST = dict.fromkeys(METHODS, 0.93) | {"tinylora": 0.993}  # which has 8 numbers here
"""What is left of the loss at most."""


@every_method
def test_the_rate_of_parameter_groups_learns(method):
    """Twenty steps towards a base whose weights were moved, at what would be LoRA's usual rate."""
    options = {"vera": {"rank": 64}, "vb-lora": {"vectors": 32, "length": 16}, "fourierft": {"frequencies": 100}}
    base = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    teacher, x = copy.deepcopy(base), torch.randn(64, 64)
    with torch.no_grad():
        for layer in (teacher[0], teacher[2]):
            layer.weight.add_(0.5 * layer.weight.std() * torch.randn_like(layer.weight))
        y = teacher(x)
    adapter = unilora_torch.attach(base, method=method, **options.get(method, {}))
    optimiser, losses = torch.optim.Adam(adapter.parameter_groups(2e-3)), []
    for _ in range(21):
        value = (base(x) - y).square().mean()
        losses.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert losses[-1] < LEAST[method] * losses[0], losses
    assert max(losses[1:]) < 1.05 * losses[0]
