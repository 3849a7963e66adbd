"""The factors of plain LoRA and the contents of its folder, whichever framework computed A and B.

The format is
``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT 0.21 reads and writes them. Every layer has the same
rank and alpha equals it, because few servers read PEFT's ``rank_pattern`` (see docs/serving.md).
"""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from unilora_core.errors import MismatchError, SpecError
from unilora_core.layout import Layout

__all__ = [
    "BLOCKS",
    "check_rank",
    "join_blocks",
    "largest_rank",
    "lora_config",
    "lora_layout",
    "lora_names",
    "lora_state",
]

USUAL = 64
"""The largest rank that LoRA is usually given, in narrow layers too."""

BLOCKS = 4
"""The number of blocks of the largest rank that one weight may have in a file; q, k and v are three."""

Block = tuple[np.ndarray, np.ndarray, int]
"""A (r, in), B (out, r), and where their outputs start among the layer's outputs."""


def lora_layout(layers: Iterable[tuple[str, int, int] | tuple[str, int, int, int]], rank: int) -> Layout:
    """Make the layout of plain LoRA: ``name.A`` (rank, in_features) and ``name.B`` (out_features, rank) of each layer.

    Args:
        layers: (name, in_features, out_features) of each, in order; a fourth number other than 0 is the number of
            matrices that are adapted as one: ``name.A`` is (number, rank, in_features), ``name.B`` (number,
            out_features, rank).

    Raises:
        SpecError: the rank is below 1.
    """
    if rank < 1:
        raise SpecError(f"expected rank ≥ 1, got {rank}; LoRA ranks are usually 4 to 64.")
    return Layout(
        factor
        for name, in_features, out_features, *experts in layers
        for stack in [tuple(filter(None, experts))]
        for factor in ((f"{name}.A", (*stack, rank, in_features)), (f"{name}.B", (*stack, out_features, rank)))
    )


def largest_rank(in_features: int, out_features: int, usual: int = USUAL) -> int:
    """Return the rank up to which a file is trusted: min(in, out), beyond which B·A gains nothing, or a usual rank (a
    frame's ``usual``) where that is larger. So the model bounds what a file makes of it.
    """
    return max(min(in_features, out_features), usual)


def check_rank(
    where: str | os.PathLike, name: str, rank: int, in_features: int, out_features: int, usual: int = USUAL
) -> None:
    """Refuse factors of a file that are larger than their layer gives reason for.

    Raises:
        MismatchError: the rank is beyond `largest_rank`.
    """
    if rank > (most := largest_rank(in_features, out_features, usual)):
        raise MismatchError(
            f"{where}: {name}: expected a rank of at most {most} for {in_features} inputs and {out_features} outputs, "
            f"the file has {rank}; if that is meant, and there is memory for it, say any_rank=True (--any-rank of the"
            " command)."
        )


def join_blocks(blocks: Iterable[Block], height: int) -> tuple[np.ndarray, np.ndarray]:
    """Join the blocks of one layer (q and v of a fused qkv) to one LoRA, whose rank is the sum of theirs.

    Args:
        height: the number of the layer's outputs.

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


def lora_state(
    blocks: Mapping[str, Sequence[Block]], heights: Mapping[str, int], rank: int | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Return the tensors of ``adapter_model.safetensors``, and the rank that all have.

    A smaller rank is filled up with rows of zeros below A and columns of zeros beside B; B·A stays the same.

    Args:
        blocks: module → its blocks.
        heights: module → the number of its outputs.
        rank: the rank of every layer; by default the largest that one needs.

    Raises:
        SpecError: a layer needs a rank above ``rank``.
    """
    pairs = {module: join_blocks(parts, heights[module]) for module, parts in blocks.items()}
    needed = {module: A.shape[0] for module, (A, _) in pairs.items()}
    widest = max(needed, key=needed.__getitem__)
    rank = needed[widest] if rank is None else rank
    if rank < needed[widest]:
        raise SpecError(f"{widest}: expected rank ≥ {needed[widest]}, which its blocks add up to, got {rank}.")
    state: dict[str, np.ndarray] = {}
    for module, (A, B) in pairs.items():
        fill = (0, rank - needed[module])
        padded = np.pad(A, (fill, (0, 0))), np.pad(B, ((0, 0), fill))
        state |= dict(zip(lora_names(module), map(np.ascontiguousarray, padded), strict=True))
    return state, rank


def lora_names(module: str) -> tuple[str, str]:
    """Return the names of A and B in ``adapter_model.safetensors``."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def lora_config(
    modules: Iterable[str],
    rank: int,
    *,
    base_model: str | None,
    fan_in_fan_out: bool = False,
    modules_to_save: Iterable[str] = (),
) -> dict:
    """Make the contents of ``adapter_config.json``.

    Args:
        modules: the whole names of the layers, so that no ending selects others by accident.
        rank: the rank of every layer.
        base_model: the name or path of the base model.
        fan_in_fan_out: whether weights are stored (in, out), as in transformers' Conv1D.
        modules_to_save: the modules that are stored in full.
    """
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": list(modules),
        "task_type": None,
    }
