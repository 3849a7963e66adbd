"""A training step of ViT-B/16 and ViT-L/16 at 224: time and peak memory of each method, one process each.

Batches of 64 random images, random weights, autocast to bfloat16, AdamW, ten classes; the head trains in every case.
The methods are those of ``benchmarks/vit_b16.py``: query and value of rank 4, where PEFT adapts the fused qkv whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from common import SMOKE
from peft import UniLoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from vit_b16 import CLASSES, RANK, full, lora, peft_lora, unilora

from gpu.rows import DEVICE, Row, fitting
from gpu.timing import step_figures

MODELS = ("vit_tiny_patch16_224",) if SMOKE else ("vit_base_patch16_224", "vit_large_patch16_224")
BATCH = 1 if SMOKE else 64


def head(model: nn.Module) -> nn.Module:
    """The classifier alone."""
    model.requires_grad_(False).get_submodule("head").requires_grad_(True)
    return model


def peft_unilora(model: nn.Module) -> nn.Module:
    """PEFT's UniLora, with as many trained numbers as ours."""
    d = len(model.blocks) * 2 * RANK * (2 * model.embed_dim) // 16
    config = UniLoraConfig(r=RANK, theta_d_length=d, target_modules=["qkv"], modules_to_save=["head"])
    return get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "head": head,
    "unilora": unilora,
    "peft-lora": peft_lora,
    "lora": lora,
    "peft-unilora": peft_unilora,
    "full": full,
}
FORWARD = "frozen, forward"


def rows() -> list[Row]:
    """Model × method."""
    pairs = [(model, method) for model in MODELS for method in (FORWARD, *METHODS)]
    return [Row({"model": model, "method": method}, partial(measured, model, method)) for model, method in pairs]


def measured(model: str, method: str) -> dict[str, Any]:
    """A step, and how many numbers train."""
    torch.manual_seed(0)
    adapted = METHODS.get(method, head)(timm.create_model(model, num_classes=CLASSES)).to(DEVICE).train()
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    labels = torch.randint(0, CLASSES, (BATCH,), device=DEVICE)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def loss() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return cross_entropy(adapted(images), labels)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    run = torch.no_grad()(loss) if method == FORWARD else step
    count = 0 if method == FORWARD else sum(parameter.numel() for parameter in trained)
    return {"trained": count, **fitting(lambda: step_figures(run))}
