"""The second task for the defaults: a small classifier, trained on upright digits, adapted to rotated ones.

    UNILORA_DATA=... python benchmarks/rotated_mnist.py      # a few minutes on one core

An MLP (784-256-256-10) learns 6,000 MNIST digits, is frozen, and adapts to 2,000 digits rotated by 90°, r = 8 in all
three layers, four epochs of batches of 32, AdamW, linear schedule with 6 % warm-up. Accuracy on 2,000 other rotated
digits, three seeds: LoRA over a sweep of rates, then Uni-LoRA for three D/d, both starts, and rates of
(LoRA's best rate) · (D/d)^power.
"""

import copy
import gzip
import itertools
import math
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from common import write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import unilora_torch

LORA_RATES = [2e-3, 5e-3, 1e-2, 2e-2, 4e-2]
RATIOS, STARTS, POWERS = [4, 16, 144], ["paper", "identity"], [0.5, 0.75, 1.0]
SEEDS, RANK = 3, 8


class Lora(nn.Module):
    """Plain LoRA beside one linear layer: A uniform in ±1/√in, B zero."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(RANK, base.in_features).uniform_(-1, 1) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def digits() -> tuple[Tensor, Tensor]:
    folder = Path(os.environ["UNILORA_DATA"]) / "mnist_t10k"
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return torch.from_numpy(images.astype(np.float32) / 255)[order], torch.from_numpy(labels.astype(np.int64))[order]


def train(model: nn.Module, groups: list[dict], x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = epochs * (len(x) // 32)
    warmup = round(0.06 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32)[: len(x) // 32]:
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def adapted(base: nn.Module, case: dict, seed: int) -> tuple[nn.Module, list[dict]]:
    model = copy.deepcopy(base).requires_grad_(False)
    if case["method"] == "lora":
        torch.manual_seed(seed)
        model = nn.Sequential(*[Lora(layer) if isinstance(layer, nn.Linear) else layer for layer in model])
        return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": case["rate"]}]
    probe = unilora_torch.attach(copy.deepcopy(base), rank=RANK, d=1)
    adapter = unilora_torch.attach(model, rank=RANK, d=probe.spec.D // case["ratio"], seed=seed, start=case["start"])
    return model, [{"params": [adapter.theta_d], "lr": case["rate"]}]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = digits()
    base = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(base, [{"params": base.parameters(), "lr": 2e-3}], images[:6000].flatten(1), labels[:6000], 6, seed=0)
    turned = torch.rot90(images, 1, (1, 2)).flatten(1)
    x, y, test, wanted = turned[6000:8000], labels[6000:8000], turned[8000:], labels[8000:]

    def measure(case: dict) -> dict:
        accuracies = []
        for seed in range(SEEDS):
            model, groups = adapted(base, case, seed)
            train(model, groups, x, y, 4, seed)
            with torch.no_grad():
                accuracies.append((model(test).argmax(-1) == wanted).float().mean().item())
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        return {**case, "accuracy": round(mean, 4), "sd": round(spread, 4), "seeds": SEEDS}

    rows = [measure({"method": "lora", "rate": rate}) for rate in tqdm(LORA_RATES, desc="LoRA")]
    best = max(rows, key=lambda row: row["accuracy"])["rate"]
    grid = list(itertools.product(RATIOS, STARTS, POWERS))
    for ratio, start, power in tqdm(grid, desc="Uni-LoRA"):
        case = {"method": "unilora", "ratio": ratio, "start": start, "power": power, "rate": best * ratio**power}
        rows.append(measure(case))
    with torch.no_grad():
        before = (base(test).argmax(-1) == wanted).float().mean().item()
    path = write("rotated_mnist", {"before": round(before, 4), "lora_best_rate": best, "rows": rows})
    print("| method | D/d | start | rate | accuracy, mean ± sd of 3 seeds |\n|---|---|---|---|---|")
    for row in rows:
        power = f" ({best:g}·(D/d)^{row['power']:g})" if "power" in row else ""
        print(
            f"| {row['method']} | {row.get('ratio', '-')} | {row.get('start', '-')} | {row['rate']:.3g}{power} "
            f"| {row['accuracy']:.3f} ± {row['sd']:.3f} |"
        )
    print(path)


if __name__ == "__main__":
    main()
