"""θ_D of any map, in PyTorch: the core's own Array API code, with its transpose as the gradient where it is linear."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Mapped"]

Spans = Sequence[slice]
"""Slices of θ_D, joined in this order."""


class Mapped:
    """The numbers of θ_D for a map that is no gather.

    Attributes:
        spec: what fixes the map.
        frozen: what the map keeps beside θ_d.
        shift: (D,) float32, what is added to P θ_d: -P θ_d⁰ in the factors that start at zero; None for nothing.
    """

    def __init__(self, spec: ProjectionSpec, frozen: tuple[Tensor, ...], shift: Tensor | None):
        self.spec, self.frozen, self.shift, self.origin = spec, frozen, shift, None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Mapped":
        """That of a spec, on the CPU."""
        frozen = spec.map.frozen(spec, torch, torch.device("cpu"))
        shift = None
        if spec.start == "identity":
            shift = -spec.map.project(spec, torch.from_numpy(spec.init()), frozen, 0, spec.D)
            for name, at in spec.layout.slices.items():
                if not spec.shifted(name):
                    shift[at] = 0
        return cls(spec, frozen, shift)

    def to(self, device: torch.device) -> "Mapped":
        """The same on another device."""
        if self.device == device:
            return self
        shift = None if self.shift is None else self.shift.to(device)
        return Mapped(self.spec, tuple(tensor.to(device) for tensor in self.frozen), shift)

    @property
    def device(self) -> torch.device | None:
        """Where its tensors are; None where it has none."""
        return next((tensor.device for tensor in self.tensors), None)

    def copy_(self, other: "Mapped") -> None:
        """Take the values of another one of the same map, D, d and start, in place."""
        self.spec = other.spec
        for tensor, new in zip(self.tensors, other.tensors, strict=True):
            tensor.copy_(new)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that it keeps."""
        return self.frozen if self.shift is None else (*self.frozen, self.shift)

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """θ_D of these slices, joined; differentiable in ``theta_d``."""
        theta_D = _Project.apply(theta_d, self.spec, self.frozen, tuple(spans))
        return theta_D if self.shift is None else theta_D + torch.cat([self.shift[at] for at in spans])


class _Project(torch.autograd.Function):
    """Keeps nothing among autograd's saved tensors, which are counted, and no intermediate: what the gradient of a map
    that is not linear needs is computed again.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _output: Tensor) -> None:
        ctx.theta_d, ctx.spec, ctx.frozen, ctx.spans = inputs

    @staticmethod
    def forward(theta_d: Tensor, spec: ProjectionSpec, frozen: tuple[Tensor, ...], spans: Spans) -> Tensor:
        return torch.cat([spec.map.project(spec, theta_d, frozen, at.start, at.stop) for at in spans])

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        spec, transpose = ctx.spec, ctx.spec.map.transpose
        if transpose is None:
            with torch.enable_grad():
                theta_d = ctx.theta_d.detach().requires_grad_()
                theta_D = _Project.forward(theta_d, spec, ctx.frozen, ctx.spans)
            return torch.autograd.grad(theta_D, theta_d, y)[0], None, None, None
        parts = y.split([at.stop - at.start for at in ctx.spans])
        grads = [transpose(spec, part, ctx.frozen, at.start) for part, at in zip(parts, ctx.spans, strict=True)]
        return sum(grads[1:], grads[0]), None, None, None
