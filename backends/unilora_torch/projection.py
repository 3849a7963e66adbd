"""Projection: the object that computes the numbers of θ_D for θ_d. The kinds are in `gather`, `streamed`, `generic`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Projection", "Spans"]

Spans = Sequence[slice]
"""The slices of θ_D that are computed, joined in this order."""

Kind = TypeVar("Kind", bound="Projection")


@dataclasses.dataclass(eq=False)
class Projection:
    """P of one spec, and the tensors that it needs, on one device. The tensors follow from the spec, so they are no
    buffers: nothing copies or broadcasts D numbers. A field is a tensor, a tuple of tensors, or None.
    """

    spec: ProjectionSpec

    def __call__(self, theta_d: Tensor, spans: Spans) -> Tensor:
        """Compute the numbers of these slices of θ_D, joined: (n,) float32, differentiable in ``theta_d``."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the projection keeps."""
        fields = vars(self).values()
        held = [tensor for field in fields for tensor in (field if isinstance(field, tuple) else (field,))]
        return tuple(tensor for tensor in held if isinstance(tensor, Tensor))

    @property
    def device(self) -> torch.device | None:
        """The device of its tensors; None where it needs none."""
        return next((tensor.device for tensor in self.tensors), None)

    def to(self: Kind, device: torch.device) -> Kind:
        """Return the same projection on another device."""
        if self.device in (device, None):
            return self
        return dataclasses.replace(self, **{name: _moved(field, device) for name, field in vars(self).items()})

    def copy_(self, other: "Projection") -> None:
        """Take the values of another projection of the same kind, D, d and start, in place."""
        self.spec = other.spec
        for tensor, new in zip(self.tensors, other.tensors, strict=True):
            tensor.copy_(new)


def _moved(field: Any, device: torch.device) -> Any:
    if isinstance(field, tuple):
        return tuple(_moved(each, device) for each in field)
    return field.to(device) if isinstance(field, Tensor) else field
