"""Tables and plots of what has been run, made from the files of results alone."""

import math
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import DOCS, RESULTS

from quality.jobs import FOLDER, SEEDS, SWEEP, Job, Row, read
from quality.tasks import Task, find, names

PAGE = DOCS / "evidence.md"
BEGIN, END = "<!-- begin: benchmarks/quality report -->\n", "<!-- end -->\n"
LORA, UNTOUCHED = ("lora", ()), "uni-lora, **untouched**"


@dataclass(frozen=True)
class Entry:
    """The runs of a case at one rate on the seeds that are judged."""

    name: str
    task: Task
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """Method and options; "untouched" is Uni-LoRA as it comes, at the rate that the command takes by default."""
        job = self.rows[0].job
        untouched = job.method == "uni-lora" and not job.options and job.rate == self.task.rate
        return UNTOUCHED if untouched else said(job)

    @property
    def more(self) -> bool:
        """Whether it is Uni-LoRA as it comes, but for four times as many numbers."""
        job, ratio = self.rows[0].job, self.rows[0].about.get("D", 0) / max(1, self.rows[0].about.get("d", 0))
        alone = job.method == "uni-lora" and [name for name, _ in job.options] == ["d"] and job.rate == self.task.rate
        return alone and 15 < ratio < 17

    @property
    def trained(self) -> int:
        """Numbers beside the head."""
        return int(self.rows[0].about["trained"])

    def values(self, metric: str) -> list[float]:
        """A figure of every seed."""
        return [row.figures[metric] for row in self.rows]

    def mean(self) -> float:
        """Of the task's own figure."""
        return statistics.mean(self.values(self.task.metric))

    def shown(self, metric: str) -> str:
        """Mean ± standard error, and how many seeds it is of where some are missing."""
        values, wanted = self.values(metric), 1 if self.rows[0].job.method == "none" else len(SEEDS)
        count = "" if len(values) == wanted else f" ({len(values)} of {wanted} seeds)"
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{error}{count}"


def said(job: Job, without: Container[tuple[str, object]] = ()) -> str:
    """Method and options, but for those left out."""
    chosen = (f"{name} = {value}" for name, value in job.options if (name, value) not in without)
    return ", ".join([job.method, *chosen])


def entries(name: str, task: Task) -> list[Entry]:
    """What a task was judged on, by trained numbers."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in read(name):
        if row.job.seed in SEEDS:
            found.setdefault((row.job.case, row.job.rate), []).append(row)
    return sorted((Entry(name, task, tuple(rows)) for rows in found.values()), key=lambda entry: entry.trained)


def write(folders: Sequence[Path] = ()) -> None:
    """The page's tables, and for each task a plot, and a file with the tables of its runs beside those runs."""
    tasks = {name: find(name, folders) for name in names(folders) if read(name)}
    lines = [*summary(tasks), "", *leaderboard(tasks)]
    for name, task in tasks.items():
        plot = picture(name, task)
        head = [f"# {task.title}", "", f"![{task.title}]({name}.png)", ""]
        runs = [*head, *details(name, task), "", *sweeps(name, task)]
        (FOLDER / f"{name}.md").write_text("\n".join(runs).strip() + "\n", encoding="utf-8")
        lines += ["", f"![{task.title}](../{plot})"]
    before, after = PAGE.read_text(encoding="utf-8").split(BEGIN)[0], PAGE.read_text(encoding="utf-8").split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")
    print("\n".join(lines))


def summary(tasks: dict[str, Task]) -> Iterator[str]:
    """A line a task: where it begins; Uni-LoRA as it comes, with four times the numbers, at its best; the others."""
    columns = "begins at", "untouched", "of LoRA's gain", "d × 4", "best rate", "LoRA, r = 4", "LoRA, r = 16", "full"
    yield f"| task | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for name, task in tasks.items():
        found = entries(name, task)
        larger = [entry.shown(task.metric) for entry in found if entry.more]
        gains = [_gain(entry, found) for entry in found if entry.label == UNTOUCHED]
        values = (
            _best(found, "head" if task.head else "none"),
            _best(found, UNTOUCHED),
            *(gains or ["–"]),
            *(larger or ["–"])[:1],
            _best(found, "uni-lora", UNTOUCHED),
            *(_best(found, label) for label in ("lora", "lora, rank = 16", "full")),
        )
        yield f"| {_title(task)} | {' | '.join(values)} |"


