"""Several adapters on one model: named, switched, weighted, renamed, swapped, merged for good."""

import copy

import pytest
import torch
from small_models import mlp

import unilora_torch
from unilora_core import MismatchError, TargetError, ValuesError

pytestmark = pytest.mark.traces

X = torch.linspace(-1, 1, 18).reshape(3, 6)
KINDS = {
    "french": {"rank": 2, "d": 37, "seed": 1},
    "german": {"rank": 3, "d": 11, "seed": 2, "targets": ["blocks.0.up", "head"], "grouping": "iid", "start": "paper"},
}


def plural():
    """A model with two adapters of different rank, d, seed, targets, grouping and start, both away from their start."""
    model = mlp()
    for name, options in KINDS.items():
        adapter = unilora_torch.attach(model, name=name, **options)
        with torch.no_grad():
            adapter.theta_d.add_(torch.linspace(-0.5, 0.5, adapter.spec.d))
    return model, *unilora_torch.adapters(model).values()


def updates(model, adapter):
    return {target.module: adapter.delta_weight(target) for target in adapter.targets}


def with_updates(*weighted):
    """The base with these (adapter, weight) added to its weights: the reference."""
    model = mlp()
    with torch.no_grad():
        for adapter, weight in weighted:
            for target in adapter.targets:
                A, B = (adapter.factors()[f"{target.name}.{side}"] for side in "AB")
                model.get_submodule(target.module).weight += weight * (B @ A)
    return model(X)


def test_the_names_of_the_adapters():
    model, french, german = plural()
    assert unilora_torch.adapters(model) == {"french": french, "german": german}
    assert (model.french, french.name, german.name) == (french, "french", "german")
    assert {"french.theta_d", "german.theta_d"} < model.state_dict().keys()
    assert unilora_torch.adapters(mlp()) == {}


