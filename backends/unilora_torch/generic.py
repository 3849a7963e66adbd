"""θ_D of any map, in PyTorch: the core's Array API code computes it, and its transpose is the gradient if linear.

P and its gradient are operators of PyTorch, ``unilora::map`` and ``unilora::map_gradient``.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec, ValuesError
from unilora_torch.projection import Spans, Told, borders_of, length_of, row_by_row, spans_of, spec_of

__all__ = ["Mapped"]


@dataclass(eq=False)
class Mapped(Told):
    """P of a map that is no gather: θ_D = P (θ_d - ``origin``) + ``added``.

    With ``start="identity"`` the shifted factors are P (θ_d - θ_d⁰), and exactly zero at the start on any device; the
    others are P θ_d. One product gives both, if P θ_d⁰ is added to the others again. For a map that only places θ_d,
    where a sum would round, it is subtracted from the shifted ones instead.

    Attributes:
        frozen: the arrays that the map keeps beside θ_d.
        origin: (d,) float32; None for 0.
        added: (D,) float32; None for 0.
    """

    frozen: tuple[Tensor, ...]
    origin: Tensor | None = None
    added: Tensor | None = None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Mapped":
        """Make P of a spec, on the CPU."""
        frozen, told = spec.map.frozen(spec, torch, torch.device("cpu")), json.dumps(spec.to_json())
        if spec.start != "identity":
            return cls(spec, told, frozen)
        origin, exact = torch.from_numpy(spec.init()), spec.map.exact
        added = spec.map.project(spec, -origin if exact else origin, frozen, 0, spec.D)
        for name, at in spec.layout.slices.items():
            if spec.shifted(name) != exact:
                added[at] = 0
        return cls(spec, told, frozen, None if exact else origin, added)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """Compute the numbers of these slices of θ_D; see `Projection`."""
        moved = theta_d if self.origin is None else theta_d - self.origin
        if self.spec.map.exact:
            theta_D = _numbers(moved, self.spec, self.frozen, spans)
        else:
            theta_D = _Project.apply(moved, self.told, borders_of(spans), self.frozen)
        return theta_D if self.added is None else theta_D + torch.cat([self.added[at] for at in spans])


def _numbers(theta_d: Tensor, spec: ProjectionSpec, frozen: tuple[Tensor, ...], spans: Spans) -> Tensor:
    return torch.cat([spec.map.project(spec, theta_d, frozen, at.start, at.stop) for at in spans])


@torch.library.custom_op("unilora::map", mutates_args=())
def _map(theta_d: Tensor, told: str, borders: Sequence[int], frozen: Sequence[Tensor]) -> Tensor:
    """Compute the numbers of slices of θ_D = P(θ_d): (n,)."""
    with torch.autocast(theta_d.device.type, enabled=False):  # products of P are float32, whatever the model's are
        return _numbers(theta_d, spec_of(told), tuple(frozen), spans_of(borders))


@torch.library.custom_op("unilora::map_gradient", mutates_args=())
def _map_gradient(y: Tensor, theta_d: Tensor, told: str, borders: Sequence[int], frozen: Sequence[Tensor]) -> Tensor:
    """Compute the gradient (d,) of these numbers at θ_d, for a gradient y of theirs."""
    spec, spans, held = spec_of(told), spans_of(borders), tuple(frozen)
    transpose = spec.map.transpose
    with torch.autocast(y.device.type, enabled=False):
        if transpose is None:
            return torch.func.vjp(lambda theta: _numbers(theta, spec, held, spans), theta_d)[1](y)[0]
        parts = zip(y.split([at.stop - at.start for at in spans]), spans, strict=True)
        return functools.reduce(torch.add, [transpose(spec, part, held, at.start) for part, at in parts])


class _Project(torch.autograd.Function):
    """P with its gradient. It keeps nothing among autograd's saved tensors, which are counted, and no intermediate:
    what the gradient of a map that is not linear needs is computed again.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG004 - so it is called
        ctx.theta_d, ctx.told, ctx.borders, ctx.frozen = inputs
        known = not torch.compiler.is_compiling() and not ctx.theta_d.is_inference()
        ctx.version = ctx.theta_d._version if known else None

    @staticmethod
    def forward(theta_d: Tensor, told: str, borders: Sequence[int], frozen: Sequence[Tensor]) -> Tensor:
        return _map(theta_d, told, borders, frozen)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.version is not None and ctx.theta_d._version != ctx.version and spec_of(ctx.told).map.transpose is None:
            raise ValuesError(
                "theta_d was changed between the forward and the backward pass, and the gradient of "
                f"{spec_of(ctx.told).grouping!r} needs it as it was; step the optimiser after the backward pass."
            )
        return _Gradient.apply(y, ctx.theta_d.detach(), ctx.told, ctx.borders, ctx.frozen), None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient of P, whose own gradient is P where P is linear."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG004 - so it is called
        _, _, *ctx.rest = inputs

    @staticmethod
    def forward(y: Tensor, theta_d: Tensor, told: str, borders: Sequence[int], frozen: Sequence[Tensor]) -> Tensor:
        return _map_gradient(y, theta_d, told, borders, frozen)

    @staticmethod
    def backward(ctx: Any, theta_d: Tensor) -> tuple[Tensor | None, ...]:
        spec = spec_of(ctx.rest[0])
        if spec.map.transpose is None:
            raise ValuesError(f"the map {spec.grouping!r} is not linear, and has no second gradient here.")
        return _Project.apply(theta_d, *ctx.rest), None, None, None, None


def _exported(ctx: Any, y: Tensor) -> tuple:
    """Compute the gradient in an exported graph, where an operator wants one for each of a list of tensors."""
    return *_Project.backward(ctx, y)[:3], [None] * len(ctx.frozen)


_map.register_fake(lambda theta_d, _told, borders, _frozen: theta_d.new_empty(length_of(borders)))
_map_gradient.register_fake(lambda _y, theta_d, *_: torch.empty_like(theta_d))
_map.register_autograd(_exported, setup_context=_Project.setup_context)
_map.register_vmap(row_by_row(_map, 1))
_map_gradient.register_vmap(row_by_row(_map_gradient, 2))
