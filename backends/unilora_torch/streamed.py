"""ΔW of a dense frame, a block of rows at a time: x·ΔWᵀ and its gradients, with no ΔW and no table of D ever kept.

The groups of a block follow from its positions, so they are computed where they are used, forwards and backwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Place", "streamed"]

BLOCK = 2**20
"""So many numbers of ΔW at a time: a few temporaries of 4 MB."""


@dataclass(frozen=True)
class Place:
    """Where the numbers of one target lie in θ_D: ``start`` … ``start`` + height · width - 1, row by row."""

    start: int
    height: int
    width: int

    def blocks(self, spec: ProjectionSpec, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Rows of ΔW, and the groups (rows, width) of their numbers."""
        step = max(1, BLOCK // self.width)
        for first in range(0, self.height, step):
            rows = slice(first, min(first + step, self.height))
            at = [self.start + row * self.width for row in (rows.start, rows.stop)]
            yield rows, spec.groups(*at, xp=torch, device=device).view(-1, self.width)


def streamed(x: Tensor, table: Tensor, spec: ProjectionSpec, place: Place) -> Tensor:
    """x·ΔWᵀ, differentiable in ``x`` and ``table``; computed in the dtype of ``x``.

    Args:
        x: (…, width).
        table: (d,) float32, θ_d·s: ΔW is a gather of it.

    Returns:
        (…, height).
    """
    return _Streamed.apply(x, table, spec, place)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, spec: ProjectionSpec, place: Place) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.spec, ctx.place = spec, place
        output = x.new_empty(*x.shape[:-1], place.height)
        for rows, groups in place.blocks(spec, x.device):
            output[..., rows] = x @ _rows(table, groups, x.dtype).T
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)  # blocks add up
        grad_x = torch.zeros_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_table = torch.zeros_like(table)
        flat = x.reshape(-1, x.shape[-1])
        for rows, groups in ctx.place.blocks(ctx.spec, x.device):
            part = grad[..., rows].to(x.dtype)
            if grad_x is not None:
                grad_x += part @ _rows(table, groups, x.dtype)
            update = part.reshape(len(flat), -1).T @ flat
            grad_table.index_add_(0, groups.flatten(), update.flatten().to(table.dtype))
        return None if grad_x is None else grad_x.to(x.dtype), grad_table, None, None


def _rows(table: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    return table.index_select(0, groups.flatten()).view(groups.shape).to(dtype)
