"""A file from a stranger: it names a base and harmless settings; nothing else of it reaches a call."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

import unilora_transformers
from unilora_core import AdapterFileError, CorruptFileError, Layout, MismatchError, ProjectionSpec, save_adapter
from unilora_core.lora import lora_layout
from unilora_transformers.merging import merge_checkpoint

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import *
class C(PretrainedConfig):
    model_type = "evil"
class M(PreTrainedModel):
    config_class = C
"""
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def evil(tmp_path):
    """A base whose own code leaves a mark where it runs."""
    folder, mark = tmp_path / "evil", tmp_path / "mark"
    folder.mkdir()
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    return folder


@pytest.fixture
def base(tiny, tmp_path):
    tiny("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def folder_with(tmp_path, layout=None, d=4, scale=1.0, **metadata):
    """An adapter of one q_proj of a tiny Llama, and what its header says beside."""
    spec = ProjectionSpec(layout or lora_layout([(NAME, 32, 32)], 2), d, start="paper")
    folder = tmp_path / "adapter"
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_adapter(folder / "adapter.safetensors", spec, spec.init() * scale, metadata=texts)
    return folder


FORBIDDEN = {
    "trust_remote_code": True,
    "code_revision": "main",
    "token": "secret",
    "use_auth_token": True,
    "device_map": "auto",
    "max_memory": {"cpu": 1},
    "offload_folder": "/tmp",
    "quantization_config": {"load_in_4bit": True},
    "load_in_8bit": True,
    "cache_dir": "/tmp",
    "subfolder": "..",
    "gguf_file": "x.gguf",
    "state_dict": {},
    "config": {},
    "revision": "main",
    "proxies": {},
    "attn_implementation": "somebody/kernel",
    "use_kernels": True,
    "adapter_kwargs": {},
    "torch_dtype": "float16",
    "weights_only": False,
    "from_tf": True,
    "auto_map": {},
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_setting_that_is_the_callers_to_give(tmp_path, evil, name):
    folder = folder_with(
        tmp_path,
        base_model=str(evil),
        base_class="AutoModelForCausalLM",
        base_arguments={"arguments": {name: FORBIDDEN[name]}},
    )
    with pytest.raises(CorruptFileError, match=rf"asks for {name} = .*give {name} yourself"):
        unilora_transformers.from_pretrained(folder)
    assert not (tmp_path / "mark").exists()


def test_code_of_the_base_runs_only_where_the_caller_says_so(tmp_path, evil, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = folder_with(tmp_path, base_model=str(evil), base_class="AutoModelForCausalLM")
    with pytest.raises(AdapterFileError, match=r"cannot be built as AutoModelForCausalLM.*trust_remote_code"):
        unilora_transformers.from_pretrained(folder)
    with pytest.raises((ValueError, AdapterFileError), match="trust_remote_code"):
        merge_checkpoint(folder / "adapter.safetensors", evil, tmp_path / "out")
    assert not (tmp_path / "mark").exists()
    with pytest.raises((AdapterFileError, MismatchError)):  # it is no model; its code ran before that was seen
        unilora_transformers.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "mark").exists()


def test_what_the_caller_gives_takes_the_place_of_what_the_file_says(tmp_path, base):
    folder = folder_with(
        tmp_path,
        base_model=str(base),
        base_class="LlamaForCausalLM",
        base_arguments={"arguments": {"attention_dropout": 0.25, "device_map": "cuda:9"}},
    )
    model = unilora_transformers.from_pretrained(folder, device_map="cpu")
    assert model.config.attention_dropout == 0.25
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    "kind",
    [
        "pipeline",
        "Trainer",
        "AutoTokenizer",
        "AutoConfig",
        "PreTrainedModel",
        "BitsAndBytesConfig",
        "os",
        "__doc__",
        "",
        "LlamaForCausalLM.from_pretrained",
        "models",
        "LlamaConfig",
        "../x",
        "\x1b[2J",
    ],
)
def test_a_class_that_makes_no_model(tmp_path, base, kind):
    folder = folder_with(tmp_path, base_model=str(base), base_class=kind)
    with pytest.raises(AdapterFileError, match=r"no model of transformers|does not say which") as caught:
        unilora_transformers.from_pretrained(folder)
    assert "\x1b" not in str(caught.value)
    if kind:
        with pytest.raises(AdapterFileError, match="no model of transformers"):
            merge_checkpoint(folder / "adapter.safetensors", base, tmp_path / "out")


@pytest.mark.parametrize("name", ["\0", "a\nb", "x" * 5000, "../../nowhere", "https://example.invalid/x", "a//b", "-"])
def test_a_base_that_is_none(tmp_path, name):
    folder = folder_with(tmp_path, base_model=name, base_class="LlamaForCausalLM")
    with pytest.raises(AdapterFileError, match="cannot be built as LlamaForCausalLM") as caught:
        unilora_transformers.from_pretrained(folder)
    assert str(caught.value).isprintable()


def test_settings_of_another_type_or_size(tmp_path, base):
    for name, value in {"num_labels": "3", "img_size": 10**9, "hidden_dropout_prob": True, "depth": 0}.items():
        folder = folder_with(
            tmp_path,
            base_model=str(base),
            base_class="LlamaForCausalLM",
            base_arguments={"arguments": {name: value}},
        )
        with pytest.raises(CorruptFileError, match=f"base_arguments.{name}"):
            unilora_transformers.from_pretrained(folder)


# ---- one function checks a file, whoever ---------------------------------------------------------------------------

ROWS = {
    "counted from the end": ([["q", NAME, -8, False]], ["q"], MismatchError, "expected a layer of 32 inputs"),
    "beyond the layer": ([["q", NAME, 17, False]], ["q"], MismatchError, "expected a layer of 32 inputs"),
    "the same rows twice": ([["q", NAME, 0, False], ["k", NAME, 8, False]], "qk", Exception, "adapt the same outputs"),
    "one pair for two layers": (
        [["q", NAME, 0, False], ["q", NAME.replace("q_", "o_"), 0, False]],
        ["q"],
        CorruptFileError,
        "two for each, and each once",
    ),
    "no such layer": ([["q", "model.layers.9.q_proj", 0, False]], ["q"], MismatchError, "no module"),
}


@pytest.mark.parametrize("case", ROWS)
def test_load_and_merge_refuse_alike(tiny, base, tmp_path, case):
    rows, names, error, message = ROWS[case]
    layout = Layout([(f"{name}.{f}", s) for name in names for f, s in (("A", (1, 32)), ("B", (16, 1)))])
    file = folder_with(tmp_path, layout, targets=rows, base_model=str(base)) / "adapter.safetensors"
    with pytest.raises(error, match=message) as loaded:
        unilora_transformers.load(tiny("LlamaForCausalLM"), file)
    with pytest.raises(error, match=message) as merged:
        merge_checkpoint(file, base, tmp_path / "out")
    with pytest.raises(error, match=message) as stored:
        unilora_transformers.Bank(tiny("LlamaForCausalLM")).add("x", file)
    assert type(loaded.value) is type(merged.value) is type(stored.value)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_a_dtype_cannot_hold_leaves_nothing(tiny, tmp_path):
    tiny("LlamaForCausalLM").half().save_pretrained(tmp_path / "base")
    file = folder_with(tmp_path, scale=1e5, base_class="LlamaForCausalLM") / "adapter.safetensors"
    with pytest.raises(ValueError, match=rf"{NAME}\.weight: \d+ of its 1024 values would be infinite or NaN"):
        merge_checkpoint(file, tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_rank_beyond_the_layer_is_refused_before_it_is_made(tiny, base, tmp_path):
    layout = lora_layout([(NAME, 32, 32)], 2**40)
    file = folder_with(tmp_path, layout, d=1, base_class="LlamaForCausalLM") / "adapter.safetensors"
    message = f"expected a rank of at most 64 .* the file has {2**40}"
    with pytest.raises(MismatchError, match=message):
        unilora_transformers.load(tiny("LlamaForCausalLM"), file)
    with pytest.raises(MismatchError, match=message):
        merge_checkpoint(file, base, tmp_path / "out")
    with pytest.raises(MismatchError, match=message):
        unilora_transformers.Bank(tiny("LlamaForCausalLM")).add("x", file)


def test_any_rank_where_it_is_asked_for(tiny, base, tmp_path):
    file = folder_with(tmp_path, lora_layout([(NAME, 32, 32)], 70), base_class="LlamaForCausalLM")
    file /= "adapter.safetensors"
    assert unilora_transformers.load(tiny("LlamaForCausalLM"), file, any_rank=True).spec.D == 70 * 64
    unilora_transformers.Bank(tiny("LlamaForCausalLM")).add("x", file, any_rank=True)
    merge_checkpoint(file, base, tmp_path / "out", any_rank=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(model.get_submodule(NAME).weight, tiny("LlamaForCausalLM").get_submodule(NAME).weight)


# ---- PEFT's folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def peft_folder(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    adapter = unilora_transformers.attach(model, ["q_proj"], grouping="numpy-shuffle", start="paper", rank=4, d=40)
    unilora_transformers.save_peft(adapter, tmp_path / "peft")
    return tmp_path / "peft"


def changed(folder, **change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"r": 2**20}, MismatchError, f"q_proj: expected a rank of at most 64 .*the file has {2**20}"),
        ({"r": "4"}, CorruptFileError, r"adapter_config\.json\.r: expected an integer, got '4'"),
        ({"r": True}, CorruptFileError, r"\.r: expected an integer, got True"),
        ({"r": 4.0}, CorruptFileError, r"\.r: expected an integer, got 4\.0"),
        ({"target_modules": 3}, CorruptFileError, "target_modules: expected a string or a list of a string or null"),
        ({"target_modules": "(a+)+$" * 8 + "("}, AdapterFileError, "cannot be matched with the names"),
        (
            {"target_modules": r"(?:(\w|[a-z]|.)+)+[A-Z]"},
            AdapterFileError,
            "cannot be matched with the names .*TimeoutError",
        ),
        ({"target_modules": "x{1000000000}"}, AdapterFileError, "cannot be matched .* too long"),
        ({"target_modules": "(x{999}){999}"}, AdapterFileError, "cannot be matched .* too long"),
        ({"modules_to_save": {"a": 1}}, CorruptFileError, "modules_to_save: expected a list of a string or null"),
        ({"modules_to_save": ["("]}, AdapterFileError, "cannot be matched with the names"),
        ({"layers_to_transform": "all"}, CorruptFileError, "layers_to_transform: expected an integer or a list"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "("},
            AdapterFileError,
            "cannot be matched",
        ),
        ({"unilora_dropout": [1]}, CorruptFileError, "unilora_dropout: expected a finite number"),
        ({"bias": ["none"]}, CorruptFileError, "bias: expected a string"),
        ({"peft_type": []}, AdapterFileError, r"expected peft_type UNILORA, got \[\]"),
        ({"proj_seed": -1}, ValueError, r"expected 0 ≤ seed < 2\^64"),
    ],
)
def test_configs_of_strangers(tiny, peft_folder, change, error, message):
    model = tiny("LlamaForCausalLM")
    with pytest.raises(error, match=message):
        unilora_transformers.load_peft(model, changed(peft_folder, **change))
    assert not hasattr(model, "unilora")


