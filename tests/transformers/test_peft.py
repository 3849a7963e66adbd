"""PEFT is the judge of its own formats: its UniLora adapters read and written, and plain LoRA exported."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import unilora_transformers
from unilora_core import AdapterFileError, CorruptFileError, MismatchError, SpecError, TargetError, ValuesError

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = [
    # PEFT asks transformers under the old name, which transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_ADAPTERS = [
    ("LlamaForCausalLM", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    ("LlamaForCausalLM", {"target_modules": ["v_proj", "q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("LlamaForCausalLM", {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("LlamaForCausalLM", {"target_modules": r".*\.(down|gate)_proj", "theta_d_length": 1}),
    ("LlamaForCausalLM", {"target_modules": "all-linear", "theta_d_length": 999, "r": 8}),
    ("LlamaForCausalLM", {"target_modules": ["q_proj"], "save_indices": True, "proj_seed": 7}),
    ("GPT2LMHeadModel", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("GPT2LMHeadModel", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("BertForSequenceClassification", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    ("BertForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 1}),
    ("BertForTokenClassification", {"target_modules": ["dense"], "task_type": "TOKEN_CLS"}),
    ("DistilBertForSequenceClassification", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    ("BertForQuestionAnswering", {"target_modules": ["key"], "modules_to_save": ["qa_outputs"]}),
    ("T5ForConditionalGeneration", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
]


def run(model, ids):
    output = model(input_ids=ids, decoder_input_ids=ids) if model.config.is_encoder_decoder else model(input_ids=ids)
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@pytest.fixture
def saved_by_peft(tiny, ids, tmp_path):
    """make(class_name, **config): a folder that PEFT wrote, and the logits of the model it came from."""

    def make(name, **config):
        model = peft.get_peft_model(tiny(name), peft.UniLoraConfig(**{"r": 3, "theta_d_length": 40} | config)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
            logits = run(model, ids)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits

    return make


@pytest.mark.parametrize(("name", "config"), PEFT_ADAPTERS)
def test_reads_what_peft_wrote(tiny, ids, saved_by_peft, name, config):
    folder, expected = saved_by_peft(name, **config)
    model = tiny(name)
    base = run(model, ids)
    adapter = unilora_transformers.load_peft(model, folder)
    torch.testing.assert_close(run(model, ids), expected, atol=1e-5, rtol=0)
    assert (base - expected).abs().max() > 3e-4
    assert adapter.spec.d == config.get("theta_d_length", 40)


@pytest.mark.parametrize(("name", "config"), PEFT_ADAPTERS)
def test_writes_what_peft_reads(tiny, ids, saved_by_peft, tmp_path, name, config):
    """There and back: the same θ_d, and the same logits in PEFT."""
    folder, expected = saved_by_peft(name, **config)
    adapter = unilora_transformers.load_peft(tiny(name), folder)
    unilora_transformers.save_peft(adapter, tmp_path / "ours")
    theta_d = "base_model.unilora_theta_d"
    assert torch.equal(load_file(tmp_path / "ours" / TENSORS)[theta_d], load_file(folder / TENSORS)[theta_d])
    model = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
    torch.testing.assert_close(run(model, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"targets": "all-linear", "rank": 2, "start": "paper"}),
        ("BertForSequenceClassification", {}),
        ("BertForSequenceClassification", {"targets": "all-linear"}),
        ("RobertaForSequenceClassification", {}),
        ("DistilBertForSequenceClassification", {}),
        ("GPT2LMHeadModel", {}),
        ("GPT2LMHeadModel", {"targets": ["c_attn", "c_proj"]}),
        ("GPT2ForSequenceClassification", {"targets": "all-linear"}),
        ("T5ForConditionalGeneration", {}),
    ],
)
def test_exported_lora_in_peft(tiny, ids, train, tmp_path, name, options):
    model = tiny(name)
    base = run(model, ids)
    adapter = unilora_transformers.attach(model, **options)
    for _ in range(3):
        train(adapter)
    adapter.export_lora(tmp_path)
    expected = run(model, ids)
    assert (base - expected).abs().max() > 1e-3
    found = run(peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval(), ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_exported_lora_merges_in_peft(tiny, ids, train, tmp_path):
    model = tiny("GPT2LMHeadModel")
    adapter = unilora_transformers.attach(model)
    train(adapter)
    adapter.export_lora(tmp_path)
    merged = peft.PeftModel.from_pretrained(tiny("GPT2LMHeadModel"), tmp_path).merge_and_unload()
    torch.testing.assert_close(run(merged, ids), run(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "paper"}, "knows grouping 'numpy-shuffle' only, not 'balanced'"),
        ({"grouping": "numpy-shuffle", "start": "identity"}, "knows start 'paper' only"),
        ({"grouping": "numpy-shuffle", "start": "paper"}, "other layers, blocks or ranks"),
    ],
)
def test_what_peft_cannot_express_is_not_written(tiny, tmp_path, options, message):
    adapter = unilora_transformers.attach(tiny("GPT2LMHeadModel"), **options)
    with pytest.raises(SpecError, match=f"{message}.*export_lora"):
        unilora_transformers.save_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_of_each_targets_own_are_not_written(tiny, tmp_path):
    """PEFT's UniLora has one r."""
    options = {"grouping": "numpy-shuffle", "start": "paper", "rank": {"q_proj": 2, "v_proj": 3}}
    adapter = unilora_transformers.attach(tiny("LlamaForCausalLM"), ["q_proj", "v_proj"], **options)
    with pytest.raises(SpecError, match=r"other layers, blocks or ranks.*export_lora"):
        unilora_transformers.save_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_is_not_written(tiny, tmp_path):
    adapter = unilora_transformers.attach(tiny("LlamaForCausalLM"), grouping="numpy-shuffle", start="paper")
    with torch.no_grad():
        adapter.theta_d[0] = torch.nan
    with pytest.raises(ValuesError, match="NaN"):
        unilora_transformers.save_peft(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (AdapterFileError, "expected peft_type UNILORA, got 'LORA'", {"peft_type": "LORA"}),
        (AdapterFileError, "bias = 'all' is not supported", {"bias": "all"}),
        (AdapterFileError, r"not supported: \['exclude_modules', 'rslora'\]", {"exclude_modules": ["x"], "rslora": 1}),
        (AdapterFileError, "names no modules", {"target_modules": None}),
        (AdapterFileError, "is not what proj_seed gives", {"proj_seed": 8}),
        (MismatchError, "no layer of the model matches", {"target_modules": ["nothing"]}),
        (TargetError, "LlamaMLP is no linear layer", {"target_modules": ["mlp"]}),
        (ValuesError, r"expected 41 finite values.*\(40,\)", {"theta_d_length": 41}),
        (CorruptFileError, "proj_seed: expected an integer, got None", {"proj_seed": None}),
        (SpecError, "rank ≥ 1", {"r": 0}),
    ],
)
def test_refused_by_name(tiny, saved_by_peft, error, message, change):
    folder, _ = saved_by_peft("LlamaForCausalLM", target_modules=["q_proj"], save_indices=True)
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    model = tiny("LlamaForCausalLM")
    with pytest.raises(error, match=message):
        unilora_transformers.load_peft(model, folder)
    assert not hasattr(model, "unilora")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_damaged_folders(tiny, saved_by_peft, tmp_path):
    folder, _ = saved_by_peft("LlamaForCausalLM", target_modules=["q_proj"])
    model, whole = tiny("LlamaForCausalLM"), (folder / TENSORS).read_bytes()

    def refused(error, message):
        with pytest.raises(error, match=message):
            unilora_transformers.load_peft(model, folder)

    (folder / TENSORS).write_bytes(whole[:-4])
    refused(CorruptFileError, "not a whole safetensors file")
    save_file({"base_model.unilora_theta_d": torch.full((40,), torch.nan)}, folder / TENSORS)
    refused(ValuesError, "40 of them NaN")
    save_file({"x": torch.zeros(40)}, folder / TENSORS)
    refused(CorruptFileError, "no tensor 'base_model.unilora_theta_d'")
    save_file({"base_model.unilora_theta_d": torch.zeros(40), "y": torch.zeros(1)}, folder / TENSORS)
    refused(AdapterFileError, r"not supported: \['y'\]")
    (folder / TENSORS).unlink()
    refused(FileNotFoundError, "adapter_model.safetensors")
    (folder / CONFIG).write_text("{")
    refused(CorruptFileError, "not JSON")
    (folder / CONFIG).write_text('{"peft_type": "UNILORA"}')
    refused(CorruptFileError, "are missing")
    shutil.rmtree(folder)
    refused(FileNotFoundError, "adapter_config.json")


