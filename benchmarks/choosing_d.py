"""Can d be chosen before training? And what comes of growing it: MiniLM on SST-2 and MRPC.

    UNILORA_DATA=... python benchmarks/choosing_d.py    # about half an hour on one core

1. Kept: how much of the gradient's norm P of d keeps at the start, for several d and P. Whatever the gradient is, the
   mean over P is d/D, so this can tell nothing of the task.
2. Linear: held-out accuracy of kernel ridge regression with the gradients of some examples under P of each d: what
   training would do if the model were linear in θ_d.
3. Trained: what training at each d gives, and at a d that `unilora_torch.Growth` doubled.

The rank correlation of 2 with 3 over d says whether the linear model is an estimate. Writes results/choosing_d.json.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from quality.tasks import Data, Task, find
from quality.tasks._minilm import task as minilm_task
from quality.training import WARMUP, batches
from torch import nn
from torch.nn.functional import cross_entropy

from unilora_core import ProjectionSpec, project_transpose
from unilora_torch import Growth

SMOKE = common.SMOKE
TASKS = ("random",) if SMOKE else ("sst2", "mrpc")
RATIOS = (1024, 64) if SMOKE else (1024, 256, 64, 16, 4)
"""D/d."""
SEEDS = range(1 if SMOKE else 2)
PROJECTIONS = 2 if SMOKE else 10
LINEAR, EPOCHS, HELD_OUT, LOOKS = (8, 1, 8, 2) if SMOKE else (256, 2, 200, 16)
"""Examples of the linear model; of training: epochs, examples by which it grows, and how often it looks at them."""

GROWN_FROM = 256
"""D/d at which growing begins."""


def random_task() -> Task:
    """Random tokens and labels: what needs no data."""
    rng = np.random.default_rng(0)
    examples = [([101, *rng.integers(1000, 9000, 6).tolist(), 102], [0] * 8, int(rng.integers(2))) for _ in range(64)]
    data = Data(examples[:32], examples[32:48], examples[48:])
    return minilm_task("random", lambda: data, examples=32, epochs=1, batch=8)


def attached(task: Task, seed: int, ratio: int, **options: Any) -> tuple[nn.Module, Any]:
    """The base with a fresh head of that seed, and an adapter."""
    torch.manual_seed(seed)
    model = task.model(Path())
    d = {} if options.get("method") == "lora" else {"d": max(1, 36_864 // ratio)}
    return model, task.attach(model, seed=seed, **d, **options)


def gradients(task: Task, examples: Sequence[Any]) -> tuple[ProjectionSpec, np.ndarray, np.ndarray, np.ndarray]:
    """The spec of plain LoRA; of each example d(logit₁ - logit₀) by θ_D (n, D) and by the head (n, h); labels ±1."""
    model, adapter = attached(task, 0, 1, method="lora")
    model.eval()
    head, rows, heads, labels = list(model.classifier.parameters()), [], [], []
    for example in examples:
        inputs, label = task.collate([example], None)
        logits = model(**inputs).logits[0]
        theta_d, *rest = torch.autograd.grad(logits[1] - logits[0], [adapter.theta_d, *head])
        rows.append(theta_d.numpy())
        heads.append(torch.cat([part.flatten() for part in rest]).numpy())
        labels.append(2 * int(label) - 1)
    return adapter.spec, np.array(rows), np.array(heads), np.array(labels)


def kept(plain: ProjectionSpec, gradient: np.ndarray) -> dict[int, dict[str, float]]:
    """D/d → mean and deviation over P of ‖Pᵀg‖² / ‖g‖², as parts of d/D."""
    found = {}
    for ratio in RATIOS:
        parts = []
        for seed in range(PROJECTIONS):
            spec = ProjectionSpec(plain.layout, max(1, plain.D // ratio), seed)
            parts.append(float(np.square(project_transpose(spec, gradient)).sum() / np.square(gradient).sum()) * ratio)
        found[ratio] = {"mean": float(np.mean(parts)), "sd": float(np.std(parts))}
    return found


def linear(plain: ProjectionSpec, rows: np.ndarray, heads: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """D/d → held-out accuracy of ridge regression on the gradients under P, half of the examples each way."""
    found, of_heads = {}, _kernel(heads)
    for ratio in (*RATIOS, 1):
        scores = []
        for seed in range(PROJECTIONS // 2 if ratio > 1 else 1):
            spec = ProjectionSpec(plain.layout, max(1, plain.D // ratio), seed)
            under = rows if ratio == 1 else np.array([project_transpose(spec, row) for row in rows])
            scores += _ridge(_kernel(under) + of_heads, labels)
        found[ratio] = float(np.mean(scores))
    return found


def _kernel(rows: np.ndarray) -> np.ndarray:
    kernel = rows.astype(np.float64) @ rows.T
    return kernel / np.trace(kernel) * len(rows)


def _ridge(kernel: np.ndarray, labels: np.ndarray) -> list[float]:
    """Held-out accuracy, both halves, each at the better of the penalties by leave-one-out on the other."""
    halves = np.arange(len(labels)) % 2 == 0
    scores = []
    for train in (halves, ~halves):
        K, y, best = kernel[np.ix_(train, train)], labels[train], None
        for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            inverse = np.linalg.inv(K + penalty * np.eye(len(y)))
            error = float(np.square(inverse @ y / np.diag(inverse)).mean())
            if best is None or error < best[0]:
                best = error, inverse @ y
        assert best is not None
        scores.append(float((np.sign(kernel[np.ix_(~train, train)] @ best[1]) == labels[~train]).mean()))
    return scores


def trained(task: Task, data: Data, seed: int, ratio: int, until: int | None = None) -> dict[str, Any]:
    """A run at D/d, or from there on with d growing up to D/``until``; seconds are the processor's."""
    model, adapter = attached(task, seed, ratio)
    rng, examples = np.random.default_rng(seed), data.pool
    chosen = rng.choice(len(examples), min(task.examples, len(examples)), replace=False)
    examples = [examples[i] for i in chosen]
    order = [each for _ in range(EPOCHS) for each in batches(examples, task.batch, rng, task.length)]
    optimizer = torch.optim.AdamW(adapter.parameter_groups(task.rate, task.head_rate), weight_decay=0.0)
    rise = max(1, round(WARMUP * len(order)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (len(order) - step) / max(1, len(order) - rise))
    )
    growth = None
    if until is not None:
        growth = Growth(adapter, adapter.spec.D // until, optimizer=optimizer, scheduler=schedule)
    began, widths = time.process_time(), [adapter.spec.d]
    for step, indices in enumerate(order, 1):
        model.train()
        task.loss(model, task.collate([examples[i] for i in indices], rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if growth and step % max(1, len(order) // LOOKS) == 0 and growth.step(held_out(model, task, data.validation)):
            widths.append(adapter.spec.d)
    seconds = time.process_time() - began
    model.eval()
    with torch.inference_mode():
        figure = task.figures(model, data.test)[task.metric]
    return {
        "seed": seed,
        "D/d": ratio,
        "d": widths,
        "loss": held_out(model, task, data.test),
        task.metric: figure,
        "seconds": seconds,
    }


@torch.no_grad()
def held_out(model: nn.Module, task: Task, examples: Sequence[Any]) -> float:
    """Mean loss of some examples, in float32."""
    model.eval()
    ordered, total = sorted(examples[:HELD_OUT], key=lambda each: len(each[0])), 0.0
    for start in range(0, len(ordered), 64):
        inputs, labels = task.collate(ordered[start : start + 64], None)
        total += float(cross_entropy(model(**inputs).logits, labels, reduction="sum"))
    return total / len(ordered)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of ranks."""
    ranks = [np.argsort(np.argsort(each)).astype(float) for each in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def run(task: Task, found: dict[str, Any], write: Callable[[], None]) -> None:
    """All of one task, into ``found``, which is written after each part."""
    data = task.data()
    plain, rows, heads, labels = gradients(task, data.validation[:LINEAR])
    mean = (rows * labels[:, None]).mean(axis=0)
    found |= {"kept, times D/d": kept(plain, mean), "linear": linear(plain, rows, heads, labels)}
    found |= {"trained": [], "grown": []}
    for seed in SEEDS:
        for ratio in RATIOS:
            found["trained"].append(trained(task, data, seed, ratio))
            write()
        first = GROWN_FROM if not SMOKE else RATIOS[0]
        found["grown"].append(trained(task, data, seed, first, RATIOS[-1]))
        by_ratio = [np.mean([r[task.metric] for r in found["trained"] if r["D/d"] == ratio]) for ratio in RATIOS]
        found["correlation of linear and trained over d"] = correlation([found["linear"][r] for r in RATIOS], by_ratio)
        write()


def main() -> None:
    common.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {name: {} for name in TASKS}
    for name in TASKS:
        task = random_task() if name == "random" else find(name)
        run(task, results[name], lambda: print(common.write("choosing_d", results), flush=True))


if __name__ == "__main__":
    main()
