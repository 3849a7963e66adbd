"""The Trainer as it stands: what its checkpoints hold, how it goes on from them, and on which bases."""

import copy
import logging
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments

import unilora_transformers
from unilora_core import AdapterFileError, MismatchError, ValuesError, read_adapter
from unilora_torch import switch

STEPS = 6


def rows(count=24):
    row = torch.arange(3, 15)
    return [{"input_ids": row + i % 8, "labels": row + i % 8} for i in range(count)]


def arguments(folder, **options):
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | options,
    )


def trainer_of(model, folder, rate=1e-2, data=None, **options):
    groups = model.unilora.parameter_groups(rate)
    data = data or rows()
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data[:8],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}),
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def llama(tiny):
    def make(**options):
        model = tiny("LlamaForCausalLM")
        unilora_transformers.attach(model, "all-linear", **options)
        return model

    return make


@pytest.fixture
def classifier(tiny):
    def make():
        model = tiny("RobertaForSequenceClassification", num_labels=3)
        unilora_transformers.attach(model)
        return model

    data = [{"input_ids": torch.arange(3, 11) + i % 8, "labels": torch.tensor(i % 3)} for i in range(24)]
    return make, data


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_holds_what_is_trained(llama, tmp_path):
    model = llama()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert files(checkpoint) >= {"adapter.safetensors", "model.safetensors", "README.md", "optimizer.pt"}
    assert not files(checkpoint) & {"config.json", "generation_config.json", "pytorch_model.bin"}
    state = load_file(checkpoint / "model.safetensors")
    assert set(state) == {"unilora.theta_d", "unilora.spec"}
    assert torch.equal(state["unilora.theta_d"], model.unilora.theta_d)
    assert read_adapter(checkpoint / "adapter.safetensors").spec == model.unilora.spec
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert [value["exp_avg"].shape for value in moments.values()] == [model.unilora.theta_d.shape]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 60_000


def test_the_head_is_in_the_checkpoint(classifier, tmp_path):
    make, data = classifier
    trainer = trainer_of(make(), tmp_path, data=data)
    trainer.train()
    names = {f"classifier.{name}" for name, _ in trainer.model.classifier.named_parameters()}
    state = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert set(state) == {"unilora.theta_d", "unilora.spec"} | names


@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_resuming_goes_on_exactly(llama, classifier, tmp_path, kind, caplog):
    make, data = (llama, rows()) if kind == "llama" else classifier
    options = {"data": data, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    whole = trainer_of(make(), tmp_path / "whole", **options)
    whole.train()
    again = trainer_of(make(), tmp_path / "again", **options)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert torch.equal(again.model.unilora.theta_d, whole.model.unilora.theta_d)
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


def test_the_best_checkpoint_is_loaded_at_the_end(llama, tmp_path):
    model = llama()
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = trainer_of(model, tmp_path, rate=0.3, load_best_model_at_end=True, **every)
    trainer.train()
    evaluated = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)
    state = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(model.unilora.theta_d, state["unilora.theta_d"])


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 7}, r"'unilora' was trained with \{'seed': 0\}, the model's has \{'seed': 7\}"),
        ({"d": 64}, r"with \{.*'d': 232.*\}, the model's has \{.*'d': 64.*\}"),
        ({"rank": 2}, r"'layout': '[0-9a-f]{16}'"),
        ({"name": "mine"}, r"holds an adapter 'unilora', the model has \['mine'\]"),
    ],
)
def test_a_resume_from_another_spec_is_refused(llama, tiny, tmp_path, other, text):
    trainer_of(llama(), tmp_path, max_steps=3).train()
    before = (tmp_path / "checkpoint-3" / "adapter.safetensors").read_bytes()
    model = tiny("LlamaForCausalLM")
    adapter = unilora_transformers.attach(model, "all-linear", **other)
    theta_d = adapter.theta_d.detach().clone()
    groups = {"params": adapter.parameter_groups(1e-2)}
    options = {"train_dataset": rows(), "optimizer_cls_and_kwargs": (torch.optim.AdamW, groups)}
    trainer = Trainer(model, arguments(tmp_path), **options)
    with pytest.raises(MismatchError, match=text):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(adapter.theta_d, theta_d)
    assert (tmp_path / "checkpoint-3" / "adapter.safetensors").read_bytes() == before


