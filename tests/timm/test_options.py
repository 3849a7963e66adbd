"""A wrong word is refused before the model runs; the names of unilora_torch are here, too."""

import pytest
import timm

import unilora_timm
import unilora_torch
from unilora_core import SpecError


def test_a_wrong_word_is_refused_before_the_model_runs(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SpecError, match=r"no option 'rnk'; it has none. Is rank meant\?"):
        unilora_timm.attach(model, rnk=4)


def test_the_same_names_as_unilora_torch():
    for name in ("Adapter", "Bank", "Growth", "Target", "adapters", "switch"):
        assert getattr(unilora_timm, name) is getattr(unilora_torch, name)
