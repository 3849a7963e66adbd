"""One vector adapts a vision transformer, a text encoder and a language model, beside LoRA at the same rate.

    python demo                                  # all three: minutes on two cores, no GPU, no network (or: nox -s demo)
    python demo --only language                  # one of them
    python demo --out runs/demo                  # where tables, plots and adapters go

vision: a timm ViT of the digits 0-4 learns 5-9 from 150 images; text: MiniLM tells pleased customers from others;
language: SmolLM2-135M writes orders in plain words as JSON. The tasks are files of benchmarks/quality/tasks. Then each
adapter is loaded in a new process, and read by NumPy alone.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import transformers
from quality.jobs import Job, run_one
from quality.tasks import Data, Task, TaskError, _smollm, find
from torch import Tensor, nn

import unilora_timm
import unilora_transformers

PARTS = {"vision": "digits_sklearn", "text": "pleased", "language": "orders"}
LOAD = {"images": unilora_timm.load, "text": unilora_transformers.load, "language": unilora_transformers.load}
SEED, SHOWN, LONGEST = 0, 3, 48
FLOOR = 500
"""Bytes, where a plot puts what takes none."""
ADAPTER = "uni-lora.safetensors"


def main() -> None:
    """Parse the command line and run the parts, or one reload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one part (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--reload", choices=list(PARTS), help=argparse.SUPPRESS)  # the new process: load, predict
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads, began = torch.get_num_threads(), time.perf_counter()
    for name in [arguments.reload or arguments.only] if arguments.reload or arguments.only else PARTS:
        torch.set_num_threads(1 if name == "vision" else threads)  # its tensors are small
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (reload if arguments.reload else compare)(name, folder)
        except TaskError as error:
            sys.exit(f"FAILED: {error}")
    if not arguments.reload:
        if not arguments.only:
            overview(arguments.out)
        say(f"\n{time.perf_counter() - began:.0f} seconds in all; tables, plots and adapters: {arguments.out}")


def compare(name: str, folder: Path) -> None:
    """Train in three ways, print and write what came of it, and check what was saved."""
    task = find(PARTS[name])
    data = task.data()
    say(f"\n{task.title}: {task.examples} examples to learn from, judged on {len(data.test)} others")
    rows, losses = [], {}
    said = {"asked": asked(data.test[:SHOWN])} if task.kind == "language" else {}
    ways = {"head only" if task.head else "as it is": "head" if task.head else "none", "LoRA": "lora"}
    for label, method in (ways | {"Uni-LoRA": "uni-lora"}).items():
        rate = task.head_rate if method == "head" else task.rate
        result = run_one(Job(PARTS[name], method, SEED, rate), task, data, folder, progress=True)
        about = {key: result.row.about[key] for key in ("trained", "head", "bytes", "seconds", "steps")}
        rows.append({"method": label, task.metric: result.row.figures[task.metric], **about})
        if result.losses:
            losses[label] = result.losses
        if task.kind == "language":
            said[label] = answered(result.trained.model, data.test[:SHOWN])
    report(folder, task, rows, losses, said)
    check(name, folder, predictions(task, result.trained.model, data), result.trained.model.unilora)
    base, lora, unilora = (row[task.metric] for row in rows)
    require(unilora > (base + lora) / 2, "Uni-LoRA is nearer to LoRA than to where both began")


def asked(examples: Sequence[_smollm.Example]) -> list[str]:
    """What the user says in these prompts."""
    chats = [_smollm.tokenizer().decode(prompt) for prompt, _ in examples]
    return [chat.split("user\n")[-1].split("<|im_end|>")[0] for chat in chats]


@torch.inference_mode()
def answered(model: nn.Module, examples: Sequence[_smollm.Example]) -> list[str]:
    """What a language model says, each on a line."""
    return [" ".join(text.split()) for text in _smollm.answers(model, examples, LONGEST)]


@torch.inference_mode()
def predictions(task: Task, model: nn.Module, data: Data) -> np.ndarray:
    """Logits of the held-out examples (n, classes); of a language model the losses of ten answers' tokens."""
    model.eval()
    if task.kind == "language":
        return _smollm.token_losses(model, task.collate(data.test[:10], None)).numpy()
    inputs, _ = task.collate(data.test, None)
    found: Tensor = model(inputs) if isinstance(inputs, Tensor) else model(**inputs).logits
    return found.numpy()


# ---- results --------------------------------------------------------------------------------------------------------


def report(
    folder: Path, task: Task, rows: list[dict[str, Any]], losses: dict[str, list[float]], said: dict[str, list[str]]
) -> None:
    """The table and the answers on the screen; both as JSON, the table as CSV, the losses as a plot."""
    say(f"\n{'':12}{task.metric:>10}{'trained':>11}{'+ head':>8}{'bytes':>11}{'CPU seconds':>13}")
    for row in rows:
        say(
            f"{row['method']:12}{row[task.metric]:10.1%}{row['trained']:11,}{row['head']:8,}{row['bytes']:11,}"
            f"{row['seconds']:13.1f}"
        )
    for lines in zip(*said.values(), strict=True):
        say("\n" + "\n".join(f"{label:12}{line}" for label, line in zip(said, lines, strict=True)))
    say("")
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    settings = {"seed": SEED, "examples": task.examples, "epochs": task.epochs, "batch": task.batch, "rate": task.rate}
    made = {"task": task.title, "settings": settings, "results": rows, "answers": said, "losses": losses}
    (folder / "metrics.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    plot(folder / "loss.png", task.title, losses)


def plot(path: Path, title: str, losses: dict[str, list[float]]) -> None:
    """The training losses, each the mean of a tenth of the steps before."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, values in losses.items():
        window = max(1, len(values) // 10)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(range(window, window + len(smooth)), smooth, label=label)
    axes.set(xlabel="step", ylabel="training loss", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def overview(folder: Path) -> None:
    """All three parts in one plot: how much is right over the bytes of what is stored beside the base."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, marker in zip(PARTS, "osD", strict=True):
        with (folder / name / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        right = [100 * float(row.get("accuracy", row.get("exact", 0))) for row in rows]
        stored = [max(int(row["bytes"]), FLOOR) for row in rows]
        axes.plot([stored[0], stored[2], stored[1]], [right[0], right[2], right[1]], color="0.8", zorder=1)
        for at, colour in enumerate(("0.5", "C1", "C0")):
            axes.scatter(stored[at], right[at], 60, colour, marker, zorder=2)
        axes.annotate(name, (stored[1], right[1]), (0, -20), textcoords="offset points", ha="center")
    for label, colour in (("before", "0.5"), ("LoRA", "C1"), ("Uni-LoRA", "C0")):
        axes.scatter([], [], 60, colour, label=label)
    axes.set(
        xscale="log",
        xlim=(FLOOR / 1.5, 3e7),
        xlabel="bytes, head included (none: at the left)",
        ylabel="right, %",
        ylim=(-4, 104),
    )
    axes.legend(loc="lower right")
    figure.savefig(folder / "bytes.png", dpi=150)
    pyplot.close(figure)


# ---- the saved file -------------------------------------------------------------------------------------------------


def check(name: str, folder: Path, predicted: np.ndarray, adapter: unilora_timm.Adapter) -> None:
    """Leave with an error unless the saved adapter is the trained one, in a new process and in NumPy."""
    adapter.save(folder / ADAPTER)
    command = [sys.executable, str(Path(__file__).parent), "--reload", name, "--out", str(folder.parent)]
    done = subprocess.run(command, check=False)
    found = folder / "reloaded.npy"
    same = done.returncode == 0 and np.allclose(np.load(found), predicted, atol=1e-5)
    found.unlink(missing_ok=True)
    require(same, "a new process that loads the file makes the same predictions")
    expected = folder / "theta_D.npy"
    np.save(expected, torch.cat([factor.detach().flatten() for factor in adapter.factors().values()]))
    script = str(Path(__file__).with_name("numpy_alone.py"))
    done = subprocess.run([sys.executable, script, str(folder / ADAPTER), str(expected)], check=False)
    expected.unlink()
    require(done.returncode == 0, f"NumPy alone reads it: all {adapter.spec.D:,} numbers of θ_D are the same bits")


def reload(name: str, folder: Path) -> None:
    """In a new process: the base, the adapter and its head from the file, and what it predicts."""
    task = find(PARTS[name])
    model = task.model(folder)
    LOAD[task.kind](model, folder / ADAPTER)
    np.save(folder / "reloaded.npy", predictions(task, model, task.data()))


def require(holds: bool, what: str) -> None:
    """Say that a check holds, or leave with an error."""
    if not holds:
        sys.exit(f"FAILED: {what}")
    say(f"ok: {what}")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
