"""The identity of a base: the same in every dtype and order, another for other values or another vocabulary."""

import json

import pytest
import torch
from small_models import adapted, assert_unchanged, mlp, snapshot
from torch import nn

import unilora_torch
from unilora_core import MismatchError, read_adapter, save_adapter
from unilora_core.header import write_identity
from unilora_torch.base import check_base, identity


class Text(nn.Module):
    """Embeddings, a norm and two layers."""

    def __init__(self, rows=50, seed=0, scale=1.0):
        torch.manual_seed(seed)
        super().__init__()
        self.words = nn.Embedding(rows, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.norm.weight.normal_(1, 0.2)
            for parameter in self.parameters():
                parameter.mul_(scale)

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.norm(self.words(ids)))))


def same(model, other):
    try:
        check_base("x", identity(model), identity(other))
    except MismatchError:
        return False
    return True


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_the_same_in_every_dtype(scale):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    copies = [Text(scale=scale).to(dtype) for dtype in dtypes]
    copies += [Text(scale=scale).half().bfloat16(), Text(scale=scale).bfloat16().half()]
    assert all(same(a, b) for a in copies for b in copies)


def test_every_kind_of_value_counts():
    base = Text()
    for name in ("words.weight", "norm.weight", "up.bias"):
        other = Text()
        with torch.no_grad():
            other.get_parameter(name).flatten()[0] *= 1.02
        assert not same(base, other), name
    assert not same(base, Text(seed=1))
    assert not same(base, Text(rows=51))


def test_what_quantisation_changes_does_not_count():
    other = Text()
    other.up.weight = nn.Parameter(torch.zeros(72, 1, dtype=torch.uint8), requires_grad=False)
    assert same(Text(), other)


def test_the_message_names_both_and_what_differs():
    base, other = Text(), Text(rows=51)
    base.name_or_path = "org/base"
    with pytest.raises(
        MismatchError,
        match=r"f: it was made for 'org/base' \(Text\), the model is a Text, and its emb.*"
        r"\[\[50, 12\]\] there, \[\[51, 12\]\] here.*resized.*check_base=False",
    ):
        check_base("f", identity(base), identity(other))
    with pytest.raises(MismatchError, match=r"and \d+ of \d+ values of its norms, biases and embeddings are others"):
        check_base("f", identity(base), identity(Text(seed=1)))
    del other.norm
    other.words = nn.Embedding(50, 12)
    with pytest.raises(MismatchError, match=r"values to compare there, \d+ here \(other norms or biases\)"):
        check_base("f", identity(base), identity(other))


def test_values_that_are_elsewhere_do_not_count():
    base, part = Text(), Text()
    part.norm.to("meta")
    assert same(base, part)
    with torch.no_grad():
        part.up.bias.add_(1)
    assert not same(base, part)
    part.up.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    assert identity(part) is None


@pytest.mark.parametrize("place", [(0, 0), (2, 4), (-1, -1)])
def test_a_weight_that_no_checkpoint_gave_values(place):
    """Some of its values count, where it is said to be one."""
    base, other = Text(), Text()
    with torch.no_grad():
        other.head.weight[0, 1:3] += 1  # these are not looked at
        other.up.weight.add_(1)
        check_base("f", identity(base, fresh=["head.weight"]), identity(other, fresh=["head.weight"]))
        other.head.weight[place] += 1
    assert same(base, other)
    with pytest.raises(MismatchError, match=r"and head\.weight, which no checkpoint gave values .* is another"):
        check_base("f", identity(base, fresh=["head.weight"]), identity(other, fresh=["head.weight"]))


def test_it_is_small_and_reads_little():
    big = nn.ModuleList(nn.LayerNorm(4096, device="meta") for _ in range(500))
    assert len(write_identity(identity(big))["base"]) < 700
    torch.manual_seed(0)
    before = torch.get_rng_state()
    identity(Text())
    assert len(json.dumps(write_identity(identity(Text())))) < 700
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


# ---- in files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    unilora_torch.attach(Text(), ["up"], d=9, modules_to_save=["head"]).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_load_refuses_another_base_and_leaves_it_alone(path):
    model = Text(seed=1)
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"a\.safetensors: it was made for a Text, the model is a Text, and"):
        unilora_torch.load(model, path)
    assert_unchanged(model, before)
    assert unilora_torch.load(model, path, check_base=False).spec.d == 9


def test_load_takes_a_base_in_another_dtype_and_another_head(path):
    model = Text().bfloat16()
    with torch.no_grad():
        model.head.bias.add_(1)
    assert unilora_torch.load(model, path).spec.d == 9


def test_swap_refuses_another_base(path):
    adapter = unilora_torch.attach(Text(seed=1), ["up"], d=9, modules_to_save=["head"])
    before = adapter.theta_d.detach().clone()
    with pytest.raises(MismatchError, match="it was made for a Text"):
        adapter.swap(path)
    assert torch.equal(adapter.theta_d, before)


def test_a_second_adapter_does_not_change_the_base(path):
    model = Text()
    first = unilora_torch.attach(model, ["up"], d=5, name="first")
    with torch.no_grad():
        first.theta_d.add_(1)
    assert unilora_torch.load(model, path).spec.d == 9


def test_a_file_that_does_not_say_is_taken(path):
    file = read_adapter(path)
    assert "base" in file.metadata
    del file.metadata["base"]
    save_adapter(path, file.spec, file.theta_d, tensors=file.tensors, metadata=file.metadata)
    unilora_torch.load(Text(seed=1), path)


def test_an_adapter_saves_the_base_it_was_attached_to():
    model, adapter = adapted()
    assert adapter.base == identity(mlp())
    assert adapter.base == identity(model, exclude=["unilora"])