def test_a_whole_state_dict_is_still_whole(llama):
    """The leniency is for checkpoints that say what they are."""
    model = llama()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"unilora.theta_d": model.unilora.theta_d})
    assert not model.load_state_dict(model.state_dict()).missing_keys


def test_the_scheduler_keeps_the_ratio_of_the_rates(classifier, tmp_path):
    make, data = classifier
    model = make()
    trainer = trainer_of(model, tmp_path, data=data, lr_scheduler_type="cosine", warmup_steps=2, max_steps=4)
    ratio = model.unilora.learning_rate(1e-2) / 1e-2
    trainer.train()
    theta, head = trainer.lr_scheduler.base_lrs
    assert theta / head == pytest.approx(ratio)
    seen = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert max(seen) == pytest.approx(theta)


def test_saved_models_come_back(classifier, tmp_path):
    make, data = classifier
    trainer = trainer_of(make(), tmp_path, data=data, max_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    ids = torch.arange(3, 11)[None]
    trainer.model.eval()
    expected = trainer.model(ids).logits
    for folder in (tmp_path / "final", tmp_path / "checkpoint-3"):
        fresh = make()
        fresh.unilora.detach()
        loaded = unilora_transformers.from_pretrained(folder, fresh)
        assert loaded is fresh
        assert torch.equal(loaded.eval()(ids).logits, expected)


@pytest.fixture
def base(tiny, tmp_path):
    """A base model in a folder, as it lies on the hub."""
    tiny("LlamaForCausalLM", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_from_pretrained_builds_the_base(tiny, ids, train, tmp_path):
    tiny("BertForSequenceClassification", num_labels=2).save_pretrained(tmp_path / "base")
    kinds = {0: "dull", 1: "so-so", 2: "good"}
    cls = type(tiny("BertForSequenceClassification"))
    names = {"num_labels": 3, "id2label": kinds, "ignore_mismatched_sizes": True}
    model = cls.from_pretrained(tmp_path / "base", **names).eval()
    train(unilora_transformers.attach(model))
    model.save_pretrained(tmp_path / "adapter")
    assert files(tmp_path / "adapter") == {"adapter.safetensors", "README.md"}
    loaded = unilora_transformers.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is cls
    assert loaded.config.id2label == kinds
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    half = unilora_transformers.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.unilora.theta_d.dtype == torch.float32


def test_several_adapters_are_saved_and_loaded(base, ids, train, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    train(unilora_transformers.attach(model))
    train(unilora_transformers.attach(model, name="second", seed=3, rank=2))
    model.save_pretrained(tmp_path / "both")
    assert files(tmp_path / "both") == {"adapter.safetensors", "adapter-second.safetensors", "README.md"}
    loaded = unilora_transformers.from_pretrained(tmp_path / "both").eval()
    assert (loaded.unilora.spec, loaded.second.spec) == (model.unilora.spec, model.second.spec)
    switch(loaded, ["unilora", "second"])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_the_model_card(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = unilora_transformers.attach(model, seed=5)
    model.name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    for line in ("library_name: unilora", "base_model: someone/base", "base_model_relation: adapter"):
        assert f"\n{line}\n" in text
    assert f"| unilora | uni-lora | {adapter.spec.d:,} | {adapter.spec.D:,} | 4 | 5 | balanced |" in text
    (tmp_path / "adapter" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"


def test_what_cannot_be_loaded(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter\.safetensors in it; give the folder"):
        unilora_transformers.from_pretrained(tmp_path)
    model = tiny("LlamaForCausalLM")
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path / "a")
    match = r"a/adapter\.safetensors: expected the folder .*, got a file; give \S*/a, or .* load\(model, path\)"
    for file in (tmp_path / "a/adapter.safetensors", str(tmp_path / "a/adapter.safetensors")):
        with pytest.raises(NotADirectoryError, match=match):
            unilora_transformers.from_pretrained(file)
    with pytest.raises(AdapterFileError, match=r"base_model = None, base_class = 'LlamaForCausalLM'.*model=model"):
        unilora_transformers.from_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match=r"\['dtype'\] are for loading the base"):
        unilora_transformers.from_pretrained(tmp_path / "a", tiny("LlamaForCausalLM"), dtype=torch.float16)


@pytest.mark.parametrize("name", ["caf\udce9/base", Path("a") / "path", "x" * 5000, "nul\0byte", "a: [yaml"])
def test_no_name_of_a_base_costs_what_was_trained(llama, tiny, tmp_path, name):
    model = llama()
    model.name_or_path = name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unilora: the name of the base model")
        model.save_pretrained(tmp_path, is_main_process=True)
    loaded = unilora_transformers.from_pretrained(tmp_path, tiny("LlamaForCausalLM"))
    assert torch.equal(loaded.unilora.theta_d, model.unilora.theta_d)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("base_model:" in card) == (name == Path("a/path"))


def test_a_name_that_is_no_text_is_said_to_be_left_out(llama, tmp_path):
    model = llama()
    model.name_or_path = "caf\udce9"
    with pytest.warns(UserWarning, match=r"the name of the base model, 'caf\\udce9', is left out"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved(llama, tmp_path, wrap):
    model = llama()
    with torch.no_grad():
        model.unilora.theta_d.mul_(2)
    state = wrap(model).state_dict()
    assert "unilora.theta_d" not in state
    model.save_pretrained(tmp_path, state_dict=state, is_main_process=True)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["unilora.theta_d"], model.unilora.theta_d)


@pytest.mark.parametrize("said", [{"is_main_process": True}, {"state_dict": None}, {"state_dict": {}}, {}])
def test_what_a_trainer_resumes_from_is_written_where_a_trainer_asks(llama, tmp_path, said):
    """The Trainer of transformers up to 5.22 gives the state alone, None where it is the model's own."""
    model = llama()
    if "state_dict" in said and said["state_dict"] is not None:
        said = {"state_dict": model.state_dict()}
    model.save_pretrained(tmp_path, **said)
    assert ("model.safetensors" in files(tmp_path)) == bool(said)


def test_an_empty_state_dict_writes_nothing_and_says_so(llama, tmp_path):
    """As the Trainer has it where DeepSpeed keeps the values to itself."""
    with pytest.warns(UserWarning, match=r"no adapter is written to .*: the state_dict is empty"):
        llama().save_pretrained(tmp_path / "none", state_dict={}, is_main_process=True)
    assert not (tmp_path / "none").exists()


def test_a_diverged_adapter_is_not_saved(llama, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        model.unilora.theta_d[0] = float("nan")
    with pytest.raises(ValuesError, match="NaN"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_and_resumes_itself(llama, train, tmp_path, how):
    model = llama()
    twin = how(model)
    train(twin.unilora)
    twin.save_pretrained(tmp_path, is_main_process=True)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["unilora.theta_d"], twin.unilora.theta_d)
    assert not torch.equal(state["unilora.theta_d"], model.unilora.theta_d)
    model.load_state_dict(state)
    assert torch.equal(model.unilora.theta_d, twin.unilora.theta_d)


def test_detach_gives_the_methods_back(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    before = set(vars(model))
    first = unilora_transformers.attach(model)
    second = unilora_transformers.attach(model, name="second")
    first.detach()
    assert "save_pretrained" in vars(model)
    second.detach()
    assert set(vars(model)) == before
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks
    model.save_pretrained(tmp_path)
    assert "config.json" in files(tmp_path)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def nf4(base):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what bitsandbytes would like to be installed
        return lambda: AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


def test_an_nf4_base(nf4, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(nf4(), arguments(tmp_path))
    model = nf4()
    adapter = unilora_transformers.attach(model, "all-linear")
    start = adapter.theta_d.detach().clone()
    every = {"eval_strategy": "steps", "eval_steps": 1}  # evaluation must not stop gradients
    whole = trainer_of(model, tmp_path / "whole", **every)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert (adapter.theta_d != start).all()
    again = nf4()
    unilora_transformers.attach(again, "all-linear")
    resumed = trainer_of(again, tmp_path / "again", **every)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    adapter.detach()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path))


def test_4_bit_layers_that_have_run_in_eval_mode(nf4, ids):
    """Gradients flow back through them, and are those of their weights in float32."""
    bnb = pytest.importorskip("bitsandbytes")
    model = nf4()
    with torch.no_grad():
        model.eval()(ids)
    adapter = unilora_transformers.attach(model, "all-linear")
    grads = []
    for _ in range(2):
        adapter.theta_d.grad = None
        model.train()(ids, labels=ids).loss.backward()
        grads.append(adapter.theta_d.grad)
        with torch.no_grad():
            model.eval()(ids)
    dense = AutoModelForCausalLM.from_pretrained(model.name_or_path).train()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(weight)
    exact = unilora_transformers.attach(dense, "all-linear")
    dense(ids, labels=ids).loss.backward()
    for grad in grads:
        torch.testing.assert_close(grad, exact.theta_d.grad, atol=1e-6, rtol=1e-3)


def test_theta_d_stays_float32_under_a_cast_of_its_data(nf4):
    """As TRL casts what is trained on a quantised base."""
    adapter = unilora_transformers.attach(nf4())
    before = adapter.theta_d.detach().clone()
    adapter.theta_d.data = adapter.theta_d.data.to(torch.bfloat16)
    assert adapter.theta_d.dtype == torch.float32
    assert torch.equal(adapter.theta_d, before)
    adapter.theta_d.data = torch.zeros_like(before)
    assert not adapter.theta_d.any()


CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_loss(llama, tmp_path, reentrant):
    plain = trainer_of(llama(), tmp_path, save_strategy="no")
    plain.train()
    options = {f"{CHECKPOINTING}_checkpointing": True}
    options |= {f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    other = trainer_of(llama(), tmp_path, save_strategy="no", **options)
    other.train()
    assert losses(other) == pytest.approx(losses(plain), rel=1e-6)


def test_bf16_autocast(llama, tmp_path):
    trainer = trainer_of(llama(), tmp_path, bf16=True, save_strategy="no")
    trainer.train()
    exact = trainer_of(llama(), tmp_path, save_strategy="no")
    exact.train()
    assert trainer.model.unilora.theta_d.dtype == torch.float32
    assert losses(trainer) == pytest.approx(losses(exact), rel=2e-2)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_dispatched_base(base, tmp_path, ids, where):
    """Layers on the disk are fetched for each pass and dropped again; θ_d is where its model computes."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": where}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"} if where == "disk" else {}
    model = AutoModelForCausalLM.from_pretrained(base, **options or {"device_map": {"": "cpu"}})
    plain = AutoModelForCausalLM.from_pretrained(base)
    grads = []
    for each in (model, plain):
        adapter = unilora_transformers.attach(each, "all-linear")
        each.train()(ids, labels=ids).loss.backward()
        grads.append(adapter.theta_d.grad)
    torch.testing.assert_close(*grads)


def as_under_zero3(model):
    """The shapes that DeepSpeed's ZeRO-3 presents outside of its engine."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)


def test_the_shapes_of_zero3(tiny, tmp_path):
    expected = unilora_transformers.attach(tiny("LlamaForCausalLM"), "all-linear")
    model = tiny("LlamaForCausalLM")
    as_under_zero3(model)
    adapter = unilora_transformers.attach(model, "all-linear")
    assert (adapter.spec, adapter.targets) == (expected.spec, expected.targets)
    whole = model.state_dict() | {"unilora.theta_d": adapter.theta_d.detach().clone()}
    as_under_zero3(adapter)
    with pytest.raises(ValuesError, match=r"unilora\.theta_d: .*ZeRO-3; gather them: .*accelerator\.get_state_dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict=whole)
    assert read_adapter(tmp_path / "adapter.safetensors").theta_d.shape == (adapter.spec.d,)
