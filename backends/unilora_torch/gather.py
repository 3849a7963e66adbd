"""The numbers of θ_D where P is a gather: θ_D = P θ_d, with its gradient Pᵀ.

The scale is applied to θ_d, then one gather spreads it; the backward pass is one `index_add_` (in order on the CPU;
atomic on CUDA, deterministic there under `torch.use_deterministic_algorithms(True)`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unilora_core import ProjectionSpec, SpecError, ValuesError
from unilora_torch.projection import Projection, Spans

__all__ = ["Gather", "project", "project_transpose"]


@dataclass(eq=False)
class Gather(Projection):
    """P as tables, for maps that are gathers.

    Attributes:
        groups: (D,) int32; the groups of factors that are made of θ_d - θ_d⁰ lie between d and 2d-1.
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰, from which the shifted factors are measured, or None where there are none.
    """

    groups: Tensor
    scale: Tensor
    origin: Tensor | None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Gather":
        """Make the tables of a spec, on the CPU."""
        groups = _table(spec)
        for name, at in spec.layout.slices.items():
            if spec.start == "identity" and spec.shifted(name):
                groups[at] += spec.d
        origin = torch.from_numpy(spec.init()) if spec.start == "identity" else None
        return cls(spec, torch.from_numpy(groups), torch.from_numpy(spec.scale()), origin)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """Compute the numbers of these slices of θ_D; see `Projection`."""
        return project(theta_d, self.groups_at(spans), self.scale, self.origin)

    def groups_at(self, spans: Iterable[slice]) -> Tensor:
        """Return the groups of these slices of θ_D, as a view where they lie side by side."""
        joined: list[slice] = []
        for span in spans:
            if joined and joined[-1].stop == span.start:
                joined[-1] = slice(joined[-1].start, span.stop)
            else:  # a file may hold another order
                joined.append(span)
        parts = [self.groups[span] for span in joined]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def table(self, theta_d: Tensor) -> Tensor:
        """Compute the table that the groups point into, for θ_d (…, d): see `scaled`."""
        return scaled(theta_d, self.scale, self.origin)


def _table(spec: ProjectionSpec) -> np.ndarray:
    """Compute all D groups.

    Raises:
        SpecError: the groups do not fit the memory.
    """
    try:
        return spec.groups()
    except MemoryError:
        raise SpecError(
            f"attach: the groups of D = {spec.D:,} LoRA parameters, {4 * spec.D:,} bytes, do not fit the memory; take "
            "groups='computed', which keeps none, or a lower rank."
        ) from None


def project(theta_d: Tensor, groups: Tensor, scale: Tensor, origin: Tensor | None = None) -> Tensor:
    """Compute (θ_d·s)[g], differentiable in ``theta_d``.

    Args:
        theta_d: (d,) float32.
        groups: (n,) int32, values below d; with ``origin``, below 2d.
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰. Groups from d to 2d-1 then mean ((θ_d - θ_d⁰)·s)[g - d], for the factors that
            ``start="identity"`` lets begin at zero.

    Returns:
        (n,) float32.

    Raises:
        ValuesError: ``theta_d`` has another shape than ``scale``, or is not floating point.
    """
    _check(theta_d, scale.shape, "project: theta_d")
    if torch.jit.is_tracing():  # TorchScript cannot save a Python function
        return scaled(theta_d, scale, origin).index_select(0, groups)
    return _Project.apply(theta_d, groups, scale, origin)


def project_transpose(y: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Compute Pᵀ y: the sum of y over each group, times 1/√n_j.

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
    """The gather with its gradient. It keeps nothing among autograd's saved tensors, which are counted: see
    `live.Live.chain_of`.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, _output):
        _, ctx.groups, ctx.scale, origin = inputs
        ctx.shifted = origin is not None

    @staticmethod
    def forward(theta_d, groups, scale, origin):
        return scaled(theta_d, scale, origin).index_select(0, groups)

    @staticmethod
    def backward(ctx, y):
        if not ctx.shifted:
            return project_transpose(y, ctx.groups, ctx.scale), None, None, None
        summed = project_transpose(y, ctx.groups, ctx.scale.repeat(2))
        plain, shifted = summed.chunk(2)
        return plain + shifted, None, None, None


def scaled(theta_d: Tensor, scale: Tensor, origin: Tensor | None) -> Tensor:
    """Compute θ_d·s; with an origin, (θ_d - θ_d⁰)·s follows it along the last axis."""
    table = theta_d * scale
    return table if origin is None else torch.cat([table, (theta_d - origin) * scale], dim=-1)


def _check(x: Tensor, shape: torch.Size, what: str) -> None:
    """Refuse another shape or dtype, with the core's text."""
    if x.shape != shape or not x.is_floating_point():
        raise ValuesError(
            f"{what}: expected shape {tuple(shape)} and a floating-point dtype, got {tuple(x.shape)} {x.dtype}."
        )
