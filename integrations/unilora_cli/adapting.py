"""What the three tasks share: from arguments to the options of `attach`, and from examples to batches."""

import argparse
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, default_collate

from unilora_cli import distributed
from unilora_cli.console import CommandError
from unilora_cli.lengths import fit_length
from unilora_cli.task import Task
from unilora_core import SpecError
from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec
from unilora_core.schema import shown
from unilora_torch import Growth

__all__ = [
    "Shares",
    "adapter_options",
    "check_classes",
    "check_growth",
    "check_method",
    "check_tokens",
    "checkpoint_activations",
    "fit_length",
    "length_note",
    "loader",
    "longest",
]

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


def check_method(arguments: argparse.Namespace) -> None:
    """Refuse what no layers of any size could have, before a model is loaded.

    Raises:
        CommandError: a --method-arg that has an option of its own.
        SpecError: an option that the method does not have, or a value out of its range.
    """
    said = adapter_options(arguments)
    fields = {name: said[name] for name in ("method", "rank", "seed", "grouping", "start", "bound") if name in said}
    options = {name: value for name, value in said.items() if name not in OPTIONS}
    whole = [value for value in (fields.get("rank"), *options.values()) if type(value) is int and 0 < value < 2**63]
    width = math.lcm(2**10, *whole)  # which they divide
    if width <= 2**15:  # of wider layers no weight may have all entries, so that is left to the model's own
        plan_spec([("layer", Sizes(width, width))], options=options, **fields)


def check_growth(task: Task, grow_to: int | None) -> None:
    """Refuse a --grow-to that cannot be, before training.

    Raises:
        CommandError: the method's P does not nest, or it is less than twice d, or more than D.
    """
    if grow_to is not None:
        try:
            Growth(task.adapter, grow_to)
        except SpecError as error:
            raise CommandError(f"--grow-to {grow_to}: {error}") from error


def check_classes(arguments: argparse.Namespace, count: int) -> None:
    """Refuse another number of classes than the data have.

    Raises:
        CommandError: it names the --model-arg.
    """
    for name, value in arguments.model_arg:
        if name in ("num_classes", "num_labels") and value != count:
            raise CommandError(f"--model-arg {name}={shown(value)}: by the data it is {count}; leave it out.")


def check_tokens(model: Any, tokens: Any, examples: Sequence[Mapping[str, Any]], fill: int, name: str) -> None:
    """Refuse numbers of tokens that the model has no embeddings for.

    Args:
        fill: the number that fills up texts.

    Raises:
        CommandError: the largest, its token, and the remedy.
    """
    try:
        rows = len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):  # characters that are hashed, say
        return
    largest = max(fill, *(max(example["input_ids"], default=0) for example in examples))
    if largest >= rows:
        raise CommandError(
            f"{name}: the tokenizer gives {tokens.convert_ids_to_tokens(largest)!r} the number {largest}, and the "
            f"model has embeddings for 0 to {rows - 1}. Take the tokenizer that belongs to it; or load the model, call "
            f"resize_token_embeddings({largest + 1}), and save both in a folder for --model."
        )


def longest(examples: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """What the model is tried with: as long as any, so that what is too long for it is said before training."""
    return sorted(examples, key=lambda example: len(example["input_ids"]))[-min(2, batch_size) :]


def length_note(length: int, wanted: int) -> tuple[str, str]:
    """A line for the plan."""
    why = f", as the model has positions for no more (--length {wanted})" if length < wanted else ""
    return "tokens per example", f"at most {length}{why}"
