"""Several examples in one block of tokens, none of which attends to another."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from unilora_cli.console import CommandError, one_line

__all__ = ["check_packing", "pack"]

Example = dict[str, list[int]]

SHORT = 32
"""Tokens of each example in the check."""


def pack(examples: Sequence[Example], length: int, ignored: int) -> list[Example]:
    """Blocks of at most ``length`` tokens: each example, longest first, goes where it leaves the least room.

    An example begins where ``position_ids`` begin again at 0; transformers makes a block-diagonal mask of that. The
    first token of an example has no loss: the last one of the example before it must not learn to predict it.

    Args:
        examples: ``input_ids`` and ``labels``, none longer than ``length``.
        ignored: the label of a token without loss.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``; no attention mask, which would hide the positions' restart.
    """
    blocks: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, block), in order
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        at = bisect_left(room, (size, 0))
        free, block = room.pop(at) if at < len(room) else (length, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(example)
        insort(room, (free - size, block))
    flatten = DataCollatorWithFlattening(return_tensors="np", separator_id=ignored)
    return [{name: row[0].tolist() for name, row in flatten(block).items()} for block in blocks]


def check_packing(model: Any, examples: Sequence[Example], name: str) -> None:
    """Run two examples alone and in one block, and compare.

    Raises:
        CommandError: the model lets one example see the other, as those do that ignore ``position_ids``.
    """
    alone = [{"input_ids": example["input_ids"][:SHORT]} for example in (*examples[:1], *examples[-1:])]

    def logits(*parts: Example) -> Tensor:
        row = DataCollatorWithFlattening()(list(parts))
        inputs = {key: row[key].to(model.device) for key in ("input_ids", "position_ids")}
        return model(**inputs, use_cache=False).logits[0].float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart, together = torch.cat([logits(part) for part in alone]), logits(*alone)
    except TypeError as error:
        raise CommandError(
            f"--packing: {name} takes no position_ids ({one_line(error, 120)}); leave it out."
        ) from error
    model.train(was_training)
    off = ((together - apart).abs().max() / together.abs().max()).item()
    if not off < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise CommandError(
            f"--packing: {name} gives other logits for an example in a block than for the example alone (they differ "
            f"by {off:.1%} of the largest), so packed examples would see each other; leave --packing out."
        )
