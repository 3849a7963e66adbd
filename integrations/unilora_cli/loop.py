"""The training loop, the same for every task."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unilora_cli import checkpoint, distributed
from unilora_cli.console import CommandError, one_line
from unilora_cli.metrics import Outcome
from unilora_cli.report import ADAPTER, Recorder
from unilora_cli.task import Task
from unilora_core import ValuesError, read_adapter
from unilora_torch import Growth
from unilora_torch.growing import resize

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
        precision: of autocast, ``torch.bfloat16`` or ``torch.float16``; or None.
        max_steps: an upper bound of the steps, or None.
        theta_rate: θ_d's own rate, in place of the one that follows from ``lora_rate``; or None.
        weight_decay: of the head; θ_d has none.
        accumulate: batches per step.
        max_grad_norm: gradients are scaled down to this norm, all of them as one vector; or None.
        patience: epochs without a better score after which training stops; or None.
        grow_to: d doubles up to this where the held-out loss has come to rest (`unilora_torch.Growth`); or None.
    """

    lora_rate: float
    head_rate: float
    epochs: int
    warmup: float
    schedule: str
    device: torch.device
    precision: torch.dtype | None = None
    max_steps: int | None = None
    theta_rate: float | None = None
    weight_decay: float = 0.01
    accumulate: int = 1
    max_grad_norm: float | None = None
    patience: int | None = None
    grow_to: int | None = None


def fit(task: Task, settings: Settings, recorder: Recorder, resumed: dict[str, Any] | None = None) -> None:
    """Train θ_d and the head; evaluate and save after each epoch.

    Args:
        resumed: the state of an interrupted run, to go on from its last whole epoch, or from the start.

    Raises:
        TrainingError: a loss that is not finite. The file holds the adapter of the last whole epoch; in the first
            epoch, the adapter of the last step whose loss was finite.
    """
    optimizer = torch.optim.AdamW(parameter_groups(task, settings), weight_decay=settings.weight_decay)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps = steps_of(task, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _curve(steps, settings))
    scaler = _scaler(settings)
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if settings.grow_to is not None:
        parts["growth"] = Growth(task.adapter, settings.grow_to, optimizer=optimizer, scheduler=scheduler)
    keeper = _Keeper(trained, recorder)
    step = epochs_done = 0
    if resumed:
        step, epochs_done = checkpoint.restore(resumed, task, parts, settings.device)
        keeper.epoch_saved = epochs_done > 0
    else:
        recorder.checkpoint(checkpoint.state(0, 0, task, parts, settings.device))
    with _bar(steps, step) as bar:
        for epoch in range(epochs_done + 1, settings.epochs + 1):
            if step == steps or recorder.waits_in_vain(settings.patience):
                break
            _train_mode(task.model)
            for batches in _grouped(_batches(task.train, settings.device), settings.accumulate):
                rate = optimizer.param_groups[0]["lr"]
                loss, count = _gradient(task, batches, optimizer, scaler, settings)
                keeper.check(loss, step + 1)
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                if _stepped(optimizer, scaler, count):
                    scheduler.step()
                else:
                    recorder.skipped += 1
                step += 1
                recorder.step(step, loss, rate)
                _advance(bar, batches, loss=f"{loss:.4f}", rate=f"{rate:.2e}")
                if step == steps:
                    break
            with keeper.saving_first():
                scores = evaluate(task, settings)
            keeper.check(scores["loss"], step, "the held-out loss")
            with _above(bar):
                recorder.epoch(epoch, step, scores)
            keeper.epoch_saved = True
            if settings.grow_to is not None and step < steps:
                with _above(bar):
                    _grow(parts["growth"], scores["loss"], recorder)
            recorder.checkpoint(checkpoint.state(epoch, step, task, parts, settings.device))


def _grow(growth: Growth, loss: float, recorder: Recorder) -> None:
    """Let d double, if it is to, and say so."""
    if growth.step(loss):
        d = growth.adapter.spec.d
        recorder.tell(f"  the held-out loss has come to rest: d grows from {d // 2:,} to {d:,}")


def evaluate(task: Task, settings: Settings) -> dict[str, float]:
    """Mean loss over the held-out data, and the task's metrics; the same in all processes."""
    task.model.eval()
    total, count, predicted, labels = 0.0, 0, [], []
    with torch.no_grad():
        for batch in filter(None, _batches(task.held_out, settings.device)):
            with _precision(settings):
                scores = task.score(task.model, batch)
            total += scores.loss.item() * scores.count if scores.count else 0.0
            count += scores.count
            if scores.predicted is not None:
                predicted.append(scores.predicted.float().cpu().numpy())
                labels.append(batch["labels"].cpu().numpy())
        mine = (np.concatenate(found) if found else np.empty(0) for found in (predicted, labels))
        totals, counts, guesses, truths = zip(*distributed.gathered((total, count, *mine)), strict=True)
        outcome = Outcome(task.model, sum(totals) / max(sum(counts), 1), _interleaved(guesses), _interleaved(truths))
        with _precision(settings):
            scored = {"loss": outcome.loss} | {metric.name: metric.of(outcome) for metric in task.metrics}
    return distributed.from_first(lambda: scored)  # what is decided by them must be the same everywhere


