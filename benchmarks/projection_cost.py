"""Time and memory of θ_D = P θ_d and of Pᵀ over D and d: Uni-LoRA O(D), Fastfood O(D log d), Gaussian O(D·d).

    python benchmarks/projection_cost.py            # five minutes of one core
    python benchmarks/projection_cost.py --quick    # up to D = 10^6, two minutes, nothing written
    python benchmarks/projection_cost.py --plot     # the picture from the results alone

The maps of `unilora_core` in NumPy, float32, one thread; what is frozen is made before. Seconds are those of this
process, which keeps what it has freed (else large arrays spend half their time in the kernel, which hands out fresh
memory). The methods take turns at each point after a first run; the median is kept, of 9 rounds, or of 2 where a
product takes more than half a second. A point is left out where the one before says that a product would take over
`LONGEST`, or what is frozen over a minute.
Exponents are slopes of least squares in logarithms: over D at d = 256, and at D = 10^6 over d, or over log2 d for
Fastfood; of the seconds, and of the operations (`unilora_core.counting`), which know no cache. Memory is the most that
one product allocates at once, by tracemalloc, and what is kept beside θ_d.

Results: ``benchmarks/results/projection_cost.{json,png}``; docs/properties.md shows them.
"""

import json
import math
import os
import sys
import time
import tracemalloc

import numpy as np
from common import RESULTS, SMOKE, again, interleaved, parser, write

from unilora_core import Layout, ProjectionSpec
from unilora_core.counting import operations

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12)}
"""One thread; and glibc's malloc gives nothing back."""

METHODS = {"uni-lora": "balanced", "fastfood": "fastfood", "gaussian": "gaussian"}
THEORY = {
    "uni-lora": ("O(D)", lambda D, _: D),
    "fastfood": ("O(D log d)", lambda D, d: D * math.log2(d)),
    "gaussian": ("O(D·d)", lambda D, d: D * d),
}
OVER_D = [(round(10 ** (k / 2)), 256) for k in range(10, 17)]
OVER_d = [(10**6, 2**k) for k in range(4, 20, 2)]
if SMOKE:
    OVER_D, OVER_d = [(1000, 16), (4000, 16)], [(1000, 16), (1000, 64)]
LONGEST, COUNTED = 12.0, 10**8
"""Seconds of one product; up to so many operations in theory they are counted."""


def products(method: str, D: int, d: int) -> tuple[dict, dict]:
    """P and Pᵀ as functions of nothing, and the figures that need no clock."""
    spec = ProjectionSpec(Layout([("m.A", (D,))]), d, grouping=METHODS[method])
    start = time.process_time()
    frozen = spec.map.frozen(spec, np, None)
    rng = np.random.default_rng(0)
    facts = {"method": method, "D": D, "d": d, "frozen_s": time.process_time() - start}
    facts["kept_bytes"] = sum(array.nbytes for array in frozen)
    theta, y = rng.standard_normal(d, np.float32), rng.standard_normal(D, np.float32)

    def project(theta=theta):
        return spec.map.project(spec, theta, frozen, 0, D)

    def transpose(y=y):
        return spec.map.transpose(spec, y, frozen, 0)

    if THEORY[method][1](D, d) <= COUNTED:
        facts |= {"P_operations": operations(project, theta), "transpose_operations": operations(transpose, y)}
    return {"P": project, "transpose": transpose}, facts


def peak(function) -> int:
    """The most bytes that are allocated at once while it runs."""
    tracemalloc.start()
    function()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def point(D: int, d: int, last: dict[str, dict]) -> list[dict]:
    """The rows of one D and d; ``last``: method → its row before, which is replaced."""
    rows, cases = {}, {}
    for method, (_, theory) in THEORY.items():
        before = last.get(method)
        if before:
            more = theory(D, d) / theory(before["D"], before["d"])
            if before["P_s"] * more > LONGEST or before["frozen_s"] * D / before["D"] > 60:
                continue
        ways, rows[method] = products(method, D, d)
        rows[method]["peak_bytes"] = peak(ways["P"])
        start = time.process_time()
        ways["P"]()
        ways["transpose"]()
        repeats = 9 if time.process_time() - start < 1 else 2
        rows[method]["repeats"] = repeats
        cases.setdefault(repeats, {}).update({f"{method} {way}": function for way, function in ways.items()})
    for repeats, mine in cases.items():
        for name, times in interleaved(mine, repeats, warmup=0, clock=time.process_time).items():
            method, way = name.split()
            rows[method][f"{way}_s"] = times["median_s"]
    last |= rows
    return list(rows.values())


