"""θ_D = P θ_d with its gradient Pᵀ, in PyTorch.

The scale is applied to θ_d, then one gather spreads it; the backward pass is one `index_add_` (in order on the CPU;
atomic on CUDA, deterministic there under `torch.use_deterministic_algorithms(True)`).
"""

import torch
from torch import Tensor

from unilora_core import ValuesError

__all__ = ["project", "project_transpose"]


def project(theta_d: Tensor, groups: Tensor, scale: Tensor, origin: Tensor | None = None) -> Tensor:
    """(θ_d·s)[g], differentiable in ``theta_d``.

    Args:
        theta_d: (d,) float32.
        groups: (n,) int32, values below d; with ``origin``, below 2d.
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰. Groups from d to 2d-1 then mean ((θ_d - θ_d⁰)·s)[g - d], for the factors B of
            ``start="identity"``.

    Returns:
        (n,) float32.

    Raises:
        ValuesError: ``theta_d`` has another shape than ``scale``, or is not floating point.
    """
    _check(theta_d, scale.shape, "project: theta_d")
    return _Project.apply(theta_d, groups, scale, origin)


def project_transpose(y: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Pᵀ y: the sum of y over each group, times 1/√n_j.

    Args:
        y: (n,) float32.
        groups: (n,) int32, values below d.
        scale: (d,) float32.

    Returns:
        (d,) float32.

    Raises:
        ValuesError: ``y`` has another shape than ``groups``, or is not floating point.
    """
    _check(y, groups.shape, "project_transpose: y")
    return y.new_zeros(scale.shape).index_add_(0, groups, y) * scale


class _Project(torch.autograd.Function):
    """Keeps nothing among autograd's saved tensors, which are counted: see `adapter.Adapter.factors_of`."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, _output):
        _, ctx.groups, ctx.scale, origin = inputs
        ctx.shifted = origin is not None

    @staticmethod
    def forward(theta_d, groups, scale, origin):
        table = theta_d * scale
        if origin is not None:
            table = torch.cat([table, (theta_d - origin) * scale])
        return table.index_select(0, groups)

    @staticmethod
    def backward(ctx, y):
        if not ctx.shifted:
            return project_transpose(y, ctx.groups, ctx.scale), None, None, None
        summed = project_transpose(y, ctx.groups, ctx.scale.repeat(2))
        A, B = summed.chunk(2)
        return A + B, None, None, None


def _check(x: Tensor, shape: torch.Size, what: str) -> None:
    """The text is that of the core."""
    if x.shape != shape or not x.is_floating_point():
        raise ValuesError(
            f"{what}: expected shape {tuple(shape)} and a floating-point dtype, got {tuple(x.shape)} {x.dtype}."
        )
