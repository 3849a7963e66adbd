"""Can d be chosen before training? And what comes of growing it.

    UNILORA_DATA=... python benchmarks/choosing_d.py    # some minutes on one core

1. Kept: how much of the loss's gradient at the start P of d keeps, for several d and P, on three tasks. Whatever the
   gradient is, the mean over P of ‖Pᵀg‖² is ‖g‖²·d/D, but for the part along (1, …, 1), the sum of the columns √n·P,
   which every P keeps whole: this can tell nothing of the task.
2. Linear: held-out accuracy of kernel ridge regression with the gradients of some examples under P of each d: what
   training would do if the model were linear in θ_d. Its rank correlation over d with 3 says whether it is an estimate.
3. Trained: what training at each d gives, and from a small d that `unilora_torch.Growth` doubles.

The second on turned digits, where d matters, the third on two more. Writes results/choosing_d.json.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from quality.tasks import Data, Task, digits_sklearn, find
from quality.training import WARMUP, batches
from torch import nn

from unilora_core import ProjectionSpec, project_transpose
from unilora_torch import Adapter, Growth

SMOKE = common.SMOKE
KEPT = ("tiny",) if SMOKE else ("rotated", "digits_sklearn", "sst2")
"""Tasks whose gradients are looked at."""
TRAINED = {"tiny": 1} if SMOKE else {"rotated": 8, "mnist": 5, "small_llama": 2}
"""Tasks that are trained, the first also as a linear model, and epochs."""
RATIOS = (64, 16) if SMOKE else (256, 64, 16, 4)
"""D/d."""
SEEDS = range(1 if SMOKE else 3)
PROJECTIONS = 2 if SMOKE else 10
SOME, LOOKS = (8, 4) if SMOKE else (256, 32)
"""Examples whose gradients are taken; how often the held-out loss is looked at where d may grow."""
GAIN = 0.02


def task_of(name: str) -> Task:
    """A task by its name; ``tiny`` has a base that knows nothing."""
    if name != "tiny":
        return find(name)
    return dataclasses.replace(digits_sklearn.TASK, model=lambda _: digits_sklearn.vit(), examples=64)


def attached(task: Task, base: Path, seed: int, ratio: int | None) -> tuple[nn.Module, Adapter]:
    """The base with a fresh head of that seed, and an adapter; where there is no ratio, LoRA itself, θ_d = θ_D."""
    torch.manual_seed(seed)
    model = task.model(base)
    adapter = task.attach(model, seed=seed, rank=4, **({"method": "lora"} if ratio is None else {}))
    if ratio is not None:
        d = max(1, adapter.spec.D // ratio)
        adapter.detach()
        adapter = task.attach(model, seed=seed, rank=4, d=d)
    return model, adapter


# ---- before training -------------------------------------------------------------------------------------------------


def kept(task: Task, base: Path, data: Data) -> dict[str, dict[str, float]]:
    """D/d → ‖Pᵀg‖² / ‖g‖² · D/d: mean and deviation over P."""
    model, adapter = attached(task, base, 0, None)
    task.loss(model.eval(), task.collate(list(data.validation[:SOME]), None)).backward()
    assert adapter.theta_d.grad is not None
    gradient, found = adapter.theta_d.grad.numpy(), {}
    for ratio in RATIOS:
        under = (under_P(adapter.spec, ratio, seed, gradient) for seed in range(PROJECTIONS))
        parts = [float(np.square(each).sum() / np.square(gradient).sum()) * ratio for each in under]
        found[str(ratio)] = {"mean": float(np.mean(parts)), "sd": float(np.std(parts))}
    return found


def under_P(plain: ProjectionSpec, ratio: int, seed: int, gradient: np.ndarray) -> np.ndarray:
    return project_transpose(ProjectionSpec(plain.layout, max(1, plain.D // ratio), seed), gradient)


def linear(task: Task, base: Path, data: Data) -> dict[str, float]:
    """D/d → held-out accuracy of ridge regression on the gradients under P, half of the examples each way."""
    model, adapter = attached(task, base, 0, None)
    heads = list(adapter.saved_parameters().values())
    rows, others, labels = [], [], []
    for example in data.validation[:SOME]:
        inputs, label = task.collate([example], None)
        logits = model.eval()(inputs)[0]
        grads = [torch.autograd.grad(logit, [adapter.theta_d, *heads], retain_graph=True) for logit in logits]
        rows.append([theta_d.numpy() for theta_d, *_ in grads])
        others.append([np.concatenate([g.flatten().numpy() for g in rest] or [np.zeros(1)]) for _, *rest in grads])
        labels.append(int(label))
    targets, of_heads, found = np.eye(max(labels) + 1)[labels], kernel(np.array(others)), {}
    for ratio in (*RATIOS, 1):
        scores = []
        for seed in SEEDS if ratio > 1 else (0,):
            under = [[row if ratio == 1 else under_P(adapter.spec, ratio, seed, row) for row in each] for each in rows]
            scores += ridge(kernel(np.array(under)) + of_heads, targets)
        found[str(ratio)] = float(np.mean(scores))
    return found


def kernel(rows: np.ndarray) -> np.ndarray:
    """(n, n) from gradients (n, classes, d), of mean diagonal 1."""
    found = np.einsum("icd,jcd->ij", rows.astype(np.float64), rows, optimize=True)
    return found / max(np.trace(found), 1e-30) * len(rows)


def ridge(K: np.ndarray, targets: np.ndarray) -> list[float]:
    """Held-out accuracy of either half, at the penalty of least leave-one-out error on the other."""
    halves, scores = np.arange(len(targets)) % 2 == 0, []
    for train in (halves, ~halves):
        y, tried = targets[train] - targets[train].mean(axis=0), []
        for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            inverse = np.linalg.inv(K[np.ix_(train, train)] + penalty * np.eye(len(y)))
            error = np.square(inverse @ y / np.diag(inverse)[:, None]).mean()
            tried.append((float(error), penalty, inverse @ y))
        said = K[np.ix_(~train, train)] @ min(tried, key=lambda each: each[:2])[2] + targets[train].mean(axis=0)
        scores.append(float((said.argmax(axis=1) == targets[~train].argmax(axis=1)).mean()))
    return scores


# ---- training --------------------------------------------------------------------------------------------------------


def trained(
    task: Task, base: Path, data: Data, epochs: int, seed: int, ratio: int, until: int | None = None
) -> dict[str, Any]:
    """A run at D/d, or from there on with d growing up to D/``until``; seconds are the processor's, looks included."""
    model, adapter = attached(task, base, seed, ratio)
    rng = np.random.default_rng(seed)
    examples = [data.pool[i] for i in rng.permutation(len(data.pool))[: task.examples]]
    order = [each for _ in range(epochs) for each in batches(examples, task.batch, rng, task.length)]
    optimizer = torch.optim.AdamW(adapter.parameter_groups(task.rate, task.head_rate), weight_decay=0.0)
    rise = max(1, round(WARMUP * len(order)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (len(order) - step) / max(1, len(order) - rise))
    )
    growth = Growth(adapter, adapter.spec.D // until, GAIN, optimizer, schedule) if until else None
    began, every = time.process_time(), max(1, len(order) // LOOKS)
    widths = {0: adapter.spec.d}
    for step, indices in enumerate(order, 1):
        model.train()
        task.loss(model, task.collate([examples[i] for i in indices], rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if growth and step % every == 0 and growth.step(held_out(model, task, data.validation)):
            widths[step] = adapter.spec.d
    seconds = time.process_time() - began
    model.eval()
    with torch.inference_mode():
        figure = task.figures(model, data.test)[task.metric]
    loss = held_out(model, task, data.test)
    return {"seed": seed, "D/d": ratio, "d": widths, "loss": loss, task.metric: figure, "seconds": seconds}


@torch.no_grad()
def held_out(model: nn.Module, task: Task, examples: Sequence[Any]) -> float:
    """Mean loss."""
    model.eval()
    parts = [list(examples[start : start + 250]) for start in range(0, len(examples), 250)]
    return sum(float(task.loss(model, task.collate(part, None))) * len(part) for part in parts) / len(examples)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(each)).astype(float) for each in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    common.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {"kept, times D/d": {}, "trained": {}, "grown": {}}
    with tempfile.TemporaryDirectory() as folder:
        base, first = Path(folder), next(iter(TRAINED))
        for name in KEPT:
            each = task_of(name)
            results["kept, times D/d"][name] = kept(each, base, each.data())
        results["linear"] = linear(task_of(first), base, task_of(first).data())
        for name, epochs in TRAINED.items():
            task = task_of(name)
            run = functools.partial(trained, task, base, task.data(), epochs)
            results["trained"][name] = [run(seed, ratio) for seed in SEEDS for ratio in RATIOS]
            results["grown"][name] = [run(seed, RATIOS[0], RATIOS[-1]) for seed in SEEDS]
    metric, rows = task_of(first).metric, results["trained"][first]
    means = [np.mean([row[metric] for row in rows if row["D/d"] == ratio]) for ratio in RATIOS]
    results["rank correlation"] = rank_correlation([results["linear"][str(ratio)] for ratio in RATIOS], means)
    print(common.write("choosing_d", results))


if __name__ == "__main__":
    main()