def test_updates_add_up():
    model, french, german = plural()
    torch.testing.assert_close(model(X), with_updates((french, 1), (german, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "weights"),
    [
        ("french", (1, 0)),
        (["german"], (0, 1)),
        (("french", "german"), (1, 1)),
        ({"french": 0.7, "german": -0.3}, (0.7, -0.3)),
        ((), (0, 0)),
    ],
)
def test_switch(to, weights):
    model, french, german = plural()
    unilora_torch.switch(model, to)
    torch.testing.assert_close(
        model(X), with_updates(*zip((french, german), weights, strict=True)), rtol=1e-5, atol=1e-5
    )
    assert (french.theta_d.requires_grad, german.theta_d.requires_grad) == tuple(weight != 0 for weight in weights)


def test_an_unknown_name_changes_nothing():
    model, french, german = plural()
    unilora_torch.switch(model, "french")
    with pytest.raises(TargetError, match=r"no adapter 'greek'; it has \['french', 'german'\]"):
        unilora_torch.switch(model, ["german", "greek"])
    assert french.enabled
    assert not german.enabled


def test_the_gradient_of_a_weighted_adapter():
    model, french, _ = plural()
    unilora_torch.switch(model, {"french": 0.5, "german": 1.0})
    model(X).square().sum().backward()
    found = french.theta_d.grad.clone()
    step = 1e-3 * torch.linspace(-1, 1, french.spec.d)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            french.theta_d.add_(sign * step)
            losses.append(model.double()(X.double()).square().sum().item())
            french.theta_d.sub_(sign * step)
    assert (found @ step).item() == pytest.approx((losses[0] - losses[1]) / 2, rel=1e-2)


def test_the_latest_trains_and_the_others_are_frozen():
    model, french, german = plural()
    assert (french.theta_d.requires_grad, german.theta_d.requires_grad) == (False, True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"german.theta_d"}


@pytest.mark.parametrize("order", [("french", "german"), ("german", "french")])
def test_detached_one_after_the_other(order):
    model, *_ = plural()
    first, second = (getattr(model, name) for name in order)
    first.detach()
    assert list(unilora_torch.adapters(model)) == [order[1]]
    torch.testing.assert_close(model(X), with_updates((second, 1)), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "theta_d" not in name)
    second.detach()
    assert torch.equal(model(X), mlp()(X))
    assert all(p.requires_grad for p in model.parameters())


def test_each_adapter_keeps_a_head_of_its_own(tmp_path):
    model, outputs = mlp(), {}
    for value, name in enumerate(("one", "two")):
        unilora_torch.switch(model, ())
        adapter = unilora_torch.attach(model, name=name, d=5, seed=value, modules_to_save=["head"])
        with torch.no_grad():
            model.head.weight.fill_(value + 1)
            adapter.theta_d.mul_(-2)
        outputs[name] = model(X)
    for name in ("one", "two", "one"):
        unilora_torch.switch(model, name)
        assert torch.equal(model(X), outputs[name])
        assert model.head.weight.requires_grad
    model.two.save(tmp_path / "two")  # it is off, and its head is not the model's
    fresh = mlp()
    unilora_torch.load(fresh, tmp_path / "two")
    assert torch.equal(fresh(X), outputs["two"])


def test_two_adapters_with_one_head_do_not_act_together():
    model = mlp()
    unilora_torch.attach(model, name="one", d=5, modules_to_save=["head"])
    with pytest.raises(TargetError, match=r"'one' and 'two' both save 'head'.*switch\(model, \(\)\)"):
        unilora_torch.attach(model, name="two", d=5, modules_to_save=["head"])
    assert list(unilora_torch.adapters(model)) == ["one"]
    unilora_torch.switch(model, ())
    unilora_torch.attach(model, name="two", d=5, modules_to_save=["head"])
    with pytest.raises(TargetError, match="'one' and 'two' both save 'head'"):
        unilora_torch.switch(model, ["one", "two"])
    assert model.two.enabled
    assert not model.one.enabled


def test_rename():
    model, french, german = plural()
    before = model(X)
    french.rename("français")
    assert unilora_torch.adapters(model) == {"german": german, "français": french}
    assert torch.equal(model(X), before)
    with pytest.raises(TargetError, match="already has an adapter 'german'"):
        french.rename("german")
    with pytest.raises(TargetError, match=r"'blocks' cannot be an adapter's name.*give another name="):
        french.rename("blocks")
    assert french.name == "français"


@pytest.mark.parametrize("name", ["forward", "a.b", "blocks"])
def test_names_that_cannot_be(name):
    model = mlp()
    with pytest.raises(TargetError, match="cannot be an adapter's name"):
        unilora_torch.attach(model, name=name)
    assert all(p.requires_grad for p in model.parameters())


def test_each_is_saved_and_loaded_alone(tmp_path):
    model, french, german = plural()
    wanted = model(X)
    for name, adapter in unilora_torch.adapters(model).items():
        adapter.save(tmp_path / name)
    fresh = mlp()
    for name in KINDS:
        unilora_torch.load(fresh, tmp_path / name, name=name)
    assert torch.equal(fresh(X), wanted)


def test_a_copy_of_the_model_has_its_own_adapters():
    model, french, _ = plural()
    other = copy.deepcopy(model)
    unilora_torch.switch(other, "german")
    assert other.french is not french
    assert french.enabled
    assert torch.equal(other.german.theta_d, model.german.theta_d)


# ---- merging --------------------------------------------------------------------------------------------------------


def test_only_one_is_merged_at_a_time():
    model, french, german = plural()
    wanted = model(X)
    french.merge()
    with pytest.raises(TargetError, match=r"the adapter 'french' is merged; unmerge it, or detach\(merge=True\)"):
        german.merge()
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    french.unmerge()
    assert torch.equal(model(X), wanted)


def test_switching_off_a_merged_adapter_takes_it_out():
    model, french, german = plural()
    french.merge()
    unilora_torch.switch(model, "german")
    torch.testing.assert_close(model(X), with_updates((german, 1)), rtol=1e-5, atol=1e-5)


def test_merged_for_good():
    model, french, german = plural()
    wanted = model(X)
    french.detach(merge=True)
    german.detach(merge=True)
    assert unilora_torch.adapters(model) == {}
    assert model.state_dict().keys() == mlp().state_dict().keys()
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)


