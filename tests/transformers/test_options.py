"""A wrong word is refused before the model runs; the names of unilora_torch are here, too."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_torch
import unilora_transformers
from unilora_core import SpecError


def test_a_wrong_word_is_refused_before_the_model_runs(monkeypatch):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SpecError, match=r"no option 'rnk'; it has none. Is rank meant\?"):
        unilora_transformers.attach(model, rnk=4)


def test_the_same_names_as_unilora_torch():
    for name in ("Adapter", "Bank", "Growth", "Target", "adapters", "switch"):
        assert getattr(unilora_transformers, name) is getattr(unilora_torch, name)
