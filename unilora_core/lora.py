"""The factors of plain LoRA, and what its folder holds, whichever framework computed A and B.

Format: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT 0.21 reads and writes them; also read by vLLM,
SGLang and llama.cpp's converter when no module is saved in full.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from unilora_core.errors import SpecError
from unilora_core.layout import Layout

__all__ = ["join_blocks", "lora_config", "lora_layout", "lora_names"]


def lora_layout(layers: Iterable[tuple[str, int, int] | tuple[str, int, int, int]], rank: int) -> Layout:
    """``name.A`` (rank, in_features) and ``name.B`` (out_features, rank) of each layer, in order.

    Args:
        layers: (name, in_features, out_features) of each; with a fourth number other than 0, so many matrices are
            adapted as one: ``name.A`` is (number, rank, in_features), ``name.B`` (number, out_features, rank).

    Raises:
        SpecError: rank < 1.
    """
    if rank < 1:
        raise SpecError(f"expected rank ≥ 1, got {rank}; LoRA ranks are usually 4 to 64.")
    return Layout(
        factor
        for name, in_features, out_features, *experts in layers
        for stack in [tuple(filter(None, experts))]
        for factor in ((f"{name}.A", (*stack, rank, in_features)), (f"{name}.B", (*stack, out_features, rank)))
    )


def join_blocks(blocks: Iterable[tuple[np.ndarray, np.ndarray, int]], height: int) -> tuple[np.ndarray, np.ndarray]:
    """One LoRA for the blocks of one layer (q and v of a fused qkv): the rank is the sum of theirs.

    Args:
        blocks: (A, B, first row) of each: A (r, in), B (out, r), and where its outputs start in the layer's.
        height: the layer's outputs.

    Returns:
        A (Σr, in) and B (height, Σr), zero outside the blocks.
    """
    blocks = list(blocks)
    A = np.concatenate([a for a, _, _ in blocks])
    B, column = np.zeros((height, A.shape[0]), A.dtype), 0
    for _, b, first_row in blocks:
        B[first_row : first_row + b.shape[0], column : column + b.shape[1]] = b
        column += b.shape[1]
    return A, B


def lora_names(module: str) -> tuple[str, str]:
    """The names of A and B in ``adapter_model.safetensors``."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str | None,
    fan_in_fan_out: bool = False,
    modules_to_save: Iterable[str] = (),
) -> dict:
    """``adapter_config.json``. alpha equals r in every layer, so the scaling is 1.

    Args:
        ranks: module → r.
        base_model: name or path of the base model.
        fan_in_fan_out: weights are stored (in, out), as in transformers' Conv1D.
        modules_to_save: modules stored in full.
    """
    rank = max(ranks.values())
    other = {module: r for module, r in ranks.items() if r != rank}
    return {
        "alpha_pattern": other,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": other,
        "target_modules": list(ranks),
        "task_type": None,
    }