def test_another_number_of_labels(tiny, saved_by_peft):
    folder, _ = saved_by_peft("BertForSequenceClassification", target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(MismatchError, match="number of classes"):
        unilora_transformers.load_peft(tiny("BertForSequenceClassification", num_labels=5), folder)


def test_dropout_is_said_to_be_ignored(tiny, saved_by_peft):
    folder, _ = saved_by_peft("LlamaForCausalLM", target_modules=["q_proj"], unilora_dropout=0.5)
    with pytest.warns(UserWarning, match="unilora_dropout = 0.5 is ignored"):
        unilora_transformers.load_peft(tiny("LlamaForCausalLM"), folder)


def test_a_read_adapter_becomes_one_of_ours(tiny, ids, saved_by_peft, tmp_path):
    folder, expected = saved_by_peft("LlamaForCausalLM", target_modules=["q_proj"])
    unilora_transformers.load_peft(tiny("LlamaForCausalLM"), folder).save(tmp_path / "a.safetensors")
    model = tiny("LlamaForCausalLM")
    unilora_transformers.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(run(model, ids), expected, atol=1e-5, rtol=0)


def on_4bit(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def on_disk(folder):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    options = {"device_map": where, "offload_folder": folder / "disk"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("build", [on_4bit, on_disk])
@pytest.mark.parametrize("target_modules", [["v_proj", "q_proj"], r".*\.(q|down)_proj", "all-linear"])
def test_quantised_and_offloaded_bases(tiny, ids, tmp_path, build, target_modules):
    """The same factors as on the plain base, and a file that PEFT loads onto the plain base with the same logits."""
    base = tmp_path / "base"
    tiny("LlamaForCausalLM", hidden_size=64).save_pretrained(base, max_shard_size="40KB")
    plain = transformers.AutoModelForCausalLM.from_pretrained
    config = peft.UniLoraConfig(r=3, theta_d_length=40, target_modules=target_modules, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain(base), config).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in theirs.parameters() if parameter.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 2)
        wanted = theirs(input_ids=ids).logits
    theirs.save_pretrained(tmp_path / "peft")
    model, reference = build(base), plain(base)
    adapter = unilora_transformers.load_peft(model, tmp_path / "peft")
    factors = unilora_transformers.load_peft(reference, tmp_path / "peft").factors()
    assert all(torch.equal(factor, factors[name]) for name, factor in adapter.factors().items())
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with adapter.disabled():
            assert (model(input_ids=ids).logits - adapted).abs().max() > 1e-3
    if build is on_disk:
        torch.testing.assert_close(adapted, wanted, atol=1e-5, rtol=0)
    unilora_transformers.save_peft(adapter, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(plain(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)
