"""The training loop, the same for every task."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unilora_cli.console import CommandError, one_line
from unilora_cli.report import Recorder
from unilora_cli.task import Task

__all__ = ["Settings", "TrainingError", "evaluate", "fit", "steps_of"]


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
    """

    lora_rate: float
    head_rate: float
    epochs: int
    warmup: float
    schedule: str
    device: torch.device
    bf16: bool = False
    max_steps: int | None = None


def fit(task: Task, settings: Settings, recorder: Recorder) -> None:
    """Train θ_d and the head; evaluate and save after each epoch.

    Raises:
        TrainingError: a loss that is not finite. The file holds the adapter of the last whole epoch; in the first
            epoch, the adapter of the last step whose loss was finite.
    """
    optimizer = torch.optim.AdamW(task.adapter.parameter_groups(settings.lora_rate, settings.head_rate))
    steps = steps_of(task, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _curve(steps, settings))
    keeper = _Keeper(optimizer, recorder)
    step = 0
    with tqdm(total=steps, unit="step", disable=None, leave=False) as bar:
        for epoch in range(1, settings.epochs + 1):
            _train_mode(task.model)
            for batch in _batches(task.train, settings.device):
                rate = optimizer.param_groups[0]["lr"]
                loss = _step(task, batch, optimizer, settings)
                keeper.check(loss, step + 1)
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


def evaluate(task: Task, settings: Settings) -> dict[str, float]:
    """Mean loss over the held-out data, with accuracy, or with perplexity for a language model."""
    task.model.eval()
    total, count, correct = 0.0, 0, 0
    with torch.no_grad():
        for batch in _batches(task.held_out, settings.device):
            with _precision(settings):
                scores = task.score(task.model, batch)
            total += scores.loss.item() * scores.count if scores.count else 0.0
            count += scores.count
            correct += scores.correct
    loss = total / max(count, 1)
    if task.measure == "perplexity":
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    return {"loss": loss, "accuracy": correct / max(count, 1)}


def steps_of(task: Task, settings: Settings) -> int:
    """How many steps training takes."""
    steps = settings.epochs * len(task.train)
    return steps if settings.max_steps is None else min(settings.max_steps, steps)


class _Keeper:
    """Keeps the last state known to be good in the first epoch, and stops training where a loss is not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Recorder):
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.recorder, self.epoch_saved = recorder, False
        self.good: list[Tensor] | None = None

    def check(self, loss: float, step: int, what: str = "the loss") -> None:
        if math.isfinite(loss):
            if not self.epoch_saved:
                self.good = [p.detach().clone() for p in self.trained]
            return
        kept = "the adapter of the last whole epoch is kept" if self.epoch_saved else "nothing was saved"
        if not self.epoch_saved and self.good is not None:
            with torch.no_grad():
                for parameter, value in zip(self.trained, self.good, strict=True):
                    parameter.copy_(value)
            self.recorder.save()
            kept = "the adapter of the step before is kept"
        self.recorder.failed(f"{what} became {loss} at step {step}")
        raise TrainingError(
            f"{what} became {loss} at step {step}; {kept} in {self.recorder.folder}. "
            "Lower --lora-rate or --head-rate, or lengthen --warmup."
        )


def _step(task: Task, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Settings) -> float:
    """One backward pass; the loss."""
    with _precision(settings):
        scores = task.score(task.model, batch)
    optimizer.zero_grad(set_to_none=True)
    if scores.count:  # a batch of cut prompts has no token with a loss
        scores.loss.backward()
    return scores.loss.item() if scores.count else 0.0


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
