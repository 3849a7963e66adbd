"""ΔW of a dense frame, a block of rows at a time: x·ΔWᵀ and its gradients, with no ΔW and no table of D ever kept.

The groups of a block follow from its positions, so they are computed where they are used, forwards and backwards. Both
passes are operators of PyTorch, ``unilora::streamed`` and ``unilora::streamed_gradient``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_torch.projection import row_by_row, spec_of

__all__ = ["BLOCK", "Place", "gradient", "groups_at", "product", "streamed"]

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
            yield rows, groups_at(spec, at[0], at[1], device).view(-1, self.width)


def groups_at(spec: ProjectionSpec, start: int, stop: int, device: torch.device) -> Tensor:
    """Compute g(start) … g(stop-1): (stop-start,) int32; on the meta device as many numbers without values."""
    if device.type == "meta":
        return torch.empty(stop - start, dtype=torch.int32, device=device)
    if device.type == "cpu":  # NumPy takes a third of the time
        return torch.from_numpy(spec.groups(start, stop))
    return spec.groups(start, stop, xp=torch, device=device)


def streamed(x: Tensor, table: Tensor, told: str, place: Place) -> Tensor:
    """Compute x·ΔWᵀ, differentiable in ``x`` and ``table``; computed in the dtype of ``x``.

    Args:
        x: (…, width).
        table: (d,) float32, θ_d·s: ΔW is a gather of it.
        told: the spec, as its JSON.

    Returns:
        (…, height).
    """
    return _Streamed.apply(x, table, told, [place.start, place.height, place.width])


def product(x: Tensor, table: Tensor, told: str, place: Sequence[int]) -> Tensor:
    """Compute x·ΔWᵀ: (…, height)."""
    blocks = Place(*place).blocks(spec_of(told), x.device)
    return torch.cat([x @ _rows(table, groups, x.dtype).T for _, groups in blocks], dim=-1)


def gradient(
    grad: Tensor, x: Tensor, table: Tensor, told: str, place: Sequence[int], inner: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x, unless no ``inner`` one is wanted, and of the table."""
    grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))  # blocks add up
    grad_table, flat = torch.zeros_like(table), x.reshape(-1, x.shape[-1])
    for rows, groups in Place(*place).blocks(spec_of(told), x.device):
        part = grad[..., rows].to(x.dtype)
        if inner:
            grad_x += part @ _rows(table, groups, x.dtype)
        update = part.reshape(len(flat), -1).T @ flat
        grad_table.index_add_(0, groups.flatten(), update.flatten().to(table.dtype))
    return grad_x.to(x.dtype), grad_table


_streamed = torch.library.custom_op("unilora::streamed", product, mutates_args=())
_gradient = torch.library.custom_op("unilora::streamed_gradient", gradient, mutates_args=())


class _Streamed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG004 - so it is called
        x, table, ctx.told, ctx.place = inputs
        ctx.save_for_backward(x, table)

    @staticmethod
    def forward(x: Tensor, table: Tensor, told: str, place: Sequence[int]) -> Tensor:
        return _streamed(x, table, told, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        grad_x, grad_table = _Gradient.apply(grad, x, table, ctx.told, ctx.place, ctx.needs_input_grad[0])
        return grad_x if ctx.needs_input_grad[0] else None, grad_table, None, None


class _Gradient(torch.autograd.Function):
    """Both gradients, (y·ΔW, Pᵀ(yᵀ·x)); theirs are made of the same products, as each is linear in what it is of."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:  # noqa: ARG004 - so it is called
        *tensors, ctx.told, ctx.place, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def forward(grad: Tensor, x: Tensor, table: Tensor, told: str, place: Sequence[int], inner: bool) -> Any:
        return _gradient(grad, x, table, told, place, inner)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_table: Tensor) -> tuple[Tensor | None, ...]:
        (grad, x, table), how = ctx.saved_tensors, (ctx.told, ctx.place)
        of_grad = _Streamed.apply(of_x, table, *how) + _Streamed.apply(x, of_table, *how)
        to_x, _ = _Gradient.apply(grad, x, of_table, *how, True)
        _, to_table = _Gradient.apply(grad, of_x, table, *how, False)
        return of_grad, to_x, to_table, None, None, None


_streamed.register_fake(lambda x, _table, _told, place: x.new_empty((*x.shape[:-1], place[1])))
_gradient.register_fake(lambda _grad, x, table, *_: (torch.empty_like(x), torch.empty_like(table)))
_streamed.register_autograd(_Streamed.backward, setup_context=_Streamed.setup_context)  # of an exported graph
_streamed.register_vmap(row_by_row(_streamed, 2))
_gradient.register_vmap(row_by_row(_gradient, 3))


def _rows(table: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    return table.index_select(0, groups.flatten()).view(groups.shape).to(dtype)
