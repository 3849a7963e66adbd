"""ΔW of a dense frame, a block of rows at a time: x·ΔWᵀ and its gradients, with no ΔW and no table of D ever kept.

The groups of a block follow from its positions, so they are computed where they are used, forwards and backwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["BLOCK", "Place", "groups_at", "streamed"]

BLOCK = 2**20
"""How many numbers of ΔW, or of θ_D, are computed at a time: a few temporaries of 4 MB."""


@dataclass(frozen=True)
class Place:
    """Where the numbers of one target lie in θ_D: ``start`` … ``start`` + height · width - 1, row by row."""

    start: int
    height: int
    width: int

    def blocks(self, spec: ProjectionSpec, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Compute rows of ΔW, and the groups (rows, width) of their numbers."""
        step = max(1, BLOCK // self.width)
        for first in range(0, self.height, step):
            rows = slice(first, min(first + step, self.height))
            at = [self.start + row * self.width for row in (rows.start, rows.stop)]
            yield rows, groups_at(spec, *at, device).view(-1, self.width)


@torch.compiler.disable  # which would trace the groups' permutations
def groups_at(spec: ProjectionSpec, start: int, stop: int, device: torch.device) -> Tensor:
    """Compute g(start) … g(stop-1): (stop-start,) int32; on the meta device as many numbers without values."""
    if device.type == "meta":
        return torch.empty(stop - start, dtype=torch.int32, device=device)
    if device.type == "cpu":  # NumPy takes a third of the time
        return torch.from_numpy(spec.groups(start, stop))
    return spec.groups(start, stop, xp=torch, device=device)


@torch.compiler.disable
def streamed(x: Tensor, table: Tensor, spec: ProjectionSpec, place: Place) -> Tensor:
    """Compute x·ΔWᵀ, differentiable in ``x`` and ``table``; computed in the dtype of ``x``.

    Args:
        x: (…, width).
        table: (d,) float32, θ_d·s: ΔW is a gather of it.

    Returns:
        (…, height).
    """
    return _Streamed.apply(x, table, spec, place)


class _Streamed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _output: Tensor) -> None:
        x, table, ctx.spec, ctx.place = inputs
        ctx.save_for_backward(x, table)

    @staticmethod
    def forward(x: Tensor, table: Tensor, spec: ProjectionSpec, place: Place) -> Tensor:
        blocks = place.blocks(spec, x.device)
        return torch.cat([x @ _rows(table, groups, x.dtype).T for _, groups in blocks], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)  # blocks add up
        grad_x = torch.zeros_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_table, flat = torch.zeros_like(table), x.reshape(-1, x.shape[-1])
        for rows, groups in ctx.place.blocks(ctx.spec, x.device):
            part = grad[..., rows].to(x.dtype)
            if grad_x is not None:
                grad_x = grad_x + part @ _rows(table, groups, x.dtype)
            update = part.reshape(len(flat), -1).T @ flat
            grad_table = grad_table.index_add(0, groups.flatten(), update.flatten().to(table.dtype))
        return None if grad_x is None else grad_x.to(x.dtype), grad_table, None, None


def _rows(table: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    return table.index_select(0, groups.flatten()).view(groups.shape).to(dtype)
