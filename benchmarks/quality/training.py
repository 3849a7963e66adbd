"""The one training loop: AdamW, a linear schedule with a warm-up, gradients clipped at 1."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

WARMUP = 0.06
"""The part of the steps in which the rates rise."""


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    examples: Sequence[Any],
    collate: Callable[[list[Any], np.random.Generator | None], Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    epochs: int,
    batch: int,
    seed: int,
    title: str = "",
    length: Callable[[Any], int] | None = None,
    weight_decay: float = 0.0,
    warmup: float = WARMUP,
) -> tuple[list[float], float]:
    """Train; the loss of every step, and the processor's seconds (other programs share the machine).

    Args:
        groups: the optimiser's, each with its rate.
        warmup: the part of the steps in which the rates rise.
        title: of a bar of progress; none without.
    """
    rng = np.random.default_rng(seed)
    chosen = [indices for _ in range(epochs) for indices in batches(examples, batch, rng, length)]
    if not chosen:
        return [], 0.0
    optimizer = torch.optim.AdamW([group | {"weight_decay": weight_decay} for group in groups])  # an adapter's say 0
    rising = max(1, round(warmup * len(chosen)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (len(chosen) - step) / max(1, len(chosen) - rising))
    )
    trained = [parameter for group in groups for parameter in group["params"]]
    started, losses = time.process_time(), []
    model.train()
    for indices in tqdm(chosen, desc=title, unit="step", leave=False, disable=not title):
        loss = loss_of(model, collate([examples[i] for i in indices], rng))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, time.process_time() - started


def batches(
    examples: Sequence[Any], size: int, rng: np.random.Generator, length: Callable[[Any], int] | None, chunk: int = 50
) -> list[list[int]]:
    """Indices of one epoch's batches, a rest left out; of similar lengths where there are lengths."""
    order = rng.permutation(len(examples))
    found = []
    for start in range(0, len(order), size * chunk):
        part = order[start : start + size * chunk].tolist()
        if length is not None:
            part.sort(key=lambda i: length(examples[i]))
        found += [part[k : k + size] for k in range(0, len(part) - size + 1, size)]
    return [found[i] for i in rng.permutation(len(found))]
