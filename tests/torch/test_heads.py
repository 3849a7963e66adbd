"""modules_to_save: a head that cannot train beside a frozen base is refused."""

import pytest
import torch
from small_models import assert_unchanged, mlp, snapshot
from torch import nn

import unilora_torch
from unilora_core import MismatchError, TargetError


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.up(self.words(ids)))


@pytest.mark.parametrize(("head", "other"), [("head", "words.weight"), ("words", "head.weight")])
def test_a_tied_head(head, other):
    model = Tied()
    before = snapshot(model)
    message = rf"modules_to_save: {head}\.weight is tied, it is also {other}; training one would change the other"
    with pytest.raises(TargetError, match=message):
        unilora_torch.attach(model, ["up"], d=5, modules_to_save=[head])
    assert_unchanged(model, before)


def test_both_ends_of_a_tie_may_train():
    adapter = unilora_torch.attach(Tied(), ["up"], d=5, modules_to_save=["head", "words"])
    assert adapter.modules_to_save == ("head", "words")


def test_a_file_with_a_head_that_is_tied_here(tmp_path):
    loose, tied = Tied(), Tied()
    loose.head.weight = nn.Parameter(loose.head.weight.detach().clone())
    tied.load_state_dict(loose.state_dict())
    unilora_torch.attach(loose, ["up"], d=5, modules_to_save=["head"]).save(tmp_path / "a.safetensors")
    before = snapshot(tied)
    with pytest.raises(TargetError, match=r"head\.weight is tied"):
        unilora_torch.load(tied, tmp_path / "a.safetensors", check_base=False)
    assert_unchanged(tied, before)


def test_a_head_without_values():
    model = mlp()
    model.head.to("meta")
    with pytest.raises(TargetError, match=r"head\.weight is on the meta device .* cannot train"):
        unilora_torch.attach(model, ["up"], d=5, modules_to_save=["head"])


def test_the_shapes_of_a_head_are_compared(tmp_path):
    adapter = unilora_torch.attach(mlp(), ["up"], d=5, modules_to_save=["head"])
    adapter.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    with pytest.raises(MismatchError, match=r"head: the file holds .*\(3, 6\).*the model expects .*\(4, 6\)"):
        unilora_torch.load(mlp(classes=4), tmp_path / "a.safetensors")
