"""The training loop, the same for every task."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unilora_cli import checkpoint
from unilora_cli.console import CommandError, one_line
from unilora_cli.metrics import Outcome
from unilora_cli.report import ADAPTER, Recorder
from unilora_cli.task import Task

__all__ = ["Settings", "TrainingError", "conclude", "evaluate", "fit", "parameter_groups", "steps_of"]


class TrainingError(CommandError):
    """Training cannot go on; the message says what was kept."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        lora_rate: the learning rate that LoRA would have.
        warmup: the part of the steps in which the rates rise from 0.
        schedule: ``"linear"`` or ``"cosine"``, how they fall to 0 after that.
        max_steps: an upper bound of the steps, or None.
        theta_rate: θ_d's own rate, in place of the one that follows from ``lora_rate``; or None.
        weight_decay: of the head; θ_d has none.
        accumulate: batches per step.
        max_grad_norm: gradients are scaled down to this norm, all of them as one vector; or None.
    """

    lora_rate: float
    head_rate: float
    epochs: int
    warmup: float
    schedule: str
    device: torch.device
    bf16: bool = False
    max_steps: int | None = None
    theta_rate: float | None = None
    weight_decay: float = 0.01
    accumulate: int = 1
    max_grad_norm: float | None = None


def fit(task: Task, settings: Settings, recorder: Recorder, resumed: dict[str, Any] | None = None) -> None:
    """Train θ_d and the head; evaluate and save after each epoch.

    Args:
        resumed: the state of an interrupted run, to go on from its last whole epoch.

    Raises:
        TrainingError: a loss that is not finite. The file holds the adapter of the last whole epoch; in the first
            epoch, the adapter of the last step whose loss was finite.
    """
    optimizer = torch.optim.AdamW(parameter_groups(task, settings), weight_decay=settings.weight_decay)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps = steps_of(task, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _curve(steps, settings))
    keeper = _Keeper(trained, recorder)
    step = epochs_done = 0
    if resumed:
        step, epochs_done = checkpoint.restore(resumed, task.train, trained, optimizer, scheduler)
        keeper.epoch_saved = True
    with tqdm(total=steps, initial=step, unit="step", disable=None, leave=False) as bar:
        for epoch in range(epochs_done + 1, settings.epochs + 1):
            _train_mode(task.model)
            for batches in _grouped(_batches(task.train, settings.device), settings.accumulate):
                rate = optimizer.param_groups[0]["lr"]
                loss = _step(task, batches, optimizer, settings)
                keeper.check(loss, step + 1)
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                scheduler.step()
                step += 1
                recorder.step(step, loss, rate)
                bar.set_postfix(loss=f"{loss:.4f}", rate=f"{rate:.2e}", refresh=False)
                bar.update()
                if step == steps:
                    break
            scores = evaluate(task, settings)
            keeper.check(scores["loss"], step, "the held-out loss")
            with _above(bar):
                recorder.epoch(epoch, step, scores)
            keeper.epoch_saved = True
            if step == steps:
                return
            recorder.checkpoint(checkpoint.state(epoch, step, task.train, trained, optimizer, scheduler))


def evaluate(task: Task, settings: Settings) -> dict[str, float]:
    """Mean loss over the held-out data, and the task's metrics."""
    task.model.eval()
    total, count, predicted, labels = 0.0, 0, [], []
    with torch.no_grad():
        for batch in _batches(task.held_out, settings.device):
            with _precision(settings):
                scores = task.score(task.model, batch)
            total += scores.loss.item() * scores.count if scores.count else 0.0
            count += scores.count
            if scores.predicted is not None:
                predicted.append(scores.predicted.float().cpu().numpy())
                labels.append(batch["labels"].cpu().numpy())
        guesses, truth = (np.concatenate(found) if found else np.empty(0) for found in (predicted, labels))
        outcome = Outcome(task.model, total / max(count, 1), guesses, truth)
        with _precision(settings):
            return {"loss": outcome.loss} | {metric.name: metric.of(outcome) for metric in task.metrics}


