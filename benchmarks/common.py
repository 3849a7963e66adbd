"""What the benchmarks share: interleaved timing, and results with a header that says where they come from."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def interleaved(
    cases: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time each case in turn, round after round, so that a slow minute of the machine hits all alike.

    Args:
        clock: ``time.process_time`` counts this process alone, all its threads together.

    Returns:
        Name → median, fastest and slowest, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(warmup + repeats):
        for name, case in cases.items():
            start = clock()
            case()
            if round_ >= warmup:
                times[name].append(clock() - start)
    return {name: {"median_s": statistics.median(ts), "min_s": min(ts), "max_s": max(ts)} for name, ts in times.items()}


def machine() -> dict[str, object]:
    """CPU, cores and the versions that matter; no host name, no path."""
    packages = {}
    for name in ("numpy", "torch", "transformers", "peft", "timm", "jax", "flax", "qwix"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def write(name: str, results: dict) -> Path:
    """Write ``benchmarks/results/NAME.json`` with the machine's header."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
