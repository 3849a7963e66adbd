"""Saving and loading: one file holds θ_d and the head, and says which model it belongs to."""

import pytest
import torch

import unilora_transformers
from unilora_core import MismatchError, project, read_adapter


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "RobertaForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"]
)
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_saved_and_loaded(tiny, ids, train, tmp_path, name, start):
    adapter = unilora_transformers.attach(tiny(name), start=start, seed=5)
    train(adapter)
    adapter.save(tmp_path / "a.safetensors")
    model = tiny(name)
    loaded = unilora_transformers.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(ids).logits, adapter._root[0](ids).logits)
    assert (loaded.spec, loaded.targets, loaded.modules_to_save) == (
        adapter.spec,
        adapter.targets,
        adapter.modules_to_save,
    )


def test_the_head_is_in_the_same_file_and_core_reads_it(tiny, train, tmp_path):
    model = tiny("BertForSequenceClassification", num_labels=3)
    adapter = unilora_transformers.attach(model)
    train(adapter)
    adapter.save(tmp_path / "a.safetensors")
    file = read_adapter(tmp_path / "a.safetensors")
    assert {name: array.shape for name, array in file.tensors.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    factors = file.spec.layout.split(project(file.spec, file.theta_d))
    for name, factor in adapter.factors().items():
        assert factor.detach().numpy().tobytes() == factors[name].tobytes()


def test_another_number_of_labels(tiny, tmp_path):
    unilora_transformers.attach(tiny("BertForSequenceClassification", num_labels=3)).save(tmp_path / "a.safetensors")
    model = tiny("BertForSequenceClassification", num_labels=2)
    with pytest.raises(MismatchError, match=r"classifier: .*\(3, 32\).*\(2, 32\).*number of classes"):
        unilora_transformers.load(model, tmp_path / "a.safetensors")
    assert not hasattr(model, "unilora")


def test_another_model(tiny, tmp_path):
    unilora_transformers.attach(tiny("LlamaForCausalLM")).save(tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match=r"no module 'model\.layers\.0"):
        unilora_transformers.load(tiny("BertForMaskedLM"), tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match="expected a layer of 32 inputs"):
        unilora_transformers.load(tiny("LlamaForCausalLM", hidden_size=48), tmp_path / "a.safetensors")


def test_save_pretrained_still_works(tiny, ids, train, tmp_path):
    """The Trainer's checkpoints are written so: θ_d is one entry more."""
    model = tiny("LlamaForCausalLM")
    train(unilora_transformers.attach(model))
    model.save_pretrained(tmp_path)
    assert sum(key.startswith("unilora") for key in model.state_dict()) == 1
