"""One small model for every kind of target: what is adapted of it, and an input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from small_models import Conv1D, adapted, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unilora_torch
from unilora_torch import Target

F = nn.functional


class Attention(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        self.at = nn.MultiheadAttention(16, 2, batch_first=True, **kind)

    def forward(self, x):
        return self.at(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Matrices that one parameter stacks."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 16) / 4)

    def forward(self, x):
        return torch.einsum("bti,eoi->bto", x, self.up)


class Reader(nn.Module):
    """It uses the weight of a layer without calling it, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.qkv, self.calls, self.last = nn.Linear(16, 48), 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x.shape
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Recomputed(nn.Module):
    """``reentrant``: as of `torch.utils.checkpoint`; None: nothing is computed again."""

    def __init__(self, reentrant):
        super().__init__()
        self.up, self.at, self.reentrant = nn.Linear(16, 16), Attention(), reentrant

    def run(self, x):
        return self.at(self.up(x).relu())

    def forward(self, x):
        return self.run(x) if self.reentrant is None else checkpoint(self.run, x, use_reentrant=self.reentrant)


def sequence() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7))


def images() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Kind:
    """A model, what of it is adapted, and an input."""

    model: Callable[[], nn.Module]
    targets: Any
    input: Callable[[], Tensor] = sequence

    def made(self, **options: Any) -> tuple[nn.Module, "unilora_torch.Adapter", Tensor]:
        """The same adapted model each time, its adapter, and the input."""
        torch.manual_seed(0)
        model, adapter = adapted(model=self.model(), targets=self.targets, d=48, rank=2, **options)
        move(adapter)
        return model, adapter, self.input()


def _encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


KINDS = {
    "linear": Kind(lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), "all-linear"),
    "blocks of a linear": Kind(
        lambda: nn.Sequential(nn.Linear(16, 48)), [Target("q", "0", 16, 16), Target("v", "0", 16, 16, 32)]
    ),
    "transposed": Kind(
        lambda: nn.Sequential(Conv1D(16, 24)), [Target("c", "0", 16, 24, transposed=True, parameter="weight")]
    ),
    "embedding": Kind(lambda: nn.Sequential(nn.Embedding(50, 16)), ["0"], lambda: torch.arange(48).view(4, 12)),
    "convolution": Kind(lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), ["0"], images),
    "convolution with groups": Kind(lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), ["0"], images),
    "attention": Kind(Attention, ["at.in_proj_weight", "at.out_proj"]),
    "attention of other widths": Kind(lambda: Attention(kdim=16, vdim=16), "all-linear"),
    "encoder": Kind(_encoder, "all-linear"),
    "experts": Kind(lambda: nn.Sequential(Experts()), [Target("up", "0", 16, 12, parameter="up", experts=3)]),
    "a weight that is read": Kind(lambda: nn.Sequential(Reader()), [Target("q", "0", 16, 48, parameter="qkv.weight")]),
    "checkpointing": Kind(lambda: Recomputed(False), "all-linear"),
    "reentrant checkpointing": Kind(lambda: Recomputed(True), "all-linear", lambda: sequence().requires_grad_()),
}
