"""What is done while the Trainer trains: losses are recorded and shown, and one that is not finite stops it."""
# ruff: noqa: ARG002  (signatures are the Trainer's)

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from unilora_cli.console import CommandError
from unilora_cli.training import checkpoints, distributed
from unilora_cli.training.recorder import ADAPTER, Recorder
from unilora_core import ValuesError
from unilora_torch import Growth

__all__ = ["Guard", "TrainingError", "Watch"]


class TrainingError(CommandError):
    """Training cannot go on; the message says what was kept."""


class Guard:
    """Keeps the last state known to be good in the first epoch, and stops training where a loss is not finite."""

    def __init__(self, trained: list[nn.Parameter], recorder: Recorder, epoch_saved: bool):
        self.trained, self.recorder, self.epoch_saved = trained, recorder, epoch_saved
        self.good: list[Tensor] | None = None
        self.now: list[Tensor] | None = None

    def remember(self) -> None:
        """What trains, before a step whose loss is not known yet."""
        if not self.epoch_saved:
            self.now = [p.detach().clone() for p in self.trained]

    def check(self, loss: float, step: int, what: str = "the loss") -> None:
        """Take a loss into account.

        Raises:
            TrainingError: it is not finite. The file holds the adapter of the last whole epoch; in the first epoch, the
                adapter of the last step whose loss was finite.
        """
        if math.isfinite(loss):
            self.good = self.now
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

    @contextlib.contextmanager
    def saving_first(self) -> Iterator[None]:
        """What ends an evaluation does not take with it what was trained before: the adapter is saved then, unless the
        file has the best so far.
        """
        try:
            yield
        except BaseException:
            if self.recorder.options.keep == "last" or not self.epoch_saved:
                with contextlib.suppress(ValuesError):  # θ_d is not finite, and no adapter
                    self.recorder.save()
                    self.recorder.tell(f"  evaluation failed; the adapter is in {self.recorder.folder / ADAPTER}")
            raise


class Watch(TrainerCallback):
    """Records what the Trainer does, shows it, and ends it where patience says so."""

    def __init__(self, recorder: Recorder, guard: Guard, growth: Growth | None, patience: int | None):
        self.recorder, self.guard, self.growth, self.patience = recorder, guard, growth, patience
        self.rate, self.bar = 0.0, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **there: Any) -> None:
        """Show the bar, on a terminal only, and in one process."""
        if self.growth is not None:
            self.growth.optimizer, self.growth.scheduler = there["optimizer"], there["lr_scheduler"]
        shown = None if distributed.rank() == 0 else True
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=shown, leave=False)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **there: Any) -> None:
        """The order of the data follows from the number of the epoch."""
        there["train_dataloader"].batch_sampler.epoch = round(state.epoch or 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **there: Any) -> None:
        """Keep what there is before the step."""
        self.guard.remember()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **there: Any) -> None:
        """The rate that the step uses."""
        self.rate = there["optimizer"].param_groups[0]["lr"]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **there: Any) -> None:
        """Record the loss of a step; other logs are for trackers."""
        if logs is None or "loss" not in logs:
            return
        self.guard.check(logs["loss"], state.global_step)
        self.recorder.skipped += bool(there["optimizer"].step_was_skipped)
        self.recorder.step(state.global_step, logs["loss"], self.rate)
        self.bar.set_postfix(loss=f"{logs['loss']:.4f}", rate=f"{self.rate:.2e}", refresh=False)
        self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **there: Any) -> None:
        """Record the scores, keep the adapter, and let d grow."""
        scores = {name[5:]: value for name, value in metrics.items() if name.startswith("eval_")}
        self.bar.clear()
        self.guard.check(scores["loss"], state.global_step, "the held-out loss")
        self.recorder.epoch(math.ceil(state.epoch or 0), state.global_step, scores)
        if state.global_step:
            self.guard.epoch_saved = True
            control.should_training_stop |= self.recorder.waits_in_vain(self.patience)
            if self.growth is not None and state.global_step < state.max_steps and self.growth.step(scores["loss"]):
                d = self.growth.adapter.spec.d
                self.recorder.tell(f"  the held-out loss has come to rest: d grows from {d // 2:,} to {d:,}")
        self.bar.refresh()

    def on_save(self, args: Any, state: Any, control: Any, **there: Any) -> None:
        """Make the checkpoint whole."""
        distributed.gathered(None)  # all have written their parts
        if checkpoints.FOLDER not in self.recorder.unwritten:
            self.recorder.checkpoint(state.global_step, self.growth.state_dict() if self.growth else {})
