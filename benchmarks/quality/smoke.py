"""A look at every task and method in seconds: few steps, few examples, nothing kept."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from common import SMOKE

from quality import report
from quality.jobs import FOLDER, SEEDS, SWEEP, Job, run
from quality.methods import middle
from quality.tasks import Data, TaskError, find, names

METHODS = ("head", "lora", "peft-lora", "peft-unilora", "peft-vera", "peft-vblora", "full", "none")


def smoke() -> None:
    """Every task whose data are there with Uni-LoRA; the first task with every kind of method; the report.

    Raises:
        TaskError: no task can be run, or results would be lost.
    """
    if not SMOKE:
        raise TaskError("a smoke run throws its results away; start it as python benchmarks/quality --smoke.")
    shutil.rmtree(FOLDER, ignore_errors=True)  # a copy: see common.py
    ran: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names():
            try:
                task = find(name)
                data = task.data()
            except TaskError as error:
                print(f"{name}: left out, {error}")
                continue
            task = dataclasses.replace(task, batch=2, examples=4, epochs=1)
            size = task.length or (lambda _: 0)
            pool, validation, test = (sorted(part[:200], key=size) for part in (data.pool, data.validation, data.test))
            small = Data(pool[: 2 * task.batch], validation[:4], test[:4])
            jobs = [Job(name, method, seed, middle(task, method)) for method, seed in cases(first=not ran)]
            ran += [row.job.task for row in run(jobs, task, small, Path(folder))]
    if not ran:
        raise TaskError("no task could be run; set UNILORA_DATA.")
    report.write()


def cases(*, first: bool) -> list[tuple[str, int]]:
    """Method and seed of the runs."""
    if not first:
        return [("uni-lora", SEEDS[0])]
    return [("uni-lora", SWEEP), *((method, SEEDS[0]) for method in ("uni-lora", *METHODS))]
