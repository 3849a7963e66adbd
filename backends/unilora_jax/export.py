"""Export to plain LoRA, exactly, in PEFT's folder: A = F_1 and B = F_k ⋯ F_2 of each chain."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax import Array
from safetensors.numpy import save_file

from unilora_core.engines import Lora, refuse, served_rank
from unilora_core.files import new_files
from unilora_core.lora import lora_config, lora_state
from unilora_jax.chains import Chains
from unilora_jax.checks import check_finite, checked_theta

__all__ = ["export_lora"]

Block = tuple[np.ndarray, np.ndarray, int]
"""A (r, in), B (out, r), and where their outputs start among the layer's outputs."""


def export_lora(
    chains: Chains,
    folder: str | os.PathLike,
    theta_d: Array,
    base_model: str | None,
    rename: Callable[[str], str],
    rank: int | None,
    engine: str | None,
) -> None:
    """Write both files; see `Adapter.export_lora`."""
    theta_d = checked_theta(chains, theta_d, "export_lora")
    check_finite(theta_d, "export_lora: theta_d")
    blocks, heights = _blocks(chains, theta_d, rename)
    if engine is not None and rank is None:
        rank = served_rank(engine, max(sum(len(A) for A, _, _ in parts) for parts in blocks.values()))
    state, rank = lora_state(blocks, heights, rank)
    says = lora_config(blocks, rank, base_model=base_model)
    if engine is not None:
        refuse(Lora(says, {name: array.shape for name, array in state.items()}), engine)
    said = json.dumps(says, indent=2, sort_keys=True)
    folder = Path(folder)
    with new_files(folder / "adapter_model.safetensors", folder / "adapter_config.json") as (weights, config):
        save_file(state, weights, metadata={"format": "pt"})
        config.write_text(said + "\n", encoding="utf-8")


def _blocks(
    chains: Chains, theta_d: Array, rename: Callable[[str], str]
) -> tuple[dict[str, list[Block]], dict[str, int]]:
    """Compute for each module its blocks, and the number of its outputs."""
    blocks: dict[str, list[Block]] = {}
    heights: dict[str, int] = {}
    for target, (down, up) in zip(chains.targets, chains.low_rank(theta_d), strict=True):
        for i, (name, module) in enumerate(zip(target.names, target.modules, strict=True)):
            A, B = np.asarray(down[i]), np.asarray(up[i]).T
            for factor, values in (("A", A), ("B", B)):
                check_finite(values, f"export_lora: {name}.{factor}")
            blocks.setdefault(rename(module), []).append((A, B, target.first_row))
            heights[rename(module)] = chains.leaves[target.path].outputs
    return blocks, heights
