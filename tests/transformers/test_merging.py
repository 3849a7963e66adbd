"""merge_checkpoint: the checkpoint that merging the loaded model would give, bit for bit, in bounded memory."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import unilora_torch
import unilora_transformers
from unilora_core import AdapterFileError, CorruptFileError, MismatchError, TargetError, read_adapter, save_adapter
from unilora_transformers.merging import merge_checkpoint

FILE = "a.safetensors"
MODELS = [
    ("LlamaForCausalLM", {}, {}),
    ("LlamaForCausalLM", {"targets": "all-linear", "start": "paper", "rank": 2}, {"tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"targets": ["q_proj", "down_proj"], "rank": {"q_proj": 2, "down_proj": 5}}, {}),
    ("GPT2LMHeadModel", {}, {}),
    ("GPT2LMHeadModel", {"targets": "all-linear"}, {}),
    ("T5ForConditionalGeneration", {}, {}),
    ("Qwen2ForCausalLM", {"targets": "all-linear"}, {}),
    ("BertForSequenceClassification", {}, {"num_labels": 3}),
    ("MixtralForCausalLM", {"targets": ["gate_up_proj", "down_proj", "q_proj"]}, {}),
]


@pytest.fixture
def saved(tiny, train, tmp_path):
    """make(class, options, config, dtype): folder of the base, adapter file, and the merged model."""

    def make(name, options=None, config=None, dtype=torch.float32, max_shard_size="20KB"):
        base = tiny(name, **(config or {})).to(dtype)
        base.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        model = getattr(transformers, name).from_pretrained(tmp_path / "base", dtype=dtype)
        adapter = unilora_transformers.attach(model, **(options or {}))
        train(adapter)
        adapter.save(tmp_path / FILE)
        adapter.detach(merge=True)
        return tmp_path / "base", tmp_path / FILE, model

    return make


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options", "config"), MODELS)
def test_the_same_bits_as_merging_the_loaded_model(saved, tmp_path, name, options, config, dtype):
    base, file, merged = saved(name, options, config, dtype)
    merge_checkpoint(file, base, tmp_path / "out", max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model, report = type(merged).from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tensors(model.state_dict(), merged.state_dict())
    merged.save_pretrained(tmp_path / "wanted")
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "wanted"))
    changed = tensors(tmp_path / "out")
    assert any(not torch.equal(changed[key], value) for key, value in tensors(base).items() if key in changed)


def test_other_files_are_copied_and_config_names_the_class(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"x")
    merge_checkpoint(file, base, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "out").stat().st_mode == base.stat().st_mode


def test_a_new_head_on_a_language_models_checkpoint(tiny, ids, train, tmp_path):
    """The classifier comes from the file, the language model's head goes, and the labels get their names."""
    tiny("BertForMaskedLM").save_pretrained(tmp_path / "base")
    names = {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(tmp_path / "base", **names)
    adapter = unilora_transformers.attach(model, modules_to_save=["classifier", "bert.pooler"])
    train(adapter)
    adapter.save(tmp_path / FILE, {"labels": json.dumps(["bad", "good", "odd"])})
    merge_checkpoint(tmp_path / FILE, tmp_path / "base", tmp_path / "out")
    merged, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.id2label == names["id2label"]
    adapter.merge()
    assert torch.equal(merged.eval()(ids).logits, model.eval()(ids).logits)


def test_names_without_the_base_models_prefix(tiny, train, tmp_path):
    """As GPT-2's checkpoint on the hub: h.0.attn.c_attn.weight."""
    tiny("GPT2Model").save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    adapter = unilora_transformers.attach(model)
    train(adapter)
    adapter.save(tmp_path / FILE)
    merge_checkpoint(tmp_path / FILE, tmp_path / "base", tmp_path / "out")
    adapter.detach(merge=True)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_same_tensors(merged.state_dict(), model.state_dict())
    assert "h.0.attn.c_attn.weight" in tensors(tmp_path / "out")


def test_progress_sees_each_file(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")
    seen = []

    def watch(files):
        for each in files:
            seen.append(each)
            yield each

    merge_checkpoint(file, base, tmp_path / "out", max_shard_size=30_000, progress=watch)
    assert len(seen) > 1
    assert [name for name, _ in seen] == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
def test_memory_is_bounded_by_a_file_and_not_by_the_model(tmp_path):
    """90 MB of weights in files of 8 MB: the peak must stay far below the model's size."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=1400
    )
    model = transformers.LlamaForCausalLM(config)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 85e6
    model.save_pretrained(tmp_path / "base", max_shard_size="8MB")
    unilora_torch.attach(model, ["q_proj", "v_proj"]).save(tmp_path / FILE)
    del model
    code = """
import re, sys, torch, transformers
from unilora_transformers.merging import merge_checkpoint
import transformers.models.llama.modeling_llama
torch.ones(64, 64) @ torch.ones(64, 64)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
merge_checkpoint(*sys.argv[1:4], max_shard_size=8_000_000)
print(peak() - before)
"""
    words = [str(tmp_path / FILE), str(tmp_path / "base"), str(tmp_path / "out")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 8e6 < int(done.stdout) < 45e6, f"{int(done.stdout):,} bytes more than before, the model has {size:,}"


# ---- refused, and nothing written -----------------------------------------------------------------------------------


def refused(tmp_path, error, message, file, base, **options):
    with pytest.raises(error, match=message):
        merge_checkpoint(file, base, tmp_path / "new" / "out", **options)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_another_base(saved, tiny, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")
    other = tiny("LlamaForCausalLM", vocab_size=70)
    other.save_pretrained(tmp_path / "other")
    message = r"it was made for '.*base' \(LlamaForCausalLM\).*\[\[64, 32\]\] there"
    refused(tmp_path, MismatchError, message, file, tmp_path / "other")
    tiny("LlamaForCausalLM", hidden_size=48).save_pretrained(tmp_path / "wide", max_shard_size="20KB")
    refused(tmp_path, MismatchError, "q_proj: expected a layer of 32 inputs", file, tmp_path / "wide")
    state = tensors(base)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0)
    for path in base.glob("model*"):
        path.unlink()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, MismatchError, "values of its norms, biases and embeddings are others", file, base)
    merge_checkpoint(file, base, tmp_path / "sure", check_base=False)
    assert (tmp_path / "sure/model.safetensors").is_file()


def test_a_checkpoint_that_lacks_a_weight(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM", max_shard_size="5GB")
    state = tensors(base)
    for name, message in {
        "model.layers.1.self_attn.q_proj.weight": r"no tensor of the checkpoint is known to become model\.layers\.1",
        "model.layers.1.mlp.up_proj.weight": r"values for model\.layers\.1\.mlp\.up_proj\.weight \(1 such\)",
    }.items():
        less = {key: value for key, value in state.items() if key != name}
        save_file(less, base / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path, MismatchError, message, file, base)


def test_quantised_checkpoints(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM", max_shard_size="5GB")
    state, config = tensors(base), json.loads((base / "config.json").read_text())
    for dtype in (torch.int8, torch.float8_e4m3fn):
        name = "model.layers.0.self_attn.q_proj.weight"
        save_file(state | {name: state[name].to(dtype)}, base / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path, TargetError, f"{name}: a weight of {dtype} cannot take the update; merge into", file, base)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, TargetError, "a quantised checkpoint.*into the unquantised checkpoint", file, base)


def test_a_tied_head_that_was_trained(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM", {"modules_to_save": ["lm_head"]})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(tmp_path, MismatchError, r"lm_head\.weight was trained alone, but this base ties it to", file, base)


def test_folders_and_files(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="full: exists and is not an empty folder"):
        merge_checkpoint(file, base, tmp_path / "full")
    shards = sorted(base.glob("model-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-4])
    refused(tmp_path, CorruptFileError, "not a whole safetensors file", file, base)
    shutil.rmtree(base)
    base.mkdir()
    refused(tmp_path, FileNotFoundError, r"model\.safetensors: no such file; expected a checkpoint", file, base)


def test_a_class_that_transformers_lacks(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")
    stored = read_adapter(file)
    save_adapter(file, stored.spec, stored.theta_d, metadata=stored.metadata | {"base_class": "MyModel"})
    refused(tmp_path, AdapterFileError, r"it adapts a MyModel.*adapter\.detach\(merge=True\)", file, base)


def test_an_error_while_writing_leaves_nothing(saved, tmp_path):
    base, file, _ = saved("LlamaForCausalLM")

    def stop(shards):
        yield from shards[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(file, base, tmp_path / "new" / "out", max_shard_size=30_000, progress=stop)
    assert not (tmp_path / "new").exists()


def test_into_the_current_folder_and_where_permissions_cannot_be_set(saved, tmp_path, monkeypatch):
    base, file, merged = saved("LlamaForCausalLM")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def refused(path, *_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "chmod", refused)
    for out in (".", "../new"):
        merge_checkpoint(file, base, out)
        state = transformers.LlamaForCausalLM.from_pretrained(out).state_dict()
        assert_same_tensors(state, merged.state_dict())


def test_a_config_that_cannot_be_written_is_said_before_the_weights_are(saved, tmp_path, monkeypatch):
    base, file, _ = saved("LlamaForCausalLM")

    def refused(*_, **__):
        raise ValueError("no config")

    monkeypatch.setattr(transformers.LlamaConfig, "save_pretrained", refused)
    with pytest.raises(ValueError, match="no config"):
        merge_checkpoint(file, base, tmp_path / "out", progress=lambda _: pytest.fail("it was merged"))
    assert not (tmp_path / "out").exists()
