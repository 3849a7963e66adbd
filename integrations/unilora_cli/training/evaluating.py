"""The scores of a model on data: the exact mean loss over all that counts, and the task's metrics."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from unilora_cli.console import CommandError, one_line
from unilora_cli.tasks.task import Task
from unilora_cli.training import distributed
from unilora_cli.training.metrics import Outcome

__all__ = ["evaluate", "readable"]


def evaluate(task: Task, precision: Callable[[], AbstractContextManager] = contextlib.nullcontext) -> dict[str, float]:
    """Mean loss over the held-out data, and the task's metrics; the same in all processes.

    Args:
        precision: the autocast that the model runs in.
    """
    task.model.eval()
    total, count, predicted, labels = 0.0, 0, [], []
    with torch.no_grad():
        for read in filter(None, readable(task.held_out)):
            batch = send_to_device(read, task.adapter.theta_d.device, non_blocking=True)
            with precision():
                scores = task.score(task.model, batch)
            total += scores.loss.item() * scores.count
            count += scores.count
            if scores.predicted is not None:
                predicted.append(scores.predicted.float().cpu().numpy())
                labels.append(batch["labels"].cpu().numpy())
        totals, counts, *found = zip(*distributed.gathered((total, count, predicted, labels)), strict=True)
        flat = (list(itertools.chain.from_iterable(each)) for each in found)
        arrays = [np.concatenate(each) if each else np.empty(0) for each in flat]
        outcome = Outcome(task.model, sum(totals) / max(sum(counts), 1), *arrays)
        with precision():
            scored = {"loss": outcome.loss} | {metric.name: metric.of(outcome) for metric in task.metrics}
    return distributed.from_first(lambda: scored)  # what is decided by them must be the same everywhere


def readable(batches: Any) -> Iterator[dict[str, Tensor]]:
    """The batches. An error from a process that reads data comes with that process's traceback, which is left out."""
    try:
        yield from batches
    except CommandError as error:
        raise CommandError(one_line(str(error).strip().splitlines()[-1].removeprefix(PREFIX))) from error


PREFIX = f"{CommandError.__module__}.{CommandError.__qualname__}: "
