"""Several adapters of one transformers model, and their folder."""

import torch
import transformers

import unilora_torch
import unilora_transformers


def test_several_adapters_in_one_folder(tmp_path, tiny, ids):
    model, outputs = tiny("BertForSequenceClassification").eval(), {}
    model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    for seed, name in enumerate(("unilora", "other")):
        unilora_torch.switch(model, ())
        adapter = unilora_transformers.attach(model, name=name, d=50 + seed, seed=seed)
        with torch.no_grad():
            adapter.theta_d.mul_(-2)
            model.classifier.weight.fill_(seed + 1)
        outputs[name] = model(ids).logits
    model.save_pretrained(tmp_path / "both")
    files = {path.name for path in (tmp_path / "both").iterdir()}
    assert files == {"README.md", "adapter.safetensors", "adapter-other.safetensors"}
    loaded = unilora_transformers.from_pretrained(tmp_path / "both").eval()
    assert torch.equal(loaded(ids).logits, outputs["unilora"])
    unilora_torch.switch(loaded, "other")
    assert torch.equal(loaded(ids).logits, outputs["other"])


def test_the_class_has_its_own_save_pretrained_again_after_the_last_is_gone(tmp_path, tiny):
    model = tiny("LlamaForCausalLM")
    one = unilora_transformers.attach(model, name="one")
    two = unilora_transformers.attach(model, name="two")
    one.detach()
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter-two.safetensors").is_file()
    two.detach()
    model.save_pretrained(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("adapter*"))
    assert (tmp_path / "whole" / "model.safetensors").is_file()
