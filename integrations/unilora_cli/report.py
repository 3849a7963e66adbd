"""The outputs of a training run: the adapter, metrics as CSV and JSON, a picture, and the table at the end."""

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilora_cli import checkpoint
from unilora_cli.console import number, say, table
from unilora_cli.task import Task

__all__ = ["ADAPTER", "Recorder"]

ADAPTER = "adapter.safetensors"


class Recorder:
    """Writes into the output folder while training goes on, so that an interrupted run leaves what it has.

    Attributes:
        folder: the output folder.
        keep: the adapter of which epoch stays in the file: ``"last"``, or ``"best"`` by the task's first metric.
        epochs: a record per evaluation: epoch, step, mean training loss, the scores, seconds.
        test: the scores of the kept adapter on the test data, where there are any.
        also_written: names of further files in the folder.
    """

    def __init__(
        self, folder: Path, task: Task, about: Mapping[str, Any], keep: str, resumed: Mapping[str, Any] | None = None
    ):
        self.folder, self.task, self.about, self.keep = folder, task, dict(about), keep
        self.epochs: list[dict[str, Any]] = list(resumed["epochs"]) if resumed else []
        self.losses: list[tuple[int, float, float]] = list(resumed["losses"]) if resumed else []
        self.test: dict[str, float] = {}
        self.also_written = ["metrics.csv", "metrics.json", "loss.png"]
        self.began = time.perf_counter() - (resumed["seconds"] if resumed else 0)
        self._since = len(self.losses)
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:  # --overwrite: an old adapter must not pass for this run's
            for name in (ADAPTER, checkpoint.FILE):
                (folder / name).unlink(missing_ok=True)
        self._file = (folder / "metrics.csv").open("w", newline="", encoding="utf-8", buffering=1)
        self._rows = csv.writer(self._file)
        self._rows.writerow(["step", "loss", "rate"])
        for row in self.losses:
            self._write_step(*row)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def step(self, step: int, loss: float, rate: float) -> None:
        """One step: its loss, and the rate of θ_d that it used."""
        self.losses.append((step, loss, rate))
        self._write_step(step, loss, rate)

    def epoch(self, epoch: int, step: int, scores: Mapping[str, float]) -> None:
        """Save the adapter, if it is to be kept, and what is known so far, and print a line."""
        recent = [loss for _, loss, _ in self.losses[self._since :]]
        self._since = len(self.losses)
        row: dict[str, Any] = {"epoch": epoch, "step": step}
        if recent:
            row["train_loss"] = sum(recent) / len(recent)
        self.epochs.append(row | dict(scores) | {"seconds": self._seconds()})
        if epoch and self.kept() is self.epochs[-1]:
            self.save()
        self.write("running")
        name = f"epoch {epoch}" if epoch else "before"
        before = f"training loss {number(row['train_loss'])}, " if recent else ""
        say(f"  {name}: {before}held out: " + ", ".join(f"{key} {number(value)}" for key, value in scores.items()))

    @property
    def keeps(self) -> str:
        """In words, the epoch whose adapter is in the file."""
        return {"last": "last whole", "best": "best"}[self.keep]

    def kept(self) -> dict[str, Any]:
        """The record of the epoch whose adapter is in the file; of the last evaluation before there is one."""
        trained = [row for row in self.epochs if row["epoch"]]
        if self.keep == "last" or not trained:
            return self.epochs[-1] if self.epochs else {}
        metric = self.task.metrics[0]
        return (max if metric.higher else min)(trained, key=lambda row: row[metric.name])

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write down what ``--resume`` needs after this epoch."""
        known = {"epochs": self.epochs, "losses": self.losses, "seconds": self._seconds()}
        made_for = checkpoint.made_for(self.about["settings"], self.task.adapter.spec)
        checkpoint.write(self.folder, {**state, **known, **made_for})

    def save(self) -> None:
        """Write the adapter file."""
        self.task.adapter.save(self.folder / ADAPTER, metadata=self.task.base.metadata())

    def failed(self, why: str) -> None:
        """Write down why training ended early."""
        self.write(f"stopped: {why}")

    def finish(self) -> None:
        """Write the last outputs, and print the table."""
        self.write("finished")
        (self.folder / checkpoint.FILE).unlink(missing_ok=True)
        self._plot()
        say("\nresult\n" + table(self._summary()))

    def write(self, status: str) -> None:
        """Write metrics.json, and what metrics.csv still lacks."""
        self._file.flush()
        final = {key: value for key, value in self.kept().items() if key != "seconds"}
        contents = self.about | {
            "status": status,
            "final": final,
            **({"test": self.test} if self.test else {}),
            "epochs": self.epochs,
            "bytes": self._bytes(),
            "seconds": self._seconds(),
        }
        (self.folder / "metrics.json").write_text(json.dumps(contents, indent=2, default=str) + "\n", encoding="utf-8")

    def _write_step(self, step: int, loss: float, rate: float) -> None:
        self._rows.writerow([step, f"{loss:.6g}", f"{rate:.6g}"])

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.began, 3)

    def _bytes(self) -> dict[str, int]:
        file, spec = self.folder / ADAPTER, self.task.adapter.spec
        size = file.stat().st_size if file.is_file() else 0
        return {"adapter": size, "adapter_as_lora": size + 4 * (spec.D - spec.d) if size else 0}

    def _summary(self) -> list[tuple[str, str]]:
        kept, sizes = self.kept(), self._bytes()
        names = ("loss", *(metric.name for metric in self.task.metrics))
        scores = [(f"held-out {name}", number(kept[name])) for name in names]
        if not self.epochs[0]["epoch"]:
            scores = [(name, f"{value} (before: {number(self.epochs[0][name[9:]])})") for name, value in scores]
        if self.keep == "best":
            scores.append(("epoch", f"{kept['epoch']}, the best of {self.epochs[-1]['epoch']}"))
        scores += [(f"test {name}", number(value)) for name, value in self.test.items()]
        return [
            *scores,
            ("trained numbers", f"{self.about['plan']['trained']:,}"),
            ("adapter", f"{self.folder / ADAPTER}, {sizes['adapter']:,} bytes (as LoRA: {sizes['adapter_as_lora']:,})"),
            ("time", f"{self._seconds():.1f} s"),
            ("also written", f"{', '.join(self.also_written)} in {self.folder}"),
        ]

    def _plot(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        steps, losses = [step for step, *_ in self.losses], [loss for _, loss, _ in self.losses]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training (moving mean)")
        axes.plot(
            [e["step"] for e in self.epochs],
            [e["loss"] for e in self.epochs],
            "o-",
            color="tab:orange",
            label="held out",
        )
        right = axes.twinx()
        measure = self.task.metrics[0].name
        right.plot(
            [e["step"] for e in self.epochs], [e[measure] for e in self.epochs], "s--", color="tab:green", label=measure
        )
        right.set_ylabel(measure)
        figure.legend(handles=[*axes.get_lines()[1:], *right.get_lines()], loc="outside upper center", ncols=3)
        figure.savefig(self.folder / "loss.png", dpi=120)


def _smooth(values: list[float]) -> list[float]:
    """An exponential moving mean, without a bias to its start."""
    keep, mean, weight, smooth = max(0.5, 1 - 20 / max(1, len(values))), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
