"""ΔW of a dense frame, a block of rows at a time: x·ΔWᵀ and its gradients, with no ΔW and no table of D ever kept.

The groups of a block follow from its positions, so they are computed where they are used, forwards and backwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_torch.gather import project
from unilora_torch.projection import Projection, Spans

__all__ = ["Computed", "Place", "streamed"]

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
            yield rows, _groups(spec, *at, device).view(-1, self.width)


@dataclass(eq=False)
class Computed(Projection):
    """P of a gather whose D is too large for a table: the groups are computed with each use.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰ of ``start="identity"``, from which all numbers are measured; None without one.
    """

    scale: Tensor
    origin: Tensor | None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Computed":
        """That of a spec, on the CPU."""
        origin = torch.from_numpy(spec.init()) if spec.start == "identity" else None
        return cls(spec, torch.from_numpy(spec.scale()), origin)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """See `Projection`."""
        groups = [_groups(self.spec, at.start, at.stop, theta_d.device) for at in spans]
        return project(self.moved(theta_d), torch.cat(groups), self.scale)

    def product(self, x: Tensor, theta_d: Tensor, place: Place) -> Tensor:
        """x·ΔWᵀ, see `streamed`."""
        return streamed(x, self.moved(theta_d) * self.scale, self.spec, place)

    def moved(self, theta_d: Tensor) -> Tensor:
        """θ_d, or how far it is from where it started."""
        return theta_d if self.origin is None else theta_d - self.origin


@torch.compiler.disable  # which would trace the groups' permutations
def _groups(spec: ProjectionSpec, start: int, stop: int, device: torch.device) -> Tensor:
    """g(start) … g(stop-1); on the meta device as many numbers."""
    if device.type == "meta":
        return torch.empty(stop - start, dtype=torch.int32, device=device)
    return spec.groups(start, stop, xp=torch, device=device)


@torch.compiler.disable
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
