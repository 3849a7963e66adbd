"""What the three tasks share: from arguments to the options of `attach`, and from examples to batches."""

import argparse
import functools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, default_collate

from unilora_cli import distributed
from unilora_cli.console import CommandError

__all__ = ["Shares", "adapter_options", "checkpoint_activations", "fit_length", "loader"]

OPTIONS = ("targets", "exclude", "modules_to_save", "method", "rank", "d", "seed", "grouping", "start", "bound")


def adapter_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `attach`: those that the user gave; the library knows the other defaults.

    Raises:
        CommandError: a --method-arg that has an option of its own.
    """
    own = dict(arguments.method_arg)
    if taken := sorted(own.keys() & {*OPTIONS, "model", "name", "example"}):
        instead = "" if taken[0] in ("name", "example") else f"; say --{taken[0].replace('_', '-')}"
        raise CommandError(f"--method-arg {taken[0]}: no option of a method{instead}.")
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None} | own


def loader(
    examples: Any, arguments: argparse.Namespace, collate: Callable | None = None, *, shuffle: bool = False
) -> DataLoader:
    """Batches of examples; the order of shuffled ones follows from the seed."""
    generator = torch.Generator().manual_seed(arguments.seed)
    order = RandomSampler(examples, generator=generator) if shuffle else SequentialSampler(examples)
    return DataLoader(
        examples,
        batch_sampler=Shares(order, arguments.batch_size),
        collate_fn=functools.partial(_collated, collate or default_collate),
        num_workers=arguments.workers,
        worker_init_fn=functools.partial(_seed_worker, distributed.rank()),
        generator=generator,
    )


class Shares(Sampler[list[int]]):
    """This process's shares of the batches: of n processes, the first has examples 0, n, 2n … of each batch.

    A batch has ``size`` examples for each process. All processes draw the same order, and so take as many steps; in the
    last batch a share may be smaller than the others, or empty.
    """

    def __init__(self, order: RandomSampler | SequentialSampler, size: int):
        self.order, self.whole = order, size * distributed.processes()

    def __iter__(self) -> Iterator[list[int]]:
        order, rank, processes = list(self.order), distributed.rank(), distributed.processes()
        for start in range(0, len(order), self.whole):
            yield order[start : start + self.whole][rank::processes]

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.whole)


def _collated(collate: Callable, examples: list[Any]) -> Any:
    return collate(examples) if examples else {}


def _seed_worker(rank: int, _worker: int) -> None:
    """Other random numbers in the workers of other processes than the first: all have the same generator."""
    if rank:
        seed = (torch.initial_seed() + 7919 * rank) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let a model of timm compute its activations again in the backward pass.

    Raises:
        CommandError: it cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError) as error:
        raise CommandError(f"--gradient-checkpointing: timm has none for {name}; leave it out.") from error


def fit_length(config: Any, wanted: int) -> int:
    """Tokens per example: as wanted, but no more than the model has positions for (RoBERTa's first are reserved)."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or wanted
    reserved = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl") else 0
    return max(1, min(wanted, positions - reserved))
