"""A rank for each target, in everything that an adapter goes through."""

import copy
import json

import pytest
import torch
from torch import nn

import unilora_core
import unilora_torch
from unilora_core import MismatchError, SpecError
from unilora_torch import Target

RANKS = {"q": 2, "v": 3, "up": 5, "down": 4}
TARGETS = [
    Target("qkv.q", "qkv", 16, 16),
    Target("qkv.v", "qkv", 16, 16, 32),
    Target("up", "up", 16, 32),
    Target("down", "down", 32, 16),
]


class Model(nn.Module):
    """A fused layer, of which two blocks are adapted, and two plain ones."""

    def __init__(self):
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.down(torch.tanh(self.up(x + torch.tanh(q) * torch.sigmoid(k) * v)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Model()


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def attached(base, rank=RANKS, **options):
    model = copy.deepcopy(base)
    return model, unilora_torch.attach(model, TARGETS, rank=rank, d=40, start="paper", bound=1.0, **options)


def merged_by_hand(base, factors):
    """The base with B·A in its weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for target in TARGETS:
            rows = slice(target.first_row, target.first_row + target.out_features)
            weight = model.get_submodule(target.module).weight
            weight[rows] += factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
    return model


def near(a, b):
    return (a - b).abs().max() <= 2e-6


def test_what_is_computed_merged_and_grown(base):
    model, adapter = attached(base)
    factors = adapter.factors()
    assert {name: factor.shape[0] for name, factor in factors.items() if name.endswith(".A")} == {
        "qkv.q.A": 2,
        "qkv.v.A": 3,
        "up.A": 5,
        "down.A": 4,
    }
    wanted = merged_by_hand(base, factors)(X)
    assert not near(wanted, base(X))
    assert near(model(X), wanted)
    adapter.verify(X)
    adapter.merge()
    assert near(model(X), wanted)
    adapter.unmerge()
    adapter.grow(2)
    assert near(model(X), wanted)


def test_files_and_banks(base, tmp_path):
    model, adapter = attached(base)
    adapter.save(tmp_path / "ranks.safetensors")
    wanted = model(X)
    again = copy.deepcopy(base)
    assert unilora_torch.load(again, tmp_path / "ranks.safetensors").spec == adapter.spec
    assert torch.equal(again(X), wanted)
    other, even = attached(base, rank=7)
    even.save(tmp_path / "even.safetensors")
    with pytest.raises(MismatchError, match="swap expects the same layout"):
        even.swap(tmp_path / "ranks.safetensors")
    bank = unilora_torch.Bank(copy.deepcopy(base))
    bank.add("ranks", tmp_path / "ranks.safetensors")
    bank.add("even", tmp_path / "even.safetensors")
    with bank.rows(["ranks", "even", "ranks"]):
        assert near(bank.model(X), torch.stack([wanted[0], other(X)[1], wanted[2]]))


def test_the_export_is_filled_up_to_one_rank(base, tmp_path):
    """docs/serving.md says why."""
    model, adapter = attached(base)
    adapter.export_lora(tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})
    peft = pytest.importorskip("peft", reason="PEFT is the judge here")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert near(theirs(X), model(X))


def test_the_analysis_counts_what_is_there(base):
    _, adapter = attached(base)
    assert unilora_core.analyze(adapter.spec).D == adapter.spec.D == 2 * 32 + 3 * 32 + 5 * 48 + 4 * 48


def test_ranks_that_do_not_fit_leave_the_model_alone(base):
    before = set(dict(base.named_modules()))
    for rank, message in (({"q": 2}, "there is none for 'qkv.v' in"), (RANKS | {"k": 1}, "no target is called 'k'")):
        with pytest.raises(SpecError, match=message):
            unilora_torch.attach(base, TARGETS, rank=rank)
    assert set(dict(base.named_modules())) == before
    assert all(parameter.requires_grad for parameter in base.parameters())
