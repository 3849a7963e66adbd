"""What the three tasks share: from options of the command to those of `attach`, and from examples to batches."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, default_collate

from unilora_cli.console import CommandError
from unilora_cli.options.finetune import Adapting, Finetune, Source
from unilora_cli.tasks.lengths import fit_length
from unilora_cli.training import distributed
from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec
from unilora_core.schema import shown

__all__ = [
    "Shares",
    "adapter_options",
    "check_classes",
    "check_method",
    "check_tokens",
    "checkpoint_activations",
    "fit_length",
    "length_note",
    "loader",
    "longest",
]

OPTIONS = {each.name for each in fields(Adapting)} - {"method_arg", "grow_to"}
"""Those of `attach`, by the same names."""


def adapter_options(options: Adapting) -> dict[str, Any]:
    """Keyword arguments for `attach`: those that the user gave; the library knows the other defaults.

    Raises:
        CommandError: a --method-arg that has an option of its own.
    """
    own = dict(options.method_arg)
    if taken := sorted(own.keys() & (OPTIONS | {"model", "name", "example"})):
        instead = "" if taken[0] in ("name", "example") else f"; say --{taken[0].replace('_', '-')}"
        raise CommandError(f"--method-arg {taken[0]}: no option of a method{instead}.")
    return {name: value for name in OPTIONS if (value := getattr(options, name)) is not None} | own


def loader(
    examples: Any,
    options: Finetune,
    collate: Callable | None = None,
    *,
    shuffle: bool = False,
    blank: Sequence[Any] = (),
) -> DataLoader:
    """Batches of examples; the order of shuffled ones follows from the seed, and from the number of the epoch.

    Args:
        blank: what a process gets where a batch has no example for it; nothing: an empty batch.
    """
    return DataLoader(
        examples,
        batch_sampler=Shares(len(examples), options.batch_size, options.seed if shuffle else None),
        collate_fn=functools.partial(_collated, collate or default_collate, blank),
        num_workers=options.workers,
    )


class Shares(Sampler[list[int]]):
    """This process's shares of the batches: of n processes, the first has examples 0, n, 2n … of each batch.

    A batch has ``size`` examples for each process. All processes have the same order, and so take as many steps; in the
    last batch a share may be smaller than the others, or empty.

    Attributes:
        seed: of the order; None: the examples' own.
        epoch: another order for each.
    """

    def __init__(self, count: int, size: int, seed: int | None = None):
        self.count, self.whole, self.seed, self.epoch = count, size * distributed.processes(), seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        order, rank, processes = list(range(self.count)), distributed.rank(), distributed.processes()
        if self.seed is not None:
            generator = torch.Generator().manual_seed((self.seed + 2**32 * self.epoch) % 2**63)
            order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count, self.whole):
            yield order[start : start + self.whole][rank::processes]

    def __len__(self) -> int:
        return math.ceil(self.count / self.whole)


def _collated(collate: Callable, blank: Sequence[Any], examples: list[Any]) -> Any:
    return collate(examples or blank) if examples or blank else {}


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let a model of timm compute its activations again in the backward pass.

    Raises:
        CommandError: it cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError) as error:
        raise CommandError(f"--gradient-checkpointing: timm has none for {name}; leave it out.") from error


def check_method(options: Adapting) -> None:
    """Refuse what no layers of any size could have, before a model is loaded.

    Raises:
        CommandError: a --method-arg that has an option of its own.
        SpecError: an option that the method does not have, or a value out of its range.
    """
    said = adapter_options(options)
    named = {name: said[name] for name in ("method", "rank", "seed", "grouping", "start", "bound") if name in said}
    if isinstance(ranks := named.get("rank"), dict):  # of targets that are not known yet
        named["rank"] = max(ranks.values())
    more = {name: value for name, value in said.items() if name not in OPTIONS}
    whole = [value for value in (named.get("rank"), *more.values()) if type(value) is int and 0 < value < 2**63]
    width = math.lcm(2**10, *whole)  # which they divide
    if width <= 2**15:  # of wider layers no weight may have all entries, so that is left to the model's own
        plan_spec([("layer", Sizes(width, width))], options=more, **named)


def check_classes(options: Source, count: int) -> None:
    """Refuse another number of classes than the data have.

    Raises:
        CommandError: it names the --model-arg.
    """
    for name, value in options.model_arg:
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
