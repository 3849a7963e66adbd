"""TRL's trainers as they stand: SFT on float and 4-bit bases, DPO against the base itself, GRPO."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import unilora_transformers
from unilora_core import TargetError

trl = pytest.importorskip("trl", reason="TRL is not installed")
Dataset = pytest.importorskip("datasets").Dataset
tokenizers = pytest.importorskip("tokenizers")

# TRL still calls what transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
STEPS = 4


@pytest.fixture(scope="module")
def words():
    """A tokenizer of sixty words."""
    known = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def base(tiny, tmp_path):
    """base() or base("nf4"): a Llama from a folder."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny("LlamaForCausalLM", hidden_size=64, intermediate_size=128, **special).save_pretrained(tmp_path / "base")

    def load(kind="float32"):
        options = {}
        if kind == "nf4":
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what bitsandbytes would like to be installed
            return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    return load


def common(folder):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def logged(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


def sentences(shift, count):
    return [" ".join(f"w{(i + shift + j) % 60}" for j in range(count)) for i in range(16)]


def optimizer(adapter):
    return torch.optim.AdamW(adapter.parameter_groups(2e-2))


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("options", [{"completion_only_loss": True}, {"packing": True, "max_length": 16}])
def test_sft(base, words, tmp_path, kind, options):
    model = base(kind)
    adapter = unilora_transformers.attach(model, "all-linear")
    start = adapter.theta_d.detach().clone()
    prompt, completion = sentences(0, 2), [f" {text}" for text in sentences(2, 4)]
    data = {"text": [a + b for a, b in zip(prompt, completion, strict=True)]}
    if "completion_only_loss" in options:
        data = {"prompt": prompt, "completion": completion}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**common(tmp_path / "run"), **options),
        train_dataset=Dataset.from_dict(data),
        processing_class=words,
        optimizers=(optimizer(adapter), None),
    )
    assert torch.equal(adapter.theta_d, start)  # TRL casts what is trained on a quantised base to bfloat16
    trainer.train()
    assert adapter.theta_d.dtype == torch.float32
    assert (adapter.theta_d != start).all()
    assert logged(trainer)[-1] < logged(trainer)[0]
    state = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert torch.equal(state["unilora.theta_d"], adapter.theta_d)
    assert not (tmp_path / "run" / f"checkpoint-{STEPS}" / "config.json").exists()


def test_an_adapted_output_layer_that_the_fused_loss_passes_by(base, words, tmp_path):
    model = base()
    adapter = unilora_transformers.attach(model, ["q_proj", "lm_head"])
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**common(tmp_path / "run")),
        train_dataset=Dataset.from_dict({"text": sentences(0, 6)}),
        processing_class=words,
        optimizers=(optimizer(adapter), None),
    )
    with pytest.raises(TargetError, match="lm_head: this forward pass does not call the output embeddings"):
        trainer.train()


def test_dpo_against_the_base_itself(base, words, train, tmp_path):
    """The reference is the model with its adapter off: the same numbers as with a copy of the base."""
    pairs = {"prompt": sentences(0, 2), "chosen": [f" {text}" for text in sentences(2, 2)]}
    data = Dataset.from_dict(pairs | {"rejected": [f" {text}" for text in sentences(30, 3)]})
    found = []
    for copied in (False, True):
        model = base()
        adapter = unilora_transformers.attach(model, "all-linear")
        train(adapter)
        reference = base() if copied else unilora_transformers.Reference(model)
        trainer = trl.DPOTrainer(
            model,
            ref_model=reference,
            args=trl.DPOConfig(**common(tmp_path / "run")),
            train_dataset=data,
            processing_class=words,
            optimizers=(optimizer(adapter), None),
        )
        trainer.train()
        found.append([logged(trainer, key) for key in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen")])
    assert found[0] == found[1]
    assert any(found[0][1])  # the policy is not its own reference


def test_the_reference_has_the_outputs_of_the_base_and_no_parameters(base, ids, train):
    model = base().eval()
    expected = model(ids).logits
    adapter = unilora_transformers.attach(model, "all-linear")
    train(adapter)
    reference = unilora_transformers.Reference(model)
    assert torch.equal(reference(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
    assert not list(reference.parameters())
    assert reference.config is model.config
    assert reference.to("cpu") is reference
    assert set(reference.state_dict()) == set(model.state_dict())
    assert list(model.children())[-1] is adapter


def test_what_is_no_reference(base, tiny):
    model = base()
    with pytest.raises(TargetError, match="no adapter to switch off"):
        unilora_transformers.Reference(model)
    unilora_transformers.attach(model, modules_to_save=["lm_head"])
    with pytest.raises(TargetError, match=r"lm_head is trained in full.*copy of the base"):
        unilora_transformers.Reference(model)


def test_grpo(base, words, tmp_path):
    model = base()
    adapter = unilora_transformers.attach(model, "all-linear")
    start = adapter.theta_d.detach().clone()
    options = {"max_completion_length": 4, "num_generations": 4}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(**common(tmp_path / "run"), **options),
        train_dataset=Dataset.from_dict({"prompt": sentences(0, 2)}),
        processing_class=words,
        optimizers=(optimizer(adapter), None),
    )
    trainer.train()
    assert len(logged(trainer)) == STEPS
    assert not torch.equal(adapter.theta_d, start)