def conclude(task: Task, settings: Settings, recorder: Recorder) -> None:
    """With the adapter that is kept: score the test data, and write what the task has to show of its predictions."""
    if task.test is None and task.look is None:
        return
    resize(task.adapter, read_adapter(recorder.folder / ADAPTER).spec.d)  # it may be that of before a growth
    task.adapter.swap(recorder.folder / ADAPTER)
    if task.test is not None:
        recorder.test = evaluate(replace(task, held_out=task.test), settings)
    if task.look is not None and distributed.rank() == 0:
        task.model.eval()

        def logits(inputs: Tensor) -> Tensor:
            with torch.no_grad(), _precision(settings):
                return task.model(inputs.to(settings.device)).float().cpu()

        with recorder.beside("predictions and pictures"):
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

    @contextlib.contextmanager
    def saving_first(self) -> Iterator[None]:
        """What ends an evaluation does not take with it what was trained before: the adapter is saved then, unless the
        file has the best so far.
        """
        try:
            yield
        except BaseException:
            if self.recorder.keep == "last" or not self.epoch_saved:
                with contextlib.suppress(ValuesError):  # θ_d is not finite, and no adapter
                    self.recorder.save()
                    self.recorder.tell(f"  evaluation failed; the adapter is in {self.recorder.folder / ADAPTER}")
            raise

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


def _gradient(
    task: Task,
    batches: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: Settings,
) -> tuple[float, int]:
    """One backward pass per batch. The gradient is that of the mean loss over all that counts in them, and in those of
    the other processes, as if they were one batch; this loss, and how much counts.
    """
    optimizer.zero_grad(set_to_none=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, and of what counts
    for batch in filter(None, batches):
        with _precision(settings):
            scores = task.score(task.model, batch)
        if scores.count:  # a batch of cut prompts has no token with a loss
            scaler.scale(scores.loss * scores.count).backward()
            sums += torch.tensor([scores.loss.item() * scores.count, scores.count], dtype=torch.float64)
    if distributed.processes() > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        distributed.add_up([sums])
        distributed.add_up([parameter.grad for parameter in trained])
    total, count = sums.tolist()
    if not count:
        optimizer.zero_grad(set_to_none=True)
        return 0.0, 0
    scaler.unscale_(optimizer)
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= count
    return total / count, int(count)


def _scaler(settings: Settings) -> torch.amp.GradScaler:
    """What keeps small gradients above the smallest float16; without float16 it does nothing.

    Losses are summed over a batch before they are scaled, so the scale starts below torch's own 2^16.
    """
    float16 = settings.precision is torch.float16
    return torch.amp.GradScaler(settings.device.type, init_scale=2.0**10, enabled=float16)


def _stepped(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, count: int) -> bool:
    """Take a step; False where the gradient overflowed float16, so that none was taken and the scale is lower now."""
    if not count:  # and so no gradient
        optimizer.step()
        return True
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


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


def _interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """What the processes have of examples 0, n, 2n …; 1, n+1 …; in the order of the examples."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        if len(part):  # the last ones may have none, without a shape
            whole[rank :: len(parts)] = part
    return whole


def _precision(settings: Settings) -> Any:
    if settings.precision is not None:
        return torch.autocast(settings.device.type, dtype=settings.precision)
    return contextlib.nullcontext()


def _bar(steps: int, done: int) -> tqdm:
    """Progress, on a terminal only, and in one process."""
    return tqdm(total=steps, initial=done, unit="step", disable=None if distributed.rank() == 0 else True, leave=False)


def _advance(bar: tqdm, batches: list[dict[str, Tensor]], **shown: str) -> None:
    """One step further; examples per second are of all processes."""
    if not bar.disable:
        examples = sum(len(next(iter(batch.values()))) for batch in batches) * distributed.processes()
        shown["examples/s"] = f"{examples * (bar.format_dict['rate'] or 0):.0f}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


@contextlib.contextmanager
def _above(bar: tqdm) -> Iterator[None]:
    """Print lines while a progress bar stands below them."""
    bar.clear()
    yield
    bar.refresh()
