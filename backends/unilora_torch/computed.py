"""P of a gather without a table of D groups: they are computed where they are used, forwards and backwards.

On CUDA Triton's kernels keep the groups of ``balanced`` in registers; elsewhere, and of other groupings, a block of
positions at a time is computed by the core.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_core.grouping import ALGORITHMS
from unilora_core.maps.gather import problem_of
from unilora_torch.gather import scaled
from unilora_torch.projection import Projection, Spans
from unilora_torch.streamed import BLOCK, Place, groups_at, streamed

__all__ = ["Computed", "computes", "kernels_for"]


@dataclass(eq=False)
class Computed(Projection):
    """P as a function of the positions.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰ of ``start="identity"``; None without one.
    """

    scale: Tensor
    origin: Tensor | None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Computed":
        """Make that of a spec, on the CPU."""
        origin = torch.from_numpy(spec.init()) if spec.start == "identity" else None
        return cls(spec, torch.from_numpy(spec.scale()), origin)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """See `Projection`."""
        return _projected(theta_d, self.spec, self.scale, self.origin, tuple(spans))

    def product(self, x: Tensor, theta_d: Tensor, place: Place) -> Tensor:
        """Compute x·ΔWᵀ of a dense frame, all of whose numbers start at zero; see `streamed`."""
        moved = theta_d if self.origin is None else theta_d - self.origin
        return streamed(x, moved * self.scale, self.spec, place)


def kernels_for(spec: ProjectionSpec, device: torch.device) -> ModuleType | None:
    """Triton's kernels, where they serve this spec there: one permutation, on CUDA."""
    if device.type != "cuda" or spec.grouping not in ("balanced", "unnormalised"):
        return None
    one = ALGORITHMS["balanced"].segment(problem_of(spec)) >= spec.D and 2 * spec.d < 2**31
    return _kernels() if one else None


def computes(spec: ProjectionSpec, device: torch.device) -> str:
    """Say what computes the groups of a spec there."""
    return "the core" if kernels_for(spec, device) is None else "Triton"


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from unilora_torch.kernels import gather
    except ImportError:  # builds of PyTorch without Triton
        return None
    return gather


@torch.compiler.disable  # which would trace the permutation
def _projected(
    theta_d: Tensor, spec: ProjectionSpec, scale: Tensor, origin: Tensor | None, spans: tuple[slice, ...]
) -> Tensor:
    return _Project.apply(theta_d, spec, scale, origin, spans)


class _Project(torch.autograd.Function):
    """Keeps nothing of size D between the passes, and nothing among autograd's saved tensors, which are counted."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _output: Tensor) -> None:
        _, ctx.spec, ctx.scale, _, ctx.spans = inputs

    @staticmethod
    def forward(
        theta_d: Tensor, spec: ProjectionSpec, scale: Tensor, origin: Tensor | None, spans: tuple[slice, ...]
    ) -> Tensor:
        table = scaled(theta_d, scale, origin)
        if kernels := _here(spec, table):
            borders, out = tuple((at.start, at.stop) for at in spans), table.new_empty(sum(map(_length, spans)))
            tiles = kernels.tiles(spec, borders, table.device)
            kernels.project(table, kernels.permuted(spec, table.device), tiles, out)
            return out
        return torch.cat([table.index_select(0, _shifted(spec, at, table.device)) for at in _blocks(spans)])

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        spec, scale, spans = ctx.spec, ctx.scale, ctx.spans
        whole = spans == (slice(0, spec.D),)
        if whole and (kernels := _here(spec, y)):
            pi = kernels.permuted(spec, y.device)
            return kernels.project_transpose(y.contiguous(), pi, scale), None, None, None, None
        summed, done = y.new_zeros(spec.d), 0
        for at in _blocks(spans):
            part = y[done : done + _length(at)]
            summed = summed.index_add(0, groups_at(spec, at.start, at.stop, y.device), part)
            done += _length(at)
        return summed * scale, None, None, None, None


def _length(at: slice) -> int:
    return at.stop - at.start


def _here(spec: ProjectionSpec, x: Tensor) -> ModuleType | None:
    """The kernels, where x is a tensor that they can read: none of `torch.vmap`."""
    return None if torch._C._functorch.is_functorch_wrapped_tensor(x) else kernels_for(spec, x.device)


def _blocks(spans: Spans) -> Iterator[slice]:
    for span in spans:
        for start in range(span.start, span.stop, BLOCK):
            yield slice(start, min(start + BLOCK, span.stop))


def _shifted(spec: ProjectionSpec, block: slice, device: torch.device) -> Tensor:
    """The groups of a block; those of factors that start at zero point into the second half of the table."""
    groups = groups_at(spec, block.start, block.stop, device)
    for name, at in spec.layout.slices.items() if spec.start == "identity" else ():
        start, stop = max(at.start, block.start), min(at.stop, block.stop)
        if start < stop and spec.shifted(name):
            groups[start - block.start : stop - block.start] += spec.d
    return groups
