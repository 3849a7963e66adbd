"""P of a gather without a table of D groups: they are computed where they are used, forwards and backwards.

On CUDA Triton's kernels keep the groups of ``balanced`` in registers; elsewhere, and of other groupings, a block of
positions at a time is computed by the core. P and Pᵀ are operators of PyTorch, ``unilora::project`` and
``unilora::project_transpose``.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_core.grouping import ALGORITHMS
from unilora_core.maps.gather import problem_of
from unilora_torch.gather import scaled
from unilora_torch.projection import Spans, Told, borders_of, length_of, spec_of
from unilora_torch.streamed import BLOCK, Place, groups_at, streamed

__all__ = ["Computed", "computes", "kernels_for"]


@dataclass(eq=False)
class Computed(Told):
    """P as a function of the positions.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰ of ``start="identity"``; None without one.
    """

    scale: Tensor
    origin: Tensor | None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Computed":
        """Make P of a spec, on the CPU."""
        origin = torch.from_numpy(spec.init()) if spec.start == "identity" else None
        return cls(spec, json.dumps(spec.to_json()), torch.from_numpy(spec.scale()), origin)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """See `Projection`."""
        return _Project.apply(theta_d, self.scale, self.origin, self.told, borders_of(spans))

    def product(self, x: Tensor, theta_d: Tensor, place: Place) -> Tensor:
        """Compute x·ΔWᵀ of a dense frame, all of whose numbers start at zero; see `streamed`."""
        moved = theta_d if self.origin is None else theta_d - self.origin
        return streamed(x, moved * self.scale, self.told, place)


def kernels_for(spec: ProjectionSpec, device: torch.device) -> ModuleType | None:
    """Return Triton's kernels, where they serve this spec there: one permutation, on CUDA."""
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


@torch.library.custom_op("unilora::project", mutates_args=())
def _project(theta_d: Tensor, scale: Tensor, origin: Tensor | None, told: str, borders: Sequence[int]) -> Tensor:
    """Compute the numbers of slices of θ_D, whose borders these are, of θ_d (…, d): (…, n)."""
    spec, table, spans = spec_of(told), scaled(theta_d, scale, origin), _spans(borders)
    if kernels := kernels_for(spec, table.device):
        out = table.new_empty((*table.shape[:-1], length_of(borders)))
        pi, tiles = kernels.permuted(spec, table.device), kernels.tiles(spec, spans, table.device)
        for row, into in zip(table.reshape(-1, table.shape[-1]), out.view(-1, out.shape[-1]), strict=True):
            kernels.project(row.contiguous(), pi, tiles, into)
        return out
    return torch.cat([table.index_select(-1, _shifted(spec, at, table.device)) for at in _blocks(spans)], dim=-1)


@torch.library.custom_op("unilora::project_transpose", mutates_args=())
def _project_transpose(
    y: Tensor,
    scale: Tensor,
    origin: Tensor | None,  # noqa: ARG001 - both halves of the table are made of the same θ_d
    told: str,
    borders: Sequence[int],
) -> Tensor:
    """Compute the transpose of these slices, of y (…, n): (…, d)."""
    spec, spans = spec_of(told), _spans(borders)
    if spans == ((0, spec.D),) and (kernels := kernels_for(spec, y.device)):
        pi = kernels.permuted(spec, y.device)
        rows = [kernels.project_transpose(row.contiguous(), pi, scale) for row in y.reshape(-1, spec.D)]
        return torch.stack(rows).view(*y.shape[:-1], spec.d)
    summed, done = y.new_zeros((*y.shape[:-1], spec.d)), 0
    for start, stop in _blocks(spans):
        part = y[..., done : done + stop - start]
        summed.index_add_(-1, groups_at(spec, start, stop, y.device), part)
        done += stop - start
    return summed.mul_(scale)


class _Linear(torch.autograd.Function):
    """Keep nothing of size D between the passes, and nothing among autograd's saved tensors, which are counted.

    Stands before the operators, whose own gradient `torch.func` cannot take.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG004 - so it is called
        _, *ctx.rest = inputs


class _Project(_Linear):
    @staticmethod
    def forward(theta_d: Tensor, scale: Tensor, origin: Tensor | None, told: str, borders: Sequence[int]) -> Tensor:
        return _project(theta_d, scale, origin, told, borders)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        return _ProjectTranspose.apply(y, *ctx.rest), None, None, None, None


class _ProjectTranspose(_Linear):
    @staticmethod
    def forward(y: Tensor, scale: Tensor, origin: Tensor | None, told: str, borders: Sequence[int]) -> Tensor:
        return _project_transpose(y, scale, origin, told, borders)

    @staticmethod
    def backward(ctx: Any, theta_d: Tensor) -> tuple[Tensor | None, ...]:
        scale, origin, *where = ctx.rest
        zero = None if origin is None else torch.zeros_like(origin)
        return _Project.apply(theta_d, scale, zero, *where), None, None, None, None


def _mapped(operator: Callable[..., Tensor], _: Any, axes: tuple, x: Tensor, *others: Any) -> tuple[Tensor, int]:
    """Apply the rule of `torch.vmap`: the first tensor alone is ever one of many."""
    return operator(x.movedim(axes[0], 0), *others), 0


_project.register_fake(lambda x, _scale, _origin, _told, borders: x.new_empty((*x.shape[:-1], length_of(borders))))
_project_transpose.register_fake(lambda y, scale, *_: y.new_empty((*y.shape[:-1], len(scale))))
for _operator, _function in {_project: _Project, _project_transpose: _ProjectTranspose}.items():
    _operator.register_autograd(_function.backward, setup_context=_function.setup_context)  # of an exported graph
    _operator.register_vmap(functools.partial(_mapped, _operator))


def _spans(borders: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(borders[::2], borders[1::2], strict=True))


def _blocks(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, last in spans:
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def _shifted(spec: ProjectionSpec, block: tuple[int, int], device: torch.device) -> Tensor:
    """Compute the groups of a block; those of factors that start at zero point into the second half of the table."""
    first, last = block
    groups = groups_at(spec, first, last, device)
    for name, at in spec.layout.slices.items() if spec.start == "identity" else ():
        if at.start < last and first < at.stop and spec.shifted(name):
            groups[max(at.start - first, 0) : at.stop - first] += spec.d
    return groups
