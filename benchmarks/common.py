"""What the benchmarks share: ``--smoke``, timing in turns, and results with a header that says where they come from."""

import argparse
import atexit
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

SMOKE = "--smoke" in sys.argv
"""Whether this run only shows that the script still runs: tiny sizes, few rounds, and nothing is written for good."""


def _root() -> Path:
    """The checkout; with ``--smoke``, a copy of its results and pages that is gone when the script ends."""
    root = Path(__file__).parents[1]
    if not SMOKE:
        return root
    copy = tempfile.TemporaryDirectory()
    atexit.register(copy.cleanup)
    for folder in ("benchmarks/results", "docs"):
        shutil.copytree(root / folder, Path(copy.name, folder))
    return Path(copy.name)


_ROOT = _root()
RESULTS, DOCS = _ROOT / "benchmarks" / "results", _ROOT / "docs"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the text of a script as it stands, and knows ``--smoke``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds; what is written is thrown away")
    return made


def again(script: str, *arguments: str, **env: str) -> str:
    """Run a script in a new process, as small as this one; what it prints.

    Raises:
        subprocess.CalledProcessError: it failed; what it said has gone to standard error.
    """
    command = [sys.executable, script, *arguments, *(["--smoke"] if SMOKE else [])]
    path = {"PYTHONPATH": str(Path(__file__).parent)}  # also where PYTHONSAFEPATH is set
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | path | env).stdout


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
        Name → median, fastest and slowest, in seconds; of two rounds with ``--smoke``.
    """
    repeats, warmup = (2, 0) if SMOKE else (repeats, warmup)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(warmup + repeats):
        for name, case in cases.items():
            start = clock()
            case()
            if round_ >= warmup:
                times[name].append(clock() - start)
    return {name: {"median_s": statistics.median(ts), "min_s": min(ts), "max_s": max(ts)} for name, ts in times.items()}


def machine() -> dict[str, object]:
    """CPU, cores, how busy they were in the last minute, and the versions that matter; no host name, no path."""
    packages = {}
    for name in ("numpy", "torch", "transformers", "peft", "timm", "jax", "flax", "qwix"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "python": platform.python_version(), **packages}


def peak() -> int:
    """The most memory that this process has had, in bytes; Linux."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def table(rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown, of which the first row is the head."""
    head, *others = (list(map(str, row)) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others))


def write(name: str, results: dict) -> Path:
    """Write ``benchmarks/results/NAME.json`` with the machine's header."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