def _title(task: Task) -> str:
    return f"{task.title}: {task.metric} {'↑' if task.higher else '↓'}"


def leaderboard(tasks: dict[str, Task]) -> Iterator[str]:
    """A line a method, a column a task; what only one task was tried with is among its own figures."""
    every = {name: entries(name, task) for name, task in tasks.items()}
    tried = Counter(label for found in every.values() for label in {entry.label for entry in found})
    labels = [label for label in dict.fromkeys(e.label for es in every.values() for e in es) if tried[label] > 1]
    yield f"| method | {' | '.join(map(_title, tasks.values()))} |"
    yield "|---|" + "---|" * len(tasks)
    for label in sorted(
        labels, key=lambda each: min(e.trained for es in every.values() for e in es if e.label == each)
    ):
        yield f"| {label} | {' | '.join(_best(found, label) for found in every.values())} |"


def _best(found: Iterable[Entry], *labels: str) -> str:
    mine = [entry for entry in found if entry.label in labels]
    if not mine:
        return "–"
    entry = max(mine, key=lambda each: each.mean() * (1 if each.task.higher else -1))
    return entry.shown(entry.task.metric)


def _gain(entry: Entry, found: Sequence[Entry]) -> str:
    """How much of LoRA's distance (r = 4) to the head alone, or to the base as it is, a method makes."""
    lora = next((each.mean() for each in found if each.rows[0].job.case == LORA), None)
    start = next((e.mean() for e in found if e.rows[0].job.method == ("head" if entry.task.head else "none")), None)
    return "–" if lora is None or start is None or lora == start else f"{(entry.mean() - start) / (lora - start):.0%}"


def details(name: str, task: Task) -> Iterator[str]:
    """All figures of a task, with what they cost."""
    found = entries(name, task)
    metrics = list(found[0].rows[0].figures) if found else []
    yield f"| method | rate | {' | '.join(metrics)} | of LoRA's gain | trained | head | bytes | seconds of CPU |"
    yield "|---|---|" + "---|" * (len(metrics) + 5)
    for entry in found:
        about, figures = entry.rows[0].about, [entry.shown(metric) for metric in metrics]
        seconds = statistics.median(row.about["seconds"] for row in entry.rows)
        yield (
            f"| {entry.label} | {entry.rows[0].job.rate:g} | {' | '.join(figures)} "
            f"| {_gain(entry, found)} | {about['trained']:,} | {about['head']:,} "
            f"| {about['bytes']:,} | {seconds:.0f} |"
        )


def sweeps(name: str, task: Task) -> Iterator[str]:
    """The rates that were tried, on validation examples."""
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in read(name):
        if row.job.seed == SWEEP:
            cases.setdefault(row.job.case, []).append(row)
    if cases:
        yield f"| swept | rate → {task.metric} on validation examples, seed {SWEEP} |"
        yield "|---|---|"
    for rows in cases.values():
        job = rows[0].job
        label = said(job)
        rows.sort(key=lambda row: row.job.rate)
        tried = ", ".join(f"{row.job.rate:g} → {row.figures[task.metric]:.3f}" for row in rows)
        yield f"| {label} | {tried} |"


def picture(name: str, task: Task) -> str:
    """Figures over trained numbers, a line for what differs in d alone, into the results; the path from the root."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, list[Entry]] = {}
    for entry in entries(name, task):
        series.setdefault(_series(entry), []).append(entry)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for label, found in series.items():
        if not found[0].trained:
            axes.axhline(found[0].mean(), linestyle="--", color="0.5", label=label)
            continue
        best = {entry.trained: entry for entry in sorted(found, key=lambda each: each.mean() * (2 * task.higher - 1))}
        values = [entry.values(task.metric) for _, entry in sorted(best.items())]
        errors = [statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0 for each in values]
        axes.errorbar(
            sorted(best), [statistics.mean(each) for each in values], errors, fmt="o-", capsize=3, label=label
        )
    axes.set(title=task.title, xscale="log", xlabel="trained numbers beside the head", ylabel=task.metric)
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"benchmarks/results/{path.relative_to(RESULTS).as_posix()}"


def _series(entry: Entry) -> str:
    """Method and options but for d, and for the rank that all have by default."""
    job = entry.rows[0].job
    return said(job, {("rank", 4)} | {(name, value) for name, value in job.options if name in ("d", "theta_d_length")})
