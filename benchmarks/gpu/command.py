"""Is it right on a GPU, and what does it cost there? Made for half an hour with a card, in calls of ten minutes.

    python benchmarks/gpu correct          # the tests that need a GPU; the same bits as NumPy, in PyTorch and JAX
    python benchmarks/gpu projection jax   # P and Pᵀ beside a copy of the same bytes, and beside PEFT's lines
    python benchmarks/gpu llama            # training steps and peak memory, the shapes of Llama-3.1-8B
    python benchmarks/gpu vit              # the same of ViT-B/16 and ViT-L/16
    python benchmarks/gpu merge bank       # merging 8B; 1,000 adapters in a batch
    python benchmarks/gpu report           # docs/performance.md, of the results that are there

Without a name all parts run in this order. A call begins no row after --minutes; the next call goes on where it
stopped, since a row that is there, measured with the same versions, is not run again. Each row is measured in a process
of its own, and kept at once, in ``benchmarks/results/gpu/CARD/PART.json``. Nothing is downloaded. A checkout that is
not installed runs with ``PYTHONPATH=.:backends:integrations:benchmarks``.
"""

import importlib
import json
import sys
import time

import torch
from common import SMOKE, parser

from gpu import report
from gpu.rows import Results, Row, alone, apart

PARTS = {
    "correct": "correct",
    "projection": "projection",
    "llama": "llama",
    "vit": "vit",
    "merge": "merge",
    "bank": "bank",
    "jax": "in_jax",
}
"""Part → its module, which has ``rows()``."""

MINUTES, GRACE = 8.0, 60.0
"""How long rows are begun, and how many seconds longer the last one may take."""


def main() -> None:
    arguments = _arguments()
    if arguments.row:
        print(json.dumps(alone(_row(arguments.part[0], json.loads(arguments.row)))))
    elif SMOKE:
        smoke()
    elif arguments.part == ["report"]:
        print(report.write())
    elif not torch.cuda.is_available():
        sys.exit("gpu: torch sees no CUDA device here, and every figure of this folder is one of a GPU; try --smoke.")
    else:
        sys.exit(run(arguments.part or list(PARTS), 60 * arguments.minutes, again=arguments.again))


def run(parts: list[str], seconds: float, *, again: bool) -> int:
    """Measure what is not there yet; 1 where a row failed."""
    end, left, failed = time.monotonic() + seconds, 0, 0
    for part in parts:
        results = Results.of(part)
        for row in rows(part):
            if not again and results.has(row):
                continue
            if (remaining := end - time.monotonic()) <= 0:
                left += 1
                continue
            outcome = apart(part, row, remaining + GRACE)
            results.keep(row, outcome)
            failed += "failed" in outcome
            print(part, row.name, *(f"{name}: {value}" for name, value in outcome.items()), sep="\n  ", flush=True)
    if left:
        print(f"{left} rows are left; the same command goes on with them.")
    return int(failed > 0)


def rows(part: str) -> list[Row]:
    """The rows of a part."""
    return importlib.import_module(f"gpu.{PARTS[part]}").rows()


def smoke() -> None:
    """Every row of every part, tiny, on the CPU, one of them in a process of its own; then the page of both."""
    if not report.is_current():
        sys.exit("gpu: docs/performance.md is not what the results say; run python benchmarks/gpu report.")
    for part in PARTS:
        results = Results.of(part)
        for i, row in enumerate(rows(part)):
            outcome = apart(part, row, 120) if (part, i) == ("projection", 0) else alone(row)
            if "failed" in outcome:
                sys.exit(f"gpu {part}, {row.name}: {outcome['failed']}")
            results.keep(row, outcome)
            print(part, row.name, outcome, flush=True)
        assert all(Results.of(part).has(row) for row in rows(part) if "figures" in results.outcome(row)), part
    print(report.write())


def _row(part: str, settings: dict) -> Row:
    return next(row for row in rows(part) if row.settings == settings)


def _arguments():
    made = parser(__doc__)
    made.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; all by default; or report, alone")
    made.add_argument("--again", action="store_true", help="also rows that are there")
    made.add_argument("--minutes", type=float, default=MINUTES, help="no row begins later (default: %(default)s)")
    made.add_argument("--row", metavar="JSON", help="the figures of one row of one part, in this process")
    arguments = made.parse_args()
    known = arguments.part == ["report"] or set(arguments.part) <= set(PARTS)
    if not known:
        made.error(f"expected parts among {', '.join(PARTS)}, or report alone; got {' '.join(arguments.part)}")
    return arguments
