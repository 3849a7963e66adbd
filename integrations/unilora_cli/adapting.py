"""What the three tasks share: from arguments to the options of `attach`, and from examples to batches."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["adapter_options", "fit_length", "loader"]

OPTIONS = ("targets", "exclude", "modules_to_save", "rank", "d", "seed", "grouping", "start", "bound")


def adapter_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `attach`: those that the user gave; the library knows the other defaults."""
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}


def loader(
    examples: Any, arguments: argparse.Namespace, collate: Callable | None = None, *, shuffle: bool = False
) -> DataLoader:
    """Batches of examples; the order of shuffled ones follows from the seed."""
    return DataLoader(
        examples,
        batch_size=arguments.batch_size,
        shuffle=shuffle,
        collate_fn=collate,
        num_workers=arguments.workers,
        generator=torch.Generator().manual_seed(arguments.seed),
    )


def fit_length(config: Any, wanted: int) -> int:
    """Tokens per example: as wanted, but no more than the model has positions for (RoBERTa's first are reserved)."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or wanted
    reserved = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl") else 0
    return max(1, min(wanted, positions - reserved))