def conclude(task: Task, settings: Settings, recorder: Recorder) -> None:
    """With the adapter that is kept: score the test data, and write what the task has to show of its predictions."""
    if task.test is None and task.look is None:
        return
    task.adapter.swap(recorder.folder / ADAPTER)
    if task.test is not None:
        recorder.test = evaluate(replace(task, held_out=task.test), settings)
    if task.look is not None:
        task.model.eval()

        def logits(inputs: Tensor) -> Tensor:
            with torch.no_grad(), _precision(settings):
                return task.model(inputs.to(settings.device)).float().cpu()

        recorder.also_written += task.look(logits, recorder.folder)


def parameter_groups(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """The groups for the optimiser: θ_d, without weight decay, and the head."""
    groups = task.adapter.parameter_groups(settings.lora_rate, settings.head_rate)
    if settings.theta_rate is not None:
        groups[0]["lr"] = settings.theta_rate
    return groups


def steps_of(task: Task, settings: Settings) -> int:
    """How many steps training takes."""
    steps = settings.epochs * math.ceil(len(task.train) / settings.accumulate)
    return steps if settings.max_steps is None else min(settings.max_steps, steps)


class _Keeper:
    """Keeps the last state known to be good in the first epoch, and stops training where a loss is not finite."""

    def __init__(self, trained: list[nn.Parameter], recorder: Recorder):
        self.trained, self.recorder, self.epoch_saved = trained, recorder, False
        self.good: list[Tensor] | None = None

    def check(self, loss: float, step: int, what: str = "the loss") -> None:
        if math.isfinite(loss):
            if not self.epoch_saved:
                self.good = [p.detach().clone() for p in self.trained]
            return
        kept = f"the adapter of the {self.recorder.keeps} epoch is kept" if self.epoch_saved else "nothing was saved"
        if not self.epoch_saved and self.good is not None:
            with torch.no_grad():
                for parameter, value in zip(self.trained, self.good, strict=True):
                    parameter.copy_(value)
            self.recorder.save()
            kept = "the adapter of the step before is kept"
        self.recorder.failed(f"{what} became {loss} at step {step}")
        raise TrainingError(
            f"{what} became {loss} at step {step}; {kept} in {self.recorder.folder}. "
            "Lower --lora-rate (or --theta-rate) or --head-rate, or lengthen --warmup."
        )


def _step(task: Task, batches: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer, settings: Settings) -> float:
    """One backward pass per batch; the mean loss over all that counts in them, as if they were one batch."""
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in batches:
        with _precision(settings):
            scores = task.score(task.model, batch)
        if scores.count:  # a batch of cut prompts has no token with a loss
            (scores.loss * scores.count).backward()
            total, count = total + scores.loss.item() * scores.count, count + scores.count
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad /= count
    return total / max(count, 1)


def _curve(steps: int, settings: Settings) -> Any:
    """Step → the part of the rate: a rise over the warmup, then a fall to 0."""
    rise = round(steps * settings.warmup)

    def part(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        done = (step - rise) / max(1, steps - rise)
        return 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2

    return part


def _train_mode(model: nn.Module) -> None:
    """Training mode, but no frozen normalisation may move its running statistics: no adapter file holds them."""
    model.train()
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._NormBase) and frozen:
            module.eval()


def _grouped(batches: Iterator[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Lists of ``size`` batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def _batches(batches: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:
    try:
        for batch in batches:
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    except CommandError as error:  # from a process that reads data it comes with that process's traceback before it
        raise CommandError(one_line(str(error).strip().splitlines()[-1].removeprefix(PREFIX))) from error


PREFIX = f"{CommandError.__module__}.{CommandError.__qualname__}: "


def _precision(settings: Settings) -> Any:
    if settings.bf16:
        return torch.autocast(settings.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _above(bar: tqdm) -> Iterator[None]:
    """Print lines while a progress bar stands below them."""
    bar.clear()
    yield
    bar.refresh()
