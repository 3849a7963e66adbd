"""Projection: what gives the numbers of θ_D for θ_d. The kinds are in `gather`, `streamed` and `generic`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Projection", "Spans"]

Spans = Sequence[slice]
"""Slices of θ_D, joined in this order."""

Kind = TypeVar("Kind", bound="Projection")


@dataclasses.dataclass(eq=False)
class Projection:
    """P of one spec, and the tensors that it needs, on one device. They follow from the spec, so they are no buffers:
    nothing copies or broadcasts D numbers. A field is a tensor, some of them, or None.
    """

    spec: ProjectionSpec

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """The numbers of these slices of θ_D one after the other: (n,) float32, differentiable in ``theta_d``."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that it keeps."""
        fields = vars(self).values()
        held = [tensor for field in fields for tensor in (field if isinstance(field, tuple) else (field,))]
        return tuple(tensor for tensor in held if isinstance(tensor, Tensor))

    @property
    def device(self) -> torch.device | None:
        """Where its tensors are; None where it needs none."""
        return next((tensor.device for tensor in self.tensors), None)

    def to(self: Kind, device: torch.device) -> Kind:
        """The same on another device."""
        if self.device in (device, None):
            return self
        return dataclasses.replace(self, **{name: _moved(field, device) for name, field in vars(self).items()})

    def copy_(self, other: "Projection") -> None:
        """Take the values of another one of the same kind, D, d and start, in place."""
        self.spec = other.spec
        for tensor, new in zip(self.tensors, other.tensors, strict=True):
            tensor.copy_(new)


def _moved(field: Any, device: torch.device) -> Any:
    if isinstance(field, tuple):
        return tuple(_moved(each, device) for each in field)
    return field.to(device) if isinstance(field, Tensor) else field
