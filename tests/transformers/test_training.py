"""Training as users do it: dtypes, checkpointing, compilation, the Trainer, generation."""

import copy

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import unilora_transformers

CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
"""transformers 5.23 renamed it."""


def enable_checkpointing(model, reentrant):
    getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})


def gradient(model, adapter, **inputs):
    adapter.theta_d.grad = None
    model(**inputs, use_cache=False).loss.backward()
    return adapter.theta_d.grad.clone()


def test_a_bf16_base_keeps_theta_in_float32(tiny, ids):
    model = tiny("LlamaForCausalLM").to(torch.bfloat16)
    adapter = unilora_transformers.attach(model, "all-linear")
    exact = unilora_transformers.attach(tiny("LlamaForCausalLM"), "all-linear")
    assert adapter.theta_d.dtype == torch.float32
    assert torch.equal(adapter.projection.scale, exact.projection.scale)
    grad = gradient(model, adapter, input_ids=ids, labels=ids)
    expected = gradient(exact.model, exact, input_ids=ids, labels=ids)
    assert grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(grad, expected, dim=0) > 0.95


def test_autocast(tiny, ids):
    model = tiny("LlamaForCausalLM")
    adapter = unilora_transformers.attach(model)
    expected = gradient(model, adapter, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        grad = gradient(model, adapter, input_ids=ids, labels=ids)
    assert grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(grad, expected, dim=0) > 0.95


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification"])
def test_gradient_checkpointing(tiny, ids, train, name, reentrant, when):
    """The same gradient in both modes, though no input of a frozen layer requires one."""
    model = tiny(name).train()
    labels = {"input_ids": ids, "labels": ids} if "Llama" in name else {}
    inputs = labels or {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    adapter = unilora_transformers.attach(model, "all-linear", modules_to_save=())
    train(adapter)
    theta_d, expected = adapter.theta_d.detach().clone(), gradient(model, adapter, **inputs)
    adapter.detach()
    if when == "before":
        enable_checkpointing(model, reentrant)
    adapter = unilora_transformers.attach(model, "all-linear", modules_to_save=())
    with torch.no_grad():
        adapter.theta_d.copy_(theta_d)
    if when == "after":
        enable_checkpointing(model, reentrant)
    torch.testing.assert_close(gradient(model, adapter, **inputs), expected, atol=1e-6, rtol=1e-4)


def test_a_loaded_adapter_trains_with_reentrant_checkpointing(tiny, tmp_path):
    unilora_transformers.attach(tiny("ViTForImageClassification")).save(tmp_path / "a.safetensors")
    model = tiny("ViTForImageClassification").train()
    adapter = unilora_transformers.load(model, tmp_path / "a.safetensors")
    enable_checkpointing(model, reentrant=True)
    model(torch.randn(1, 3, 16, 16)).logits.sum().backward()
    assert adapter.theta_d.grad.any()


def test_detach_takes_back_what_checkpointing_needed(tiny):
    model = tiny("ViTForImageClassification").train()
    adapter = unilora_transformers.attach(model)
    enable_checkpointing(model, reentrant=True)
    model(torch.randn(1, 3, 16, 16))
    adapter.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Dynamo makes an instance of the autograd function that it traces, and reads .grad of A and B; PyTorch warns of both.
@pytest.mark.traces
def test_compile_in_one_graph(tiny, ids):
    model = tiny("LlamaForCausalLM").train()
    adapter = unilora_transformers.attach(model, "all-linear")
    expected = gradient(model, adapter, input_ids=ids, labels=ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    adapter.theta_d.grad = None
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(adapter.theta_d.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer(tiny, tmp_path, checkpointing):
    model = tiny("LlamaForCausalLM").train()
    adapter = unilora_transformers.attach(model, "all-linear")
    frozen = model.model.layers[0].self_attn.q_proj.weight.clone()
    options = {f"{CHECKPOINTING}_checkpointing": True} if checkpointing else {}
    row = torch.arange(3, 19)
    data = [{"input_ids": row + i % 8, "labels": row + i % 8} for i in range(64)]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 16
    assert losses[-1] < 0.97 * losses[0]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, frozen)


def test_generate(tiny, ids, train):
    model = tiny("LlamaForCausalLM")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base = model.generate(ids, **options)
    adapter = unilora_transformers.attach(model, "all-linear", rank=8)
    for _ in range(3):
        train(adapter)
    adapted = model.generate(ids, **options)
    assert adapted.shape == base.shape
    assert not torch.equal(adapted, base)
    with adapter.disabled():
        assert torch.equal(model.generate(ids, **options), base)
    adapter.merge()
    assert torch.equal(model.generate(ids, **options), adapted)


def test_deepcopy(tiny, ids, train):
    model = tiny("ViTForImageClassification")
    unilora_transformers.attach(model)
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 16, 16)
    before = model(x).logits
    train(twin.unilora)
    assert torch.equal(model(x).logits, before)
    assert not torch.equal(twin(x).logits, before)
    enable_checkpointing(twin, reentrant=True)
    twin.train()(x).logits.sum().backward()
    assert twin.unilora.theta_d.grad.any()
    assert model.unilora.theta_d.grad is None


def test_only_theta_and_the_head_train(tiny):
    model = tiny("RobertaForSequenceClassification")
    adapter = unilora_transformers.attach(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"unilora.theta_d", *(f"classifier.{n}" for n, _ in model.classifier.named_parameters())}
    groups = adapter.parameter_groups(2e-4, head_rate=1e-3)
    assert [group["lr"] for group in groups] == [adapter.learning_rate(2e-4), 1e-3]
    assert [len(group["params"]) for group in groups] == [1, 4]
