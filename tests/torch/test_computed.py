"""Groups that are computed in each pass: the same numbers as those of the table, and no byte of size D kept."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

import unilora_torch
from unilora_core import SpecError
from unilora_core.maps import MAPS
from unilora_torch.computed import Computed, _Project, _project, _project_transpose

pytestmark = [
    pytest.mark.traces,
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

GROUPINGS = [name for name, each in MAPS.items() if each.groups is not None and name != "numpy-shuffle"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20), nn.Linear(20, 3))


def both(**options):
    """The same adapter with a table and without, θ_d moved from its start."""
    made = [unilora_torch.attach(model(), groups=groups, rank=3, **options) for groups in ("cached", "computed")]
    for adapter in made:
        with torch.no_grad():
            adapter.theta_d += torch.linspace(-0.1, 0.1, adapter.spec.d)
    return made


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_numbers_and_gradients_of_the_table(grouping, start):
    cached, computed = both(grouping=grouping, start=start, d=40)
    assert isinstance(computed.projection, Computed)
    x = torch.randn(5, 12)
    for adapter in (cached, computed):
        adapter.model(x).square().sum().backward()
    for ours, theirs in zip(computed.factors().values(), cached.factors().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(computed.model(x), cached.model(x))
    assert torch.allclose(computed.theta_d.grad, cached.theta_d.grad, rtol=1e-6, atol=1e-6)


def test_blocks_that_end_inside_factors(monkeypatch):
    monkeypatch.setattr("unilora_torch.computed.BLOCK", 17)
    cached, computed = both(d=31)
    x = torch.randn(4, 12)
    for adapter in (cached, computed):
        adapter.model(x).square().sum().backward()
    assert torch.equal(computed.model(x), cached.model(x))
    assert torch.allclose(computed.theta_d.grad, cached.theta_d.grad, rtol=1e-6, atol=1e-6)


def test_nothing_of_size_D_is_kept():
    cached, computed = both(d=10)
    assert sum(tensor.numel() for tensor in computed.projection.tensors) == 20
    assert sum(tensor.numel() for tensor in cached.projection.tensors) == 20 + cached.spec.D


def test_what_an_adapter_can_do(tmp_path):
    """Files, growth, merging, copies, many θ_d at once, and a load that computes."""
    cached, computed = both(d=40)
    x = torch.randn(4, 12)
    wanted = cached.model(x)
    computed.save(tmp_path / "a.safetensors")
    loaded = unilora_torch.load(model(), tmp_path / "a.safetensors", groups="computed")
    assert isinstance(loaded.projection, Computed)
    assert torch.equal(loaded.model(x), wanted)
    loaded.grow(2)
    assert isinstance(loaded.projection, Computed)
    assert torch.allclose(loaded.model(x), wanted, atol=1e-6)
    computed.merge()
    assert torch.allclose(computed.model(x), wanted, atol=1e-5)
    computed.unmerge()
    several = torch.stack([cached.theta_d.detach(), torch.zeros(40)])
    spans = [slice(0, cached.spec.D)]
    ours = torch.vmap(lambda theta: computed.projection(theta, spans))(several)
    theirs = torch.vmap(lambda theta: cached.projection(theta, spans))(several)
    assert torch.equal(ours, theirs)


def used(model, adapter, x):
    """What it computes, and the gradient of θ_d."""
    adapter.theta_d.grad = None
    output = model(x)
    output.square().sum().backward()
    return output.detach(), adapter.theta_d.grad


def same(found, wanted):
    return all(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_a_compiled_model_is_one_graph(start):
    """Also with another seed, after growth, and of a copy."""
    cached, computed = both(d=40, start=start)
    x = torch.randn(4, 12)
    compiled = torch.compile(computed.model, fullgraph=True, backend="aot_eager")
    assert same(used(compiled, computed, x), used(cached.model, cached, x))
    for adapter in (cached, computed):
        adapter.reseed(dataclasses.replace(adapter.spec, seed=7))
    assert same(used(compiled, computed, x), used(cached.model, cached, x))
    for adapter in (cached, computed):
        adapter.grow(2)
    assert same(used(compiled, computed, x), used(cached.model, cached, x))
    for again in (copy.deepcopy(computed.model), pickle.loads(pickle.dumps(computed.model))):
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
        assert same(used(compiled, again.unilora, x), used(cached.model, cached, x))


def test_an_exported_model_trains():
    cached, computed = both(d=40)
    x, file = torch.randn(4, 12), io.BytesIO()
    torch.export.save(torch.export.export(computed.model, (x,), strict=False), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    assert same(used(exported, exported.unilora, x), used(cached.model, cached, x))


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_the_operators_are_what_they_say(start):
    """Their fake kernels, gradients and schemas, as PyTorch checks them; gradients of gradients."""
    _, computed = both(d=40, start=start)
    P, D = computed.projection, computed.spec.D
    for borders in ([0, D], [100, 150, 3, 40]):
        y = torch.randn(sum(borders[1::2]) - sum(borders[::2]), requires_grad=True)
        theta_d, rest = torch.randn(40, requires_grad=True), (P.scale, P.origin, P.told, borders)
        torch.library.opcheck(_project, (theta_d, *rest))
        torch.library.opcheck(_project_transpose, (y, *rest))
        for function in (_project, _Project.apply):
            squared = lambda theta, function=function, rest=rest: function(theta, *rest) ** 2  # noqa: E731
            torch.autograd.gradcheck(squared, theta_d.detach().double().requires_grad_())
            torch.autograd.gradgradcheck(squared, theta_d.detach().double().requires_grad_())


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_transforms_of_torch_func(start):
    """Gradients, many at once, along any axis, and of gradients."""
    cached, computed = both(d=40, start=start)
    spans, several = [slice(0, 200), slice(60, 90)], torch.randn(3, 40)

    def found(adapter):
        def loss(theta):
            return (adapter.projection(theta, spans) ** 3).sum()

        gradient = torch.func.grad(loss)
        second = torch.func.grad(lambda theta: gradient(theta).square().sum())
        columns = torch.vmap(lambda theta: adapter.projection(theta, spans), in_dims=1, out_dims=1)(several.T)
        return gradient(several[0]), torch.vmap(gradient)(several), second(several[0]), columns

    assert same(found(computed), found(cached))


def test_the_summary_says_what_computes_them():
    cached, computed = both(d=40)
    assert computed.summary().endswith("; groups computed by the core")
    assert "computed" not in cached.summary()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": "none"}, "groups must be 'cached' or 'computed', got 'none'."),
        (
            {"groups": "computed", "grouping": "numpy-shuffle"},
            "groups='computed': the grouping 'numpy-shuffle' has no computed groups",
        ),
        ({"groups": "computed", "method": "lora"}, "groups='computed': the grouping 'identity' has no"),
    ],
)
def test_what_has_no_computed_groups_is_refused(options, text):
    base = model()
    with pytest.raises(SpecError) as raised:
        unilora_torch.attach(base, **options)
    assert str(raised.value).startswith(text)
    assert not hasattr(base, "unilora")


def test_a_table_that_does_not_fit_the_memory_is_refused(monkeypatch):
    def groups(_spec, start=0, stop=None, **_):
        raise MemoryError

    monkeypatch.setattr("unilora_core.ProjectionSpec.groups", groups)
    base = model()
    with pytest.raises(SpecError, match=r"the groups of D = 285 LoRA parameters, 1,140 bytes, .* groups='computed'"):
        unilora_torch.attach(base, rank=3)
    assert not hasattr(base, "unilora")
