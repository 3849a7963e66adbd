"""θ_D of any map, in PyTorch: the core's Array API code computes it, and its transpose is the gradient if linear."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec, ValuesError
from unilora_torch.projection import Projection, Spans

__all__ = ["Mapped"]


@dataclass(eq=False)
class Mapped(Projection):
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
        frozen = spec.map.frozen(spec, torch, torch.device("cpu"))
        if spec.start != "identity":
            return cls(spec, frozen)
        origin, exact = torch.from_numpy(spec.init()), spec.map.exact
        added = spec.map.project(spec, -origin if exact else origin, frozen, 0, spec.D)
        for name, at in spec.layout.slices.items():
            if spec.shifted(name) != exact:
                added[at] = 0
        return cls(spec, frozen, None if exact else origin, added)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """Compute the numbers of these slices of θ_D; see `Projection`."""
        moved = theta_d if self.origin is None else theta_d - self.origin
        project = _numbers if self.spec.map.exact else _projected
        theta_D = project(moved, self.spec, self.frozen, tuple(spans))
        return theta_D if self.added is None else theta_D + torch.cat([self.added[at] for at in spans])


def _numbers(theta_d: Tensor, spec: ProjectionSpec, frozen: tuple[Tensor, ...], spans: Spans) -> Tensor:
    return torch.cat([spec.map.project(spec, theta_d, frozen, at.start, at.stop) for at in spans])


@torch.compiler.disable  # which would trace the draws of random numbers and what is written in the Array API
def _projected(theta_d: Tensor, spec: ProjectionSpec, frozen: tuple[Tensor, ...], spans: Spans) -> Tensor:
    return _Project.apply(theta_d, spec, frozen, spans)


class _Project(torch.autograd.Function):
    """P with its gradient. It keeps nothing among autograd's saved tensors, which are counted, and no intermediate:
    what the gradient of a map that is not linear needs is computed again.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _output: Tensor) -> None:
        ctx.theta_d, ctx.spec, ctx.frozen, ctx.spans = inputs
        ctx.version = None if ctx.theta_d.is_inference() else ctx.theta_d._version

    @staticmethod
    def forward(theta_d: Tensor, spec: ProjectionSpec, frozen: tuple[Tensor, ...], spans: Spans) -> Tensor:
        return _numbers(theta_d, spec, frozen, spans)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        spec, transpose = ctx.spec, ctx.spec.map.transpose
        if transpose is None:
            return _pullback(ctx, y), None, None, None
        parts = y.split([at.stop - at.start for at in ctx.spans])
        grads = [transpose(spec, part, ctx.frozen, at.start) for part, at in zip(parts, ctx.spans, strict=True)]
        return sum(grads[1:], grads[0]), None, None, None


def _pullback(ctx: Any, y: Tensor) -> Tensor:
    """Compute the gradient of a map that is not linear, at the θ_d of the forward pass."""
    if ctx.theta_d._version != ctx.version:
        raise ValuesError(
            f"theta_d was changed between the forward and the backward pass, and the gradient of {ctx.spec.grouping!r} "
            "needs it as it was; step the optimiser after the backward pass."
        )

    def project(theta_d: Tensor) -> Tensor:
        return _numbers(theta_d, ctx.spec, ctx.frozen, ctx.spans)

    return torch.func.vjp(project, ctx.theta_d.detach())[1](y)[0]
