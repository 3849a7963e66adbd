"""The run of attach leaves no trace on a model: outputs, attributes, submodules, buffers and configs are as before."""

import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import unilora_transformers

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPARSE = SMALL | {"max_position_embeddings": 256, "block_size": 4, "num_random_blocks": 1, "initializer_range": 0.3}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MODELS = {
    "BigBirdForSequenceClassification": SPARSE,
    "BertModel": SMALL,
    "LongformerModel": SMALL | {"attention_window": 4, "max_position_embeddings": 64},
    "LlamaForCausalLM": SMALL | {"max_position_embeddings": 4, "rope_parameters": ROPE, "num_key_value_heads": 2},
    "GPTNeoXForCausalLM": SMALL | {"bos_token_id": 1, "eos_token_id": 2},
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "SwinModel": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}


def make(name, config):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


def picture(value, known):
    """All that is held, by what it is and by its values; ids tell one object from another."""
    if isinstance(value, torch.Tensor):
        return id(value), tuple(value.shape), value.flatten()[:1000].tolist(), value.requires_grad
    if isinstance(value, dict):
        return [(key, picture(each, known)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [picture(each, known) for each in value]
    if isinstance(value, (nn.Module, transformers.PreTrainedConfig)) and id(value) not in known:
        known[id(value)] = value
        return id(value), picture(vars(value), known)
    return (id(value) if isinstance(value, nn.Module) else repr(value)), type(value)


def everything(model):
    return picture(model, {}), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", MODELS)
def test_attach_and_detach_leave_a_model_as_it_was(name):
    model = make(name, MODELS[name])
    targets = ["in_proj"] if name.startswith("Mamba") else None
    before = everything(model)
    unilora_transformers.attach(model, targets).detach()
    assert everything(model) == before


def test_bigbird_keeps_its_sparse_attention():
    model = make("BigBirdForSequenceClassification", SPARSE)
    ids = torch.arange(5, 101)[None] % 60

    @torch.no_grad()
    def logits():
        np.random.seed(0)  # of its random blocks
        return model(ids).logits

    before = logits()
    adapter = unilora_transformers.attach(model)
    assert model.bert.attention_type == "block_sparse"
    torch.testing.assert_close(logits(), before, rtol=0, atol=1e-5)
    with torch.no_grad():
        adapter.theta_d.normal_()
    assert (logits() - before).abs().max() > 1e-3  # its sparse layers are adapted