@pytest.mark.parametrize("text", ["[" * 10**5, "\ufeff", "[]", "null", '{"r": 1e999}', '{"r": 1, "r": 2}', "{\xff"])
def test_texts_that_are_no_config(tiny, peft_folder, text):
    (peft_folder / "adapter_config.json").write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
    with pytest.raises(AdapterFileError, match="adapter_config"):
        unilora_transformers.load_peft(tiny("LlamaForCausalLM"), peft_folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_theta_of_another_kind(tiny, peft_folder, dtype):
    from safetensors.torch import load_file

    path = peft_folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="expected 40 finite values of theta_d, got torch"):
        unilora_transformers.load_peft(tiny("LlamaForCausalLM"), peft_folder)


def test_an_export_replaces_another_and_keeps_what_else_is_there(tiny, peft_folder):
    (peft_folder / "notes.txt").write_text("mine")
    adapter = unilora_transformers.load_peft(tiny("LlamaForCausalLM"), peft_folder)
    adapter.export_lora(peft_folder)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"]
    assert sorted(path.name for path in peft_folder.iterdir()) == names[1:]
    assert json.loads((peft_folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    shutil.rmtree(peft_folder)


def test_a_base_whose_config_names_a_kernel_of_the_hub(tmp_path, base):
    config = json.loads((base / "config.json").read_text()) | {"_attn_implementation": "somebody/kernel"}
    (base / "config.json").write_text(json.dumps(config))
    folder = folder_with(tmp_path, base_model=str(base), base_class="LlamaForCausalLM")
    message = "asks for the attention 'somebody/kernel' of the hub, which is code"
    with pytest.raises(AdapterFileError, match=message):
        unilora_transformers.from_pretrained(folder)
    with pytest.raises(AdapterFileError, match=message):
        merge_checkpoint(folder / "adapter.safetensors", base, tmp_path / "out")
    assert unilora_transformers.from_pretrained(folder, attn_implementation="eager").unilora.spec.d == 4


@pytest.mark.parametrize("kind", ["BertModel", "AutoModelForImageClassification"])
def test_a_class_of_another_config(tmp_path, base, kind):
    folder = folder_with(tmp_path, base_model=str(base), base_class=kind)
    with pytest.raises(
        MismatchError, match=f"it adapts a {kind}, which cannot be built of the config of .*LlamaConfig"
    ):
        merge_checkpoint(folder / "adapter.safetensors", base, tmp_path / "out")
