"""Task: what training knows of a model and its data, whatever they are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from unilora_cli.tasks.models import Base
from unilora_cli.training.metrics import Metric
from unilora_torch import Adapter

__all__ = ["Batch", "Scores", "Task"]

Batch = dict[str, Tensor]
"""The inputs of a model by name, and ``labels``."""


@dataclass(frozen=True)
class Scores:
    """What one batch gave.

    Attributes:
        loss: (), the mean over ``count``, differentiable; 0 where nothing counts.
        count: examples, or tokens of a language model.
        predicted: (examples,), what the model makes of each: a class or a number; or (examples, several), its first
            guesses, best first; None for a language model.
    """

    loss: Tensor
    count: int
    predicted: Tensor | None = None


@dataclass
class Task:
    """An adapted model, its data, and how a batch becomes a loss.

    Attributes:
        train, held_out: batches; the latter in a fixed order.
        score: model and batch → `Scores`.
        count: the labels of a batch → how much counts in it, as `Scores` has it.
        metrics: what is reported beside the loss; ``--keep best`` goes by the first.
        before: whether to evaluate before training too.
        notes: lines about the data for the printed plan.
        facts: what metrics.json says beside them.
        test: batches that are scored once, at the end, with the adapter that is kept; or None.
        look: what is written at the end about the adapter that is kept: called with a function from inputs to logits
            and the folder; the names of the files that it wrote.
    """

    base: Base
    model: nn.Module
    adapter: Adapter
    train: DataLoader
    held_out: DataLoader
    score: Callable[[nn.Module, Batch], Scores]
    metrics: tuple[Metric, ...]
    before: bool = False
    notes: list[tuple[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    count: Callable[[Tensor], int] = len
    test: DataLoader | None = None
    look: Callable[[Callable[[Tensor], Tensor], Path], list[str]] | None = None
