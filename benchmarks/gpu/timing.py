"""Time and memory on the device."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved

from gpu.rows import DEVICE

Cases = dict[str, Callable[[], object]]


def milliseconds(cases: Cases, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """The median of each case, which take turns; by events of the device, where there is one."""
    if DEVICE.type == "cpu":
        return {name: 1000 * times["median_s"] for name, times in interleaved(cases, repeats, warmup).items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in cases}
    for round_ in range(warmup + repeats):
        for name, case in cases.items():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            case()
            pair[1].record()
            if round_ >= warmup:
                events[name].append(pair)
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def step_figures(step: Callable[[], object], repeats: int = 10, warmup: int = 3) -> dict[str, Any]:
    """The median milliseconds of a step, and the most memory that one of them has."""
    if DEVICE.type == "cpu":
        return {"ms": milliseconds({"step": step}, 1, 0)["step"]}
    torch.cuda.empty_cache()
    for _ in range(warmup):
        step()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds({"step": step}, repeats, 0)["step"]
    return {
        "ms": ms,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
