"""The outputs of a training run: the adapter, metrics as CSV and JSON, a picture, and the table at the end."""

import contextlib
import json
import math
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, number, one_line, say, table
from unilora_cli.options.finetune import Finetune
from unilora_cli.outputs import blank_figure, csv_text, write_csv, write_png
from unilora_cli.tasks.task import Task
from unilora_cli.training import checkpoints, hub
from unilora_cli.training.distributed import only_first
from unilora_core import ProjectionSpec, read_adapter
from unilora_core.files import write_file
from unilora_core.header import SETTINGS, read_header

__all__ = ["ADAPTER", "Recorder"]

ADAPTER = "adapter.safetensors"


class Recorder:
    """Writes into the output folder while training goes on, so that an interrupted run leaves what it has.

    All processes of a run have one, with the same scores; the first alone writes and prints.

    Attributes:
        folder: the output folder.
        options: what the user said; ``keep`` is the epoch whose adapter stays in the file, the last or the best.
        about: what metrics.json says of the run beside its results.
        epochs: a record per evaluation: epoch, step, mean training loss, the scores, seconds.
        test: the scores of the kept adapter on the test data, where there are any.
        also_written: names of further files in the folder.
        skipped: steps that were not taken because the gradient overflowed float16.
        stopped_early: why training ended before its last step; empty unless it did.
        unwritten: what stands beside the adapter and could not be written, and why.
        pushed: the address of the commit on the hub.
    """

    def __init__(
        self, folder: Path, task: Task, options: Finetune, about: Mapping[str, Any], resumed: checkpoints.Run | None
    ):
        self.folder, self.task, self.options, self.about = folder, task, options, dict(about)
        self.epochs: list[dict[str, Any]] = list(resumed.epochs) if resumed else []
        self.losses: list[tuple[int, float, float]] = list(resumed.losses) if resumed else []
        self.test: dict[str, float] = {}
        self.also_written = ["metrics.csv", "summary.csv", "metrics.json", "loss.png"]
        self.skipped = resumed.skipped if resumed else 0
        self.stopped_early = ""
        self.unwritten: dict[str, str] = {}
        self.pushed = ""
        self.began = time.perf_counter() - (resumed.seconds if resumed else 0)
        self._since = len(self.losses)
        self._open(fresh=not resumed)

    @only_first
    def _open(self, fresh: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:  # --overwrite: an old adapter must not pass for this run's
            (self.folder / ADAPTER).unlink(missing_ok=True)
            checkpoints.forget(self.folder)
            _try(self)
        self._write_steps()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.failed("interrupted")

    @contextlib.contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """What cannot be written beside the adapter, or drawn, ends no training: it is said now, and by `finish`."""
        try:
            yield
        except Exception as error:
            why = (error.strerror if isinstance(error, OSError) else "") or f"{type(error).__name__}: {error}"
            if what not in self.unwritten:
                self.tell(f"  {what} cannot be written ({one_line(why, 200)}); going on")
            self.unwritten[what] = one_line(why, 200)
        else:
            self.unwritten.pop(what, None)

    def step(self, step: int, loss: float, rate: float) -> None:
        """One step: its loss, and the rate of θ_d that it used."""
        self.losses.append((step, loss, rate))
        if "metrics.csv" not in self.unwritten:  # else with the others at the next evaluation
            self._write_steps(last=True)

    @only_first
    def _write_steps(self, last: bool = False) -> None:
        """Write metrics.csv as far as it goes, or add the last step to it."""
        path = self.folder / "metrics.csv"
        with self.beside("metrics.csv"):
            if not last or not path.exists():
                write_csv(path, [["step", "loss", "rate"], *(_csv_step(*row) for row in self.losses)])
            else:
                with path.open("a", newline="", encoding="utf-8") as file:
                    file.write(csv_text([_csv_step(*self.losses[-1])]))

    def epoch(self, epoch: int, step: int, scores: Mapping[str, float]) -> None:
        """Save the adapter, if it is to be kept, and what is known so far, and print a line."""
        recent = [loss for _, loss, _ in self.losses[self._since :]]
        self._since = len(self.losses)
        loss = {"train_loss": sum(recent) / len(recent)} if recent else {}
        width = {"d": self.task.adapter.spec.d} if self.options.grow_to else {}
        self.epochs.append({"epoch": epoch, "step": step, **loss, **width, **scores, "seconds": self._seconds()})
        if epoch and self.kept() is self.epochs[-1]:
            self.save()
        self.write("running")
        name = f"epoch {epoch}" if epoch else "before"
        before = f"training loss {number(loss['train_loss'])}, " if recent else ""
        held_out = ", ".join(f"{key} {number(value)}" for key, value in scores.items())
        self.tell(f"  {name}: {before}held out: {held_out}")

    def tell(self, line: str) -> None:
        """Print a line; training goes on where nobody reads it any more, or what it is written to is full."""
        with contextlib.suppress(OSError):
            say(line)

    @property
    def keeps(self) -> str:
        """In words, the epoch whose adapter is in the file."""
        return {"last": "last whole", "best": "best"}[self.options.keep]

    def kept(self) -> dict[str, Any]:
        """The record of the epoch whose adapter is in the file; of the last evaluation before there is one."""
        trained = [row for row in self.epochs if row["epoch"]]
        if self.options.keep == "last" or not trained:
            return self.epochs[-1] if self.epochs else {}
        return self._best(trained)

    def waits_in_vain(self, patience: int | None) -> bool:
        """Whether the first metric has not become better for ``patience`` epochs; then `stopped_early` says so."""
        trained = [row for row in self.epochs if row["epoch"]]
        if patience is None or not trained:
            return False
        best = self._best(trained)
        if trained[-1]["epoch"] - best["epoch"] < patience:
            return False
        name = self.task.metrics[0].name
        self.stopped_early = (
            f"after epoch {trained[-1]['epoch']}: {name} has not been better than in epoch {best['epoch']}"
        )
        return True

    def _best(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The first of the best by the task's first metric."""
        metric = self.task.metrics[0]
        sign = 1 if metric.higher else -1
        return max(rows, key=lambda row: -math.inf if math.isnan(row[metric.name]) else sign * row[metric.name])

    @only_first
    def checkpoint(self, step: int, growth: Mapping[str, Any]) -> None:
        """Write down what ``--resume`` needs beside the Trainer's own checkpoint of this step."""
        known = {"epochs": self.epochs, "losses": self.losses, "skipped": self.skipped, "seconds": self._seconds()}
        known |= {"settings": checkpoints.made_for(self.options), "spec": self.task.adapter.spec.first.to_json()}
        with self.beside(checkpoints.FOLDER):
            checkpoints.write(self.folder, {"step": step, "growth": growth, **known})

    @only_first
    def save(self) -> None:
        """Write the adapter file.

        Raises:
            CommandError: it cannot be written in the folder; it says where else it is.
            OSError: nor anywhere else.
        """
        _save(self.task, self.folder / ADAPTER)

    def failed(self, why: str) -> None:
        """Write down why training ended early."""
        self.write(f"stopped: {why}")

    @only_first
    def finish(self) -> None:
        """Write the last outputs, and print the table.

        Raises:
            CommandError: something beside the adapter could not be written.
        """
        with self.beside("loss.png"):
            _draw(self.folder / "loss.png", self.losses, self.epochs, self.task.metrics[0].name)
        self.write("finished")
        if name := self.options.push_to_hub:
            with self.beside(f"{name} on the hub"):
                self.pushed = _push(self, name)
        checkpoints.forget(self.folder)
        say("\nresult\n" + table(_summary(self)))
        self.unwritten.pop(checkpoints.FOLDER, None)  # which is of no use any more
        if self.unwritten:
            lost = "; ".join(f"{what} ({why})" for what, why in self.unwritten.items())
            raise CommandError(f"the adapter is in {self.folder / ADAPTER}, but this could not be written: {lost}.")

    @only_first
    def write(self, status: str) -> None:
        """Write metrics.json and summary.csv, and metrics.csv again where it is gone."""
        final = {key: value for key, value in self.kept().items() if key != "seconds"}
        contents = self.about | {
            "status": status,
            **({"stopped_early": self.stopped_early} if self.stopped_early else {}),
            **({"skipped_steps": self.skipped} if self.skipped else {}),
            "final": final,
            **({"test": self.test} if self.test else {}),
            "epochs": self.epochs,
            "bytes": _bytes(self.folder / ADAPTER, _saved(self)),
            "seconds": self._seconds(),
        }
        with self.beside("metrics.json"):
            write_file(self.folder / "metrics.json", (json.dumps(contents, indent=2, default=str) + "\n").encode())
        with self.beside("summary.csv"):
            write_csv(self.folder / "summary.csv", _epoch_rows(self))
        if "metrics.csv" in self.unwritten or not (self.folder / "metrics.csv").exists():
            self._write_steps()

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.began, 3)


def _save(task: Task, file: Path) -> None:
    metadata = task.base.metadata()
    try:
        task.adapter.save(file, metadata=metadata)
    except OSError as error:
        other = Path(tempfile.gettempdir(), f"unilora-{secrets.token_hex(8)}.safetensors")
        try:
            task.adapter.save(other, metadata=metadata)
        except OSError:
            raise error from None
        raise CommandError(f"{file}: {error.strerror or error}; the adapter of this epoch is in {other}.") from error


def _try(recorder: Recorder) -> None:
    """Save the adapter as it starts, read it and take it away: what fails in that is said before training."""
    recorder.save()
    file = recorder.folder / ADAPTER
    try:
        read_header(file, read_adapter(file)).settings(given=recorder.task.base.arguments.keys() - SETTINGS.keys())
    finally:
        file.unlink()


def _saved(recorder: Recorder) -> ProjectionSpec:
    """The spec of the adapter in the file, whose d may be that of before a growth."""
    spec, file = recorder.task.adapter.spec, recorder.folder / ADAPTER
    return read_adapter(file).spec if spec.first is not spec and file.is_file() else spec


def _bytes(file: Path, spec: ProjectionSpec) -> dict[str, int]:
    size = file.stat().st_size if file.is_file() else 0
    lora = {"adapter_as_lora": size + 4 * (spec.D - spec.d) if size else 0} if spec.frame == "pair" else {}
    return {"adapter": size} | lora


def _epoch_rows(recorder: Recorder) -> list[list[object]]:
    """A line per evaluation, with the columns that timm's own training script has."""
    names = ["loss", *(metric.name for metric in recorder.task.metrics)]
    rates = {step: rate for step, _, rate in recorder.losses}
    rows: list[list[object]] = [["epoch", "train_loss", *(f"eval_{name}" for name in names), "lr"]]
    for row in recorder.epochs:
        rows.append([row["epoch"], row.get("train_loss", ""), *(row[n] for n in names), rates.get(row["step"], "")])
    return rows


def _results(recorder: Recorder) -> list[tuple[str, str]]:
    """How good the kept adapter is, and how large."""
    kept, plan, saved = recorder.kept(), recorder.about["plan"], _saved(recorder)
    names = ("loss", *(metric.name for metric in recorder.task.metrics))
    scores = [(f"held-out {name}", number(kept[name])) for name in names]
    if not recorder.epochs[0]["epoch"]:
        scores = [(name, f"{value} (before: {number(recorder.epochs[0][name[9:]])})") for name, value in scores]
    if recorder.options.keep == "best":
        scores.append(("epoch", f"{kept['epoch']}, the best of {recorder.epochs[-1]['epoch']}"))
    if recorder.stopped_early:
        scores.append(("stopped early", recorder.stopped_early))
    if recorder.skipped:
        scores.append(
            ("skipped steps", f"{recorder.skipped} of {len(recorder.losses)}: their gradient overflowed float16")
        )
    scores += [(f"test {name}", number(value)) for name, value in recorder.test.items()]
    return [*scores, ("trained numbers", f"{plan['trained'] + saved.d - plan['d']:,}")]


def _merging(file: str, options: Finetune) -> str:
    """The command that merges the adapter, with what was said of the base that no file may say."""
    words = [
        f"--model-arg={name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.model_arg
        if name not in SETTINGS
    ]
    return shlex.join(["unilora", "merge", file, *words, "--out", "merged/"])


def _push(recorder: Recorder, name: str) -> str:
    """Upload the adapter, its losses and a card; what names the data stays here."""
    files = (recorder.folder / file for file in (ADAPTER, "metrics.csv", "summary.csv", "loss.png"))
    text = hub.card(name, recorder.options.model, _results(recorder), _merging(ADAPTER, recorder.options))
    return hub.push(name, [file for file in files if file.is_file()], text)


def _summary(recorder: Recorder) -> list[tuple[str, str]]:
    sizes = _bytes(recorder.folder / ADAPTER, _saved(recorder))
    as_lora = f" (as LoRA: {sizes['adapter_as_lora']:,})" if "adapter_as_lora" in sizes else ""
    return [
        *_results(recorder),
        ("adapter", f"{recorder.folder / ADAPTER}, {sizes['adapter']:,} bytes{as_lora}"),
        *([("on the hub", recorder.pushed)] if recorder.pushed else []),
        ("merge it", _merging(str(recorder.folder / ADAPTER), recorder.options)),
        ("time", f"{recorder._seconds():.1f} s"),
        ("also written", f"{', '.join(recorder.also_written)} in {recorder.folder}"),
    ]


def _csv_step(step: int, loss: float, rate: float) -> list[object]:
    return [step, f"{loss:.6g}", f"{rate:.6g}"]


def _draw(path: Path, losses: list[tuple[int, float, float]], epochs: list[dict[str, Any]], metric: str) -> None:
    """The losses and rates of all steps, and the loss and the metric of all evaluations."""
    import pandas as pd

    figure = blank_figure(7, 6)
    above, middle, below = figure.subplots(3, sharex=True, height_ratios=[3, 3, 1])
    steps, training, rates = zip(*losses, strict=True)
    above.plot(steps, training, color="tab:blue", alpha=0.3, linewidth=0.8)
    mean = pd.Series(training).ewm(alpha=min(0.5, 20 / len(training))).mean()  # without a bias to its start
    above.plot(steps, mean, color="tab:blue", label="training (moving mean)")
    at = [row["step"] for row in epochs]
    above.plot(at, [row["loss"] for row in epochs], "o-", color="tab:orange", label="held out")
    above.legend()
    middle.plot(at, [row[metric] for row in epochs], "o-", color="tab:orange")
    below.plot(steps, rates, color="tab:gray")
    for axes, label in ((above, "loss"), (middle, f"held-out {metric}"), (below, "rate of θ_d")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    below.set_xlabel("step")
    write_png(figure, path)
