"""The outputs of a training run: the adapter, metrics as CSV and JSON, a picture, and the table at the end."""

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilora_cli.console import number, say, table
from unilora_cli.task import Task

__all__ = ["ADAPTER", "Recorder"]

ADAPTER = "adapter.safetensors"


class Recorder:
    """Writes into the output folder while training goes on, so that an interrupted run leaves what it has.

    Attributes:
        folder: the output folder.
        epochs: a record per evaluation: epoch, step, mean training loss, the scores, seconds.
    """

    def __init__(self, folder: Path, task: Task, about: Mapping[str, Any]):
        self.folder, self.task, self.about = folder, task, dict(about)
        self.epochs: list[dict[str, Any]] = []
        self.losses: list[tuple[int, float, float]] = []
        self.began = time.perf_counter()
        self._since = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER).unlink(missing_ok=True)  # --overwrite: an old adapter must not pass for this run's
        self._file = (folder / "metrics.csv").open("w", newline="", encoding="utf-8", buffering=1)
        self._rows = csv.writer(self._file)
        self._rows.writerow(["step", "loss", "rate"])

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def step(self, step: int, loss: float, rate: float) -> None:
        """One step: its loss, and the rate of θ_d that it used."""
        self.losses.append((step, loss, rate))
        self._rows.writerow([step, f"{loss:.6g}", f"{rate:.6g}"])

    def epoch(self, epoch: int, step: int, scores: Mapping[str, float]) -> None:
        """Save the adapter and what is known so far, and print a line."""
        recent = [loss for _, loss, _ in self.losses[self._since :]]
        self._since = len(self.losses)
        row: dict[str, Any] = {"epoch": epoch, "step": step}
        if recent:
            row["train_loss"] = sum(recent) / len(recent)
            self.save()
        self.epochs.append(row | dict(scores) | {"seconds": round(time.perf_counter() - self.began, 3)})
        self.write("running")
        name = f"epoch {epoch}" if epoch else "before"
        before = f"training loss {number(row['train_loss'])}, " if recent else ""
        say(f"  {name}: {before}held out: " + ", ".join(f"{key} {number(value)}" for key, value in scores.items()))

    def save(self) -> None:
        """Write the adapter file."""
        self.task.adapter.save(self.folder / ADAPTER, metadata=self.task.base.metadata())

    def failed(self, why: str) -> None:
        """Write down why training ended early."""
        self.write(f"stopped: {why}")

    def finish(self) -> None:
        """Write the last outputs, and print the table."""
        self.write("finished")
        self._plot()
        say("\nresult\n" + table(self._summary()))

    def write(self, status: str) -> None:
        """Write metrics.json, and what metrics.csv still lacks."""
        self._file.flush()
        final = {key: value for key, value in (self.epochs[-1] if self.epochs else {}).items() if key != "seconds"}
        contents = self.about | {
            "status": status,
            "final": final,
            "epochs": self.epochs,
            "bytes": self._bytes(),
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        (self.folder / "metrics.json").write_text(json.dumps(contents, indent=2, default=str) + "\n", encoding="utf-8")

    def _bytes(self) -> dict[str, int]:
        file, spec = self.folder / ADAPTER, self.task.adapter.spec
        size = file.stat().st_size if file.is_file() else 0
        return {"adapter": size, "adapter_as_lora": size + 4 * (spec.D - spec.d) if size else 0}

    def _summary(self) -> list[tuple[str, str]]:
        last, sizes = self.epochs[-1], self._bytes()
        scores = [(f"held-out {name}", number(last[name])) for name in ("loss", self.task.measure)]
        if not self.epochs[0]["epoch"]:
            scores = [(name, f"{value} (before: {number(self.epochs[0][name[9:]])})") for name, value in scores]
        return [
            *scores,
            ("trained numbers", f"{self.about['plan']['trained']:,}"),
            ("adapter", f"{self.folder / ADAPTER}, {sizes['adapter']:,} bytes (as LoRA: {sizes['adapter_as_lora']:,})"),
            ("time", f"{time.perf_counter() - self.began:.1f} s"),
            ("also written", f"metrics.csv, metrics.json, loss.png in {self.folder}"),
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
        measure = self.task.measure
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
