"""What tasks of labelled pixels share: the loss, the accuracy, and a base that is trained here once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]
"""Pixels and labels, (n, …) and (n,)."""


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(
    model: nn.Module, examples: Sequence[Any], collate: Callable[[list[Any], None], Batch]
) -> dict[str, float]:
    """The part of the examples whose label the model gives, 250 at a time."""
    hits = 0
    for start in range(0, len(examples), 250):
        pixels, labels = collate(list(examples[start : start + 250]), None)
        hits += int((model(pixels).argmax(-1) == labels).sum())
    return {"accuracy": hits / len(examples)}


def kept(path: Path, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """The model that is made, with the weights at ``path``; where there are none one of seed 0 is trained first."""
    model = make()
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = make()
            train(base)
        save_file(base.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model
