"""transformers' Trainer for every task: it is given the task's batches, loss, scores and files."""
# ruff: noqa: ARG002  (signatures are the Trainer's)

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from unilora_cli.console import CommandError, one_line
from unilora_cli.options.finetune import Finetune
from unilora_cli.tasks.models import readable_errors
from unilora_cli.tasks.task import Task
from unilora_cli.training import checkpoints, distributed, evaluating
from unilora_cli.training.recorder import ADAPTER, Recorder
from unilora_cli.training.settings import parameter_groups, steps_of, trainer_arguments
from unilora_cli.training.watching import Guard, Watch
from unilora_core import SpecError, UniLoraError, read_adapter
from unilora_torch import Growth
from unilora_torch.growing import resize

__all__ = ["AdapterTrainer", "conclude", "fit", "growth_of", "still_norms"]


class AdapterTrainer(Trainer):
    """A Trainer whose loss is the exact mean over all that counts in a step, in all its batches and processes.

    Several processes add up the gradient of a step once, after the last backward pass: it is d numbers and those of the
    head. So the model needs no wrapper, d can grow, and a process may have no example in the last batch.
    """

    control: Any

    def __init__(self, task: Task, options: Finetune, recorder: Recorder, run: checkpoints.Run | None):
        self.task, self.recorder = task, recorder
        self.growth = growth_of(task, options.grow_to)
        groups, steps = parameter_groups(task, options), steps_of(task, options)
        args = trainer_arguments(options, steps, recorder.folder, task.before and not run)
        optimizer, how = self.get_optimizer_cls_and_kwargs(args, task.model)
        how |= {"params": groups, "weight_decay": options.weight_decay}
        self.guard = Guard([p for group in groups for p in group["params"]], recorder, bool(run and run.step))
        self.watch = Watch(recorder, self.guard, self.growth, options.patience)
        data = {"train_dataset": task.train.dataset, "eval_dataset": task.held_out.dataset}
        super().__init__(task.model, args, **data, optimizer_cls_and_kwargs=(optimizer, how), callbacks=[self.watch])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # which says that `compute_loss` divides by all that counts
        self.still = still_norms(task.model)
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)  # without a wrapper

    def get_train_dataloader(self) -> DataLoader:
        """The task's batches, as they are: in each process its own."""
        return self.task.train

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step, and what counts in them and in those of the other processes."""
        batches = list(evaluating.readable(itertools.islice(epoch_iterator, num_batches)))
        count = sum(self.task.count(batch["labels"]) for batch in batches if batch)
        counts = self.accelerator.reduce(torch.tensor(float(count), device=device))
        return batches, counts.clamp(min=1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's part of the step's mean loss; all parts are averaged over the processes, as DDP has it."""
        for norm in self.still:
            norm.eval()
        scores = self.task.score(model, inputs)
        return scores.loss * (scores.count * distributed.processes() / num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; a process without an example in the batch has a share of the gradient all the same."""
        if inputs:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = torch.zeros((), device=self.args.device)
        if distributed.processes() > 1 and self.accelerator.sync_gradients:
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.guard.trained]
            for parameter, mean in zip(self.guard.trained, self.accelerator.reduce(own, "mean"), strict=True):
                parameter.grad = mean
        return loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The scores of the held-out data."""
        with self.guard.saving_first() if self.state.global_step else contextlib.nullcontext():
            scores = evaluating.evaluate(self.task, self.accelerator.autocast)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, *_: Any, **__: Any) -> str:
        return str(self.recorder.folder / checkpoints.FOLDER)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with self.recorder.beside(checkpoints.FOLDER):
            super()._save_checkpoint(*arguments, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if distributed.rank() == 0:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            self.task.adapter.save(Path(str(output_dir), ADAPTER), metadata=self.task.base.metadata())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        put_back(self.task, Path(resume_from_checkpoint, ADAPTER))


def put_back(task: Task, file: Path) -> None:
    """Give the adapter the values of a file of the same run, whose d may be another: it may have grown since."""
    resize(task.adapter, read_adapter(file).spec.d)
    task.adapter.swap(file)


def growth_of(task: Task, grow_to: int | None) -> Growth | None:
    """What lets d grow.

    Raises:
        CommandError: the method's P does not nest, or ``grow_to`` is less than twice d, or more than D.
    """
    try:
        return None if grow_to is None else Growth(task.adapter, grow_to)
    except SpecError as error:
        raise CommandError(f"--grow-to {grow_to}: {error}") from error


def fit(trainer: AdapterTrainer, patience: int | None, resumed: tuple[Path, checkpoints.Run] | None) -> None:
    """Train θ_d and the head; evaluate and save after each epoch.

    Args:
        resumed: the state of an interrupted run, to go on from its last whole epoch, or from the start.

    Raises:
        TrainingError: see `Guard.check`.
        CommandError: the state cannot be gone on with, or another process is gone.
    """
    place = str(resumed[0]) if resumed and resumed[1].step else None
    if resumed and place:
        if resumed[1].step >= trainer.args.max_steps or trainer.recorder.waits_in_vain(patience):
            return
        if trainer.growth is not None:
            with readable_errors(f"cannot go on from {place}"):
                trainer.growth.load_state_dict(resumed[1].growth)
    elif not resumed:
        trainer.recorder.checkpoint(0, {})
    try:
        with distributed.gone():
            trainer.train(resume_from_checkpoint=place)
    except Exception as error:
        begun = resumed and trainer.state.global_step not in (0, resumed[1].step)
        if not place or begun or isinstance(error, (UniLoraError, torch.OutOfMemoryError)):
            raise
        raise CommandError(f"cannot go on from {place}: {type(error).__name__}: {one_line(error, 400)}") from error
    finally:
        trainer.watch.bar.close()


def conclude(trainer: AdapterTrainer) -> None:
    """With the adapter that is kept: score the test data, and write what the task has to show of its predictions."""
    task, recorder = trainer.task, trainer.recorder
    if task.test is None and task.look is None:
        return
    put_back(task, recorder.folder / ADAPTER)
    if task.test is not None:
        recorder.test = evaluating.evaluate(replace(task, held_out=task.test), trainer.accelerator.autocast)
    if task.look is not None and distributed.rank() == 0:
        task.model.eval()

        def logits(inputs: Tensor) -> Tensor:
            with torch.no_grad(), trainer.accelerator.autocast():
                return task.model(inputs.to(trainer.args.device)).float().cpu()

        with recorder.beside("predictions and pictures"):
            recorder.also_written += task.look(logits, recorder.folder)


def still_norms(model: nn.Module) -> list[nn.Module]:
    """The frozen normalisations whose running statistics training must not move: no adapter file holds them."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return [norm for norm in norms if not any(p.requires_grad for p in norm.parameters(recurse=False))]
