"""Several examples in one block of tokens, none of which attends to another."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
    blocks: list[Example] = []
    room: list[tuple[int, int]] = []  # (free tokens, block), in order
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        at = bisect_left(room, (size, 0))
        if at == len(room):
            free, block = length, len(blocks)
            blocks.append({"input_ids": [], "position_ids": [], "labels": []})
        else:
            free, block = room.pop(at)
        insort(room, (free - size, block))
        blocks[block]["input_ids"] += example["input_ids"]
        blocks[block]["position_ids"] += range(size)
        blocks[block]["labels"] += [ignored, *example["labels"][1:]]
    return blocks


def check_packing(model: nn.Module, examples: Sequence[Example], name: str) -> None:
    """Run two examples alone and in one block, and compare.

    Raises:
        CommandError: the model lets one example see the other, as those do that ignore ``position_ids``.
    """
    alone = [example["input_ids"][:SHORT] for example in (*examples[:1], *examples[-1:])]
    positions = [range(len(tokens)) for tokens in alone]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = [_logits(model, [tokens], [where]) for tokens, where in zip(alone, positions, strict=True)]
            together = _logits(model, alone, positions)
    except TypeError as error:
        raise CommandError(
            f"--packing: {name} takes no position_ids ({one_line(error, 120)}); leave it out."
        ) from error
    model.train(was_training)
    off = ((together - torch.cat(apart)).abs().max() / together.abs().max()).item()
    if not off < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise CommandError(
            f"--packing: {name} gives other logits for an example in a block than for the example alone (they differ "
            f"by {off:.1%} of the largest), so packed examples would see each other; leave --packing out."
        )


def _logits(model: Any, parts: Sequence[list[int]], positions: Sequence[range]) -> Tensor:
    tokens, where = ([number for part in lists for number in part] for lists in (parts, positions))
    row = {"input_ids": torch.tensor([tokens]), "position_ids": torch.tensor([where])}
    row = {key: value.to(model.device) for key, value in row.items()}
    return model(**row, use_cache=False).logits[0].float()
