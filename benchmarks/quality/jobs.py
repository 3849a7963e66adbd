"""Jobs: one run each, a line of a file with everything that made it; what is there already is not run again."""

import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, SMOKE
from tqdm import tqdm

from quality.methods import RATES, TRAINING, Trained, adapt, middle
from quality.tasks import Data, Task, TaskError
from quality.training import fit

PROTOCOL = 2
"""Raised where anything changes that figures depend on; rows of another protocol are refused."""

FOLDER = RESULTS / "quality"
SWEEP, SEEDS = 100, range(5)
"""The seed that rates are chosen with, on validation examples; those that are judged, on test examples."""


Case = tuple[str, tuple[tuple[str, Any], ...]]
"""Method and options: what a rate is chosen for, and a mean is taken of."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        rate: η for a method of the framework, the optimiser's rate for others.
        options: name → value, of ``attach`` or PEFT's config; sorted.
    """

    task: str
    method: str
    seed: int
    rate: float
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def case(self) -> Case:
        """Method and options."""
        return self.method, self.options


@dataclass(frozen=True)
class Result:
    """A row with what it was made of: the adapted model, and the loss of every step."""

    row: "Row"
    trained: Trained
    losses: list[float]


@dataclass(frozen=True)
class Row:
    """A job and what came of it."""

    job: Job
    figures: dict[str, float]
    """Of the last step; ``loss`` is that of training, the mean of the last tenth of the steps."""
    about: dict[str, Any]
    """trained, head, bytes, seconds, steps, versions, and D, d and θ_d's rate where there is a θ_d."""

    def to_json(self) -> dict[str, Any]:
        """A line of the file."""
        job = {"task": self.job.task, "method": self.job.method, "seed": self.job.seed, "rate": self.job.rate}
        return {
            "protocol": PROTOCOL,
            **job,
            "options": dict(self.job.options),
            "figures": self.figures,
            "about": self.about,
        }


def options_of(values: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options in the order of their names."""
    return tuple(sorted(values.items()))


def read(name: str) -> list[Row]:
    """The rows of a task.

    Raises:
        TaskError: a line that is no row of this protocol, with its number.
    """
    path = FOLDER / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [_row(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1)]


def _row(line: str, where: str) -> Row:
    try:
        data = json.loads(line)
        protocol = data["protocol"]
        options = options_of(data["options"])
        job = Job(data["task"], data["method"], data["seed"], data["rate"], options)
        row = Row(job, data["figures"], data["about"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"{where}: no row of results ({type(error).__name__}: {error}); take the line away.") from None
    if protocol != PROTOCOL:
        raise TaskError(
            f"{where}: protocol {protocol}, expected {PROTOCOL}: its figures cannot be compared. Take the file away, "
            "and run its jobs again."
        )
    return row


def run_one(job: Job, task: Task, data: Data, work: Path, *, progress: bool = False) -> Result:
    """Train and measure one job."""
    order = np.random.default_rng(job.seed).permutation(len(data.pool))[: task.examples]
    torch.manual_seed(job.seed)
    trained = adapt(task.model(work), task, job.method, job.rate, job.seed, dict(job.options))
    losses, seconds = fit(
        trained.model,
        trained.groups,
        [data.pool[i] for i in order] if trained.groups else [],
        task.collate,
        task.loss,
        epochs=task.epochs,
        batch=task.batch,
        seed=job.seed,
        title=f"{job.method}, {job.rate:g}" if progress else "",
        length=task.length,
        **{name: value for name, value in job.options if name in TRAINING},
    )
    trained.model.eval()
    with torch.inference_mode():
        figures = task.figures(trained.model, data.validation if job.seed == SWEEP else data.test)
    about = {
        "trained": trained.numbers,
        "head": sum(p.numel() for group in trained.groups for p in group["params"]) - trained.numbers,
        "bytes": trained.bytes(),
        "seconds": round(seconds, 1),
        "steps": len(losses),
        "loss": round(statistics.mean(losses[-math.ceil(len(losses) / 10) :]), 5) if losses else None,
        **trained.about,
        "versions": {name: importlib.metadata.version(name) for name in ("unilora", "torch")},
        "date": time.strftime("%Y-%m-%d"),
    }
    return Result(Row(job, {name: round(value, 5) for name, value in figures.items()}, about), trained, losses)


def run(jobs: Iterable[Job], task: Task, data: Data, work: Path, part: str = "0/1") -> list[Row]:
    """Run what has no row yet; ``part`` "i/n" takes every n-th of it, for parallel processes."""
    first, step = map(int, part.split("/"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(jobs))
    done = {row.job for row in read(wanted[0].task)} if wanted else set()
    made = []
    for job in tqdm([job for job in wanted if job not in done][first::step], desc="runs", disable=SMOKE):
        made.append(run_one(job, task, data, work, progress=not SMOKE).row)
        with (FOLDER / f"{job.task}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(made[-1].to_json()) + "\n")
    return made


# ---- which jobs -----------------------------------------------------------------------------------------------------


def sweep(name: str, task: Task, case: Case) -> Iterator[Job]:
    """A case at each of its four rates, on the seed of its own."""
    method, options = case
    yield from (Job(name, method, SWEEP, round(middle(task, method) * factor, 9), options) for factor in RATES)


def best_rate(rows: list[Row], task: Task, case: Case) -> float:
    """The rate of a case that is best on the validation examples, the smaller one of equals.

    Raises:
        TaskError: the case has no sweep yet.
    """
    swept = sorted(
        (row for row in rows if row.job.case == case and row.job.seed == SWEEP), key=lambda row: row.job.rate
    )
    if not swept:
        raise TaskError(f"{task.title}: {case[0]} has no sweep yet; run it with `sweep` first.")
    sign = 1 if task.higher else -1
    return max(swept, key=lambda row: sign * _number(row.figures[task.metric], task.higher)).job.rate


def _number(value: float, higher: bool) -> float:
    """A loss that diverged is the worst."""
    return value if math.isfinite(value) else (-math.inf if higher else math.inf)


def judged(name: str, case: Case, rate: float) -> Iterator[Job]:
    """A case at one rate, on the seeds that are judged."""
    yield from (Job(name, case[0], seed, rate, case[1]) for seed in SEEDS)
