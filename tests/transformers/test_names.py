"""A base may call its own tensors and modules as an adapter calls its parts: each finds its own values again."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unilora_transformers
from unilora_core import MismatchError

X = torch.arange(3, 11)[None]
KINDS = {
    "buffer": lambda owner, name: owner.register_buffer(name, torch.full((2,), 3.0)),
    "parameter": lambda owner, name: owner.register_parameter(name, nn.Parameter(torch.full((2,), 3.0))),
    "module": lambda owner, name: owner.add_module(name, nn.Linear(2, 2)),
}


def make(tiny, place, name, kind, adapter="unilora"):
    model = tiny("BertForSequenceClassification", num_labels=3)
    KINDS[kind](model.get_submodule(place), name)
    return model, unilora_transformers.attach(model, name=adapter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["", "bert.encoder", "classifier"], ids=["top", "inside", "head"])
@pytest.mark.parametrize("name", ["spec", "theta_d", "targets", "base", "live"])
def test_a_base_loads_its_own_state_whatever_its_tensors_are_called(tiny, tmp_path, place, name, kind):
    model, adapter = make(tiny, place, name, kind)
    with torch.no_grad():
        adapter.theta_d.normal_()
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if f".{name}." in f".{key}.":
                value.add_(1)
        expected = model(X).logits
    model.save_pretrained(tmp_path, is_main_process=True)

    whole, _ = make(tiny, place, name, kind)
    whole.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value)
    resumed, _ = make(tiny, place, name, kind)
    missing = resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    for other in (whole, resumed):
        with torch.no_grad():
            assert torch.equal(other(X).logits, expected)


def test_the_spec_of_a_checkpoint_is_still_compared(tiny, tmp_path):
    model, _ = make(tiny, "bert.encoder", "spec", "buffer")
    model.save_pretrained(tmp_path, is_main_process=True)
    other, _ = make(tiny, "bert.encoder", "spec", "buffer", adapter="other")
    with pytest.raises(MismatchError, match="holds an adapter 'unilora'"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
