"""A training step on the shapes of Llama-3.1-8B: time and peak memory of each method, one process each.

Random weights in bfloat16 made on the device, every linear layer but the output, 4 × 1,024 tokens, autocast to
bfloat16, AdamW, with activations checkpointed and without. Beside the methods stand the frozen model's forward pass,
and its forward and backward pass down to the embedded inputs: what no method can be faster than.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import attach_8b
import torch
from common import SMOKE
from peft import LoraConfig, UniLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import unilora_transformers
from gpu.rows import DEVICE, Row, Skip, fitting
from gpu.timing import step_figures

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SHAPES = attach_8b.SHAPES | (TINY | {"num_key_value_heads": 2} if SMOKE else {})
BATCH, LENGTH = (2, 8) if SMOKE else (4, 1024)
RANKS = (16,) if SMOKE else (16, 4, 64)

Adapt = Callable[[nn.Module, int], nn.Module]
Step = Callable[[], object]


def base() -> nn.Module:
    """The model, frozen, in bfloat16 on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES, tie_word_embeddings=False, use_cache=False)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).train()


# ---- methods ---------------------------------------------------------------------------------------------------------


def unilora(model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """Ours, with its defaults but for the targets and the rank."""
    unilora_transformers.attach(model, "all-linear", rank=rank, **options)
    return model


def peft_lora(model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """PEFT's LoRA; as it comes, its factors are float32."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(model, config, **options)


def peft_unilora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's UniLora, with as many trained numbers as ours."""
    d = round(attach_8b.numbers(model, attach_8b.ALL, 4) / 16)
    return get_peft_model(model, UniLoraConfig(r=rank, theta_d_length=d, target_modules="all-linear"))


def full(model: nn.Module, _rank: int) -> nn.Module:
    """Every weight trains."""
    return model.requires_grad_(True)


METHODS: dict[str, Adapt] = {
    "unilora": unilora,
    "unilora, groups computed": partial(unilora, groups="computed"),
    "peft-lora": peft_lora,
    "peft-lora, bfloat16": partial(peft_lora, autocast_adapter_dtype=False),
    "peft-unilora": peft_unilora,
}
FROZEN = ("frozen, forward", "frozen, to the inputs")


def rows() -> list[Row]:
    """What is most needed first."""
    found = [_row("bfloat16", name) for name in FROZEN]
    found += [_row("bfloat16", name, rank) for rank in RANKS for name in METHODS]
    return [*found, _row("bfloat16", "full"), *(_row("nf4", name, 16) for name in ("unilora", "peft-lora"))]


def _row(weights: str, method: str, rank: int = 0) -> Row:
    settings = {"weights": weights, "method": method} | ({"rank": rank} if rank else {})
    return Row(settings, partial(measured, weights, method, rank))


def measured(weights: str, method: str, rank: int) -> dict[str, Any]:
    """A step with activations checkpointed, and one without; and how many numbers train."""
    model = base() if weights == "bfloat16" else nf4(base())
    adapt = METHODS.get(method, full)
    adapted = model if method in FROZEN else adapt(model, rank)
    step = stepper(adapted, method)
    found: dict[str, Any] = {"trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad)}
    if method != "frozen, forward":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found["checkpointed"] = fitting(lambda: step_figures(step))
        model.gradient_checkpointing_disable()
    return found | {"plain": fitting(lambda: step_figures(step))}


def stepper(model: nn.Module, method: str) -> Step:
    """A function that makes one step."""
    tokens = torch.randint(0, SHAPES["vocab_size"], (BATCH, LENGTH), device=DEVICE)
    if method == "frozen, forward":
        return torch.no_grad()(lambda: loss(model, tokens, input_ids=tokens))
    if method == "frozen, to the inputs":
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        return lambda: loss(model, tokens, inputs_embeds=embedded).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        loss(model, tokens, input_ids=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Of the next token."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return model(**inputs, labels=tokens).loss


def nf4(model: nn.Module) -> nn.Module:
    """Its linear layers but the output in 4 bits, as bitsandbytes loads them.

    Raises:
        Skip: no bitsandbytes.
    """
    if not importlib.util.find_spec("bitsandbytes"):
        raise Skip("bitsandbytes is not installed")
    import bitsandbytes as bnb

    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and not n.endswith("lm_head")]
    for name in names:
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # by which PEFT knows it
    return model
