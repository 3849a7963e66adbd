"""Groups that are computed in each pass: the same numbers as those of the table, and no byte of size D kept."""

import pytest
import torch
from torch import nn

import unilora_torch
from unilora_core import SpecError
from unilora_core.maps import MAPS
from unilora_torch.computed import Computed

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


def test_the_summary_says_what_computes_them():
    cached, computed = both(d=40)
    assert computed.summary().endswith("; groups computed by the core")
    assert "computed" not in cached.summary()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": "none"}, "groups must be 'cached' or 'computed', got 'none'."),
        ({"groups": "computed", "grouping": "numpy-shuffle"}, "groups='computed': those of the grouping"),
        ({"groups": "computed", "method": "lora"}, "groups='computed': those of the grouping 'identity' are"),
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
