"""What is compared, by name: each plan gives the cases of a task, whose rates are swept or said."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quality.jobs import Case, best_rate, judged, options_of, read, run, sweep
from quality.tasks import Task
from unilora_core import Layout

Plan = Callable[[Task, Layout], Iterator[tuple[str, dict[str, Any]]]]
"""Task and LoRA's layout at rank 4 → method and options of each case."""


def baselines(task: Task, _layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """LoRA at two ranks, all weights, the head alone or nothing, and Uni-LoRA, also at LoRA's rank."""
    yield "uni-lora", {}
    yield "uni-lora", {"rank": 4}
    yield "lora", {}
    yield "lora", {"rank": 16}
    yield "full", {}
    yield "head" if task.head else "none", {}


def shapes(_task: Task, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rank at fixed d, and d at fixed rank: those of Uni-LoRA, 16 and D/16, are not said."""
    for part in (4, 16, 64):
        for rank in (1, 4, 16, 64):
            said = {"rank": rank, "d": layout.size // part}
            usual = {"rank": 16, "d": layout.size // 16}
            yield "uni-lora", dict(said.items() - usual.items())


def maps(_task: Task, _layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other choices of P at the same d, and Uni-LoRA's own; at rank 4, since the dense one costs D·d."""
    yield "uni-lora", {"rank": 4}
    for grouping in ("iid", "local", "by-factor", "unnormalised"):
        yield "uni-lora", {"grouping": grouping, "rank": 4}
    for method in ("fastfood", "gaussian"):
        yield method, {"rank": 4}
    yield "uni-lora", {"start": "paper", "rank": 4}


def methods(_task: Task, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method at as many numbers as Uni-LoRA has by default, or at few if it cannot have as few."""
    d, targets = layout.size // 16, len(layout.factors) // 2
    sides = [shape[-1] if name.endswith(".A") else shape[-2] for name, shape in layout.factors]
    for method in ("uni-lora", "fastfood", "gpart", "intrinsic-dimension"):
        yield method, {}
    if layout.size * d < 10**7:  # its cost
        yield "gaussian", {"rank": 4}
    yield "lora-xs", {"rank": min(math.isqrt(d // targets), *sides)}
    yield "fourierft", {"frequencies": d // targets}
    yield "vera", {}  # more: a number for each output, at least
    yield "vera", {"d": d, "grouping": "balanced"}
    yield "tied-lora", {"rank": 1}
    yield "lora", {"rank": 1}
    length = math.gcd(*sides)
    yield "vb-lora", {"length": length, "vectors": max(2, round(d / (layout.size // length + length)))}


PLANS: dict[str, Plan] = {"baselines": baselines, "shapes": shapes, "maps": maps, "methods": methods}


def carry_out(plan: str, name: str, task: Task, work: Path, part: str, *, seeds: int) -> None:
    """Sweep the rates of each case, then judge it at the best; Uni-LoRA at the task's rate, too."""
    torch.manual_seed(0)
    layout = task.attach(task.model(work), rank=4).spec.layout
    data = task.data()
    for method, options in PLANS[plan](task, layout):
        case: Case = method, options_of(options)
        if method == "none":  # nothing trains, so every seed and rate is the same
            run(list(judged(name, case, 0.0))[:1], task, data, work, part)
            continue
        run(sweep(name, task, case), task, data, work, part)
        rates = {best_rate(read(name), task, case)} | ({task.rate} if method == "uni-lora" else set())
        run([job for rate in rates for job in list(judged(name, case, rate))[:seeds]], task, data, work, part)
