"""What is compared, by name: each plan gives the cases of a task, whose rates are swept or said."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quality.jobs import Case, best_rate, judged, options_of, read, run, sweep
from quality.tasks import Task

Plan = Callable[[Task, int], Iterator[tuple[str, dict[str, Any]]]]
"""Task and D at rank 4 → method and options of each case."""


def baselines(task: Task, _D: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """LoRA at two ranks, all weights, the head alone or nothing, and Uni-LoRA."""
    yield "uni-lora", {}
    yield "lora", {}
    yield "lora", {"rank": 16}
    yield "full", {}
    yield "head" if task.head else "none", {}


def shapes(_task: Task, D: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rank at fixed d, and d at fixed rank."""
    for part in (4, 16, 64):
        for rank in (1, 4, 16, 64):
            yield "uni-lora", {"rank": rank, "d": D // part}


def maps(_task: Task, D: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other choices of P at the same d, and Uni-LoRA's own."""
    yield "uni-lora", {}
    for grouping in ("iid", "local", "by-factor", "unnormalised"):
        yield "uni-lora", {"grouping": grouping, "d": D // 16}
    for method in ("fastfood", "gaussian"):
        yield method, {"d": D // 16}
    yield "uni-lora", {"start": "paper"}


PLANS: dict[str, Plan] = {"baselines": baselines, "shapes": shapes, "maps": maps}


def carry_out(plan: str, name: str, task: Task, work: Path, part: str, *, seeds: int) -> None:
    """Sweep the rates of each case, then judge it at the best; Uni-LoRA as it comes at the default rate, too."""
    torch.manual_seed(0)
    D = task.attach(task.model(work), rank=4).spec.D
    data = task.data()
    for method, options in PLANS[plan](task, D):
        case: Case = method, options_of(options)
        if method == "none":  # nothing trains, so every seed and rate is the same
            run(list(judged(name, case, 0.0))[:1], task, data, work, part)
            continue
        run(sweep(name, task, case), task, data, work, part)
        rates = {best_rate(read(name), task, case)} | ({task.rate} if case == ("uni-lora", ()) else set())
        run([job for rate in rates for job in list(judged(name, case, rate))[:seeds]], task, data, work, part)