def measure(largest: int) -> dict:
    """All points up to a D."""
    found = {}
    for name, points in {"over_D": OVER_D, "over_d": OVER_d}.items():
        last: dict[str, dict] = {}
        found[name] = [row for D, d in points if largest >= D for row in point(D, d, last)]
    return found | {"exponents": exponents(**found)}


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def exponents(over_D: list[dict], over_d: list[dict]) -> list[dict]:
    """What the seconds and the operations of each method grow with."""
    found = []
    for method in METHODS:
        of_D, of_d = ([row for row in rows if row["method"] == method] for rows in (over_D, over_d))
        scale = math.log2 if method == "fastfood" else float
        for way in ("P", "transpose"):
            row = {"method": method, "way": way}
            for figure in ("s", "operations"):
                by_D, by_d = ([r for r in rows if f"{way}_{figure}" in r] for rows in (of_D, of_d))
                row[f"{figure} over D"] = slope([r["D"] for r in by_D], [r[f"{way}_{figure}"] for r in by_D])
                of = "log2 d" if method == "fastfood" else "d"
                row[f"{figure} over {of}"] = slope([scale(r["d"]) for r in by_d], [r[f"{way}_{figure}"] for r in by_d])
            found.append(row)
    return found


def draw(results: dict) -> None:
    """benchmarks/results/projection_cost.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    fitted = {row["method"]: row for row in results["exponents"] if row["way"] == "P"}
    for i, (method, (theory, cost)) in enumerate(THEORY.items()):
        of_D, of_d = ([row for row in results[k] if row["method"] == method] for k in ("over_D", "over_d"))
        powers = {name.split()[-1]: power for name, power in fitted[method].items() if name.startswith("s over")}
        over_d = f"{'(log d)' if method == 'fastfood' else 'd'}^{powers['d']:.2f}"
        for axes, rows, x, label in ((left, of_D, "D", f"D^{powers['D']:.2f}"), (middle, of_d, "d", over_d)):
            at = [row[x] for row in rows]
            axes.plot(at, [row["P_s"] for row in rows], "o-", color=f"C{i}", label=f"{method}: {label}")
            axes.plot(at, [row["transpose_s"] for row in rows], "s:", color=f"C{i}", markersize=3)
            last = rows[-1]
            line = [last["P_s"] * cost(row["D"], row["d"]) / cost(last["D"], last["d"]) for row in rows]
            axes.plot(at, line, color="black", linewidth=0.7)
            axes.annotate(theory, (at[0], line[0]), fontsize=7)
        at = [row["D"] for row in of_D]
        right.plot(at, [row["peak_bytes"] for row in of_D], "o-", color=f"C{i}", label=f"{method}: a product allocates")
        if of_D[0]["kept_bytes"]:
            right.plot(at, [row["kept_bytes"] for row in of_D], "s:", color=f"C{i}", label=f"{method}: kept")
    for axes, x, y in ((left, "D (d = 256)", "s"), (middle, "d (D = 10⁶)", "s"), (right, "D (d = 256)", "bytes")):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    left.set_title("time: P solid, Pᵀ dotted, theory black", fontsize=9)
    figure.savefig(RESULTS / "projection_cost.png", dpi=110)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--quick", action="store_true", help="up to D = 10^6, nothing written")
    command.add_argument("--plot", action="store_true", help="draw the results that are there, and stop")
    options = command.parse_args()
    if options.plot:
        draw(json.loads((RESULTS / "projection_cost.json").read_text(encoding="utf-8")))
        return
    if not ENVIRONMENT.keys() <= os.environ.keys():
        print(again(__file__, *sys.argv[1:], **ENVIRONMENT), end="")
        return
    results = measure(10**6 if options.quick else 10**9)
    for row in [*results["over_D"], *results["over_d"], *results["exponents"]]:
        print(json.dumps({key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in row.items()}))
    if not options.quick:
        write("projection_cost", results)
        draw(results)


if __name__ == "__main__":
    main()
