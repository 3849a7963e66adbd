"""Merging into 8B weights in bfloat16 and taking it out again: all linear layers of the shapes of Llama-3.1-8B."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import SMOKE

from gpu.llama import base, peft_lora, unilora
from gpu.rows import DEVICE, Row

RANKS = (4,) if SMOKE else (16, 64)
REPEATS = 1 if SMOKE else 5


def rows() -> list[Row]:
    """Method × rank."""
    return [
        Row({"method": method, "rank": rank}, partial(METHODS[method], rank)) for rank in RANKS for method in METHODS
    ]


def with_unilora(rank: int) -> dict[str, Any]:
    """Ours, which keeps the weights that it had."""
    model = unilora(base(), rank)
    return cycles(model.model.layers[0].mlp.up_proj.weight, model.unilora.merge, model.unilora.unmerge)


def with_peft(rank: int) -> dict[str, Any]:
    """PEFT's LoRA, which subtracts what it added."""
    model = peft_lora(base(), rank)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    return cycles(weight, model.merge_adapter, model.unmerge_adapter)


METHODS = {"unilora": with_unilora, "peft-lora": with_peft}


def cycles(weight: torch.Tensor, merge: Callable[[], object], unmerge: Callable[[], object]) -> dict[str, Any]:
    """Median seconds of both, and whether a weight has its bits again after all cycles."""
    before, merging, unmerging = weight.clone(), [], []
    for _ in range(REPEATS):
        merging.append(seconds(merge))
        unmerging.append(seconds(unmerge))
    same = torch.equal(before, weight)
    return {"merge_s": median(merging), "unmerge_s": median(unmerging), "same_bits": same}


def seconds(run: Callable[[], object]) -> float:
    """By the clock, until the device is done."""
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