def test_merging_for_good_what_is_merged_already():
    model, french, german = plural()
    french.merge()
    merged = copy.deepcopy(model.state_dict())
    french.detach(merge=True)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def test_a_diverged_adapter_is_not_merged_and_stays():
    model, french, _ = plural()
    with torch.no_grad():
        french.theta_d[0] = torch.nan
    with pytest.raises(ValuesError, match="NaN"):
        french.detach(merge=True)
    assert french.name == "french"


def test_a_merged_strength_counts():
    model, french, german = plural()
    unilora_torch.switch(model, {"french": 0.5})
    french.merge()
    torch.testing.assert_close(model(X), with_updates((french, 0.5)), rtol=1e-5, atol=1e-5)


# ---- swap -----------------------------------------------------------------------------------------------------------


def saved(path, **options):
    """A file of an adapter away from its start, and its outputs."""
    model = mlp()
    adapter = unilora_torch.attach(model, **options)
    with torch.no_grad():
        adapter.theta_d.mul_(-0.5)
        if "modules_to_save" in options:
            model.head.weight.fill_(0.25)
    adapter.save(path)
    return model(X)


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("options", [{"seed": 7}, {"seed": 7, "grouping": "iid"}, {"modules_to_save": ["head"]}])
def test_swap(tmp_path, options, start):
    wanted = saved(tmp_path / "other", d=11, start=start, **options)
    model = mlp()
    adapter = unilora_torch.attach(model, d=11, start=start, modules_to_save=options.get("modules_to_save", ()))
    theta_d = adapter.theta_d
    adapter.swap(tmp_path / "other")
    assert torch.equal(model(X), wanted)
    assert adapter.theta_d is theta_d
    assert (adapter.spec.seed, adapter.spec.grouping) == (options.get("seed", 0), options.get("grouping", "balanced"))


def test_swap_does_not_compile_again(tmp_path):
    wanted = saved(tmp_path / "other", d=11, seed=7)
    model, compiled = mlp(), []
    adapter = unilora_torch.attach(model, d=11)
    torch.compiler.reset()
    run = torch.compile(model, backend=lambda graph, _inputs: compiled.append(1) or graph.forward)
    run(X)
    before = len(compiled)
    adapter.swap(tmp_path / "other")
    torch.testing.assert_close(run(X), wanted, rtol=1e-5, atol=1e-5)
    assert len(compiled) == before > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"d": 12}, r"same d as the attached adapter's \(11\), the file has 12; detach the adapter"),
        ({"d": 11, "rank": 3}, "same layout as"),
        ({"d": 11, "targets": ["head"]}, "same targets as"),
        ({"d": 11, "start": "paper"}, r"same start as the attached adapter's \(identity\), the file has paper"),
        ({"d": 11, "modules_to_save": ["head"]}, "same targets as"),
    ],
)
def test_swap_refuses_what_has_another_shape(tmp_path, options, text):
    saved(tmp_path / "other", **options)
    model = mlp()
    adapter = unilora_torch.attach(model, d=11)
    before = model(X)
    with pytest.raises(MismatchError, match=text):
        adapter.swap(tmp_path / "other")
    assert torch.equal(model(X), before)


def test_a_merged_adapter_is_not_swapped(tmp_path):
    saved(tmp_path / "other", d=11)
    adapter = unilora_torch.attach(mlp(), d=11)
    adapter.merge()
    with pytest.raises(TargetError, match="swap: the adapter is merged"):
        adapter.swap(tmp_path / "other")
