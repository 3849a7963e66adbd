"""Projection: the object that computes the numbers of θ_D for θ_d. The kinds are in `gather`, `streamed`, `generic`."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Projection", "Spans", "Told", "borders_of", "length_of", "row_by_row", "spans_of", "spec_of"]

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


@dataclasses.dataclass(eq=False)
class Told(Projection):
    """A projection that is an operator of PyTorch, which graphs hold as it is. An operator takes no spec, so it is told
    its JSON, and slices by their borders.

    Attributes:
        told: the spec as JSON.
    """

    told: str

    def copy_(self, other: Projection) -> None:
        """See `Projection`."""
        assert isinstance(other, Told)
        super().copy_(other)
        self.told = other.told


@functools.lru_cache(maxsize=64)
def spec_of(told: str) -> ProjectionSpec:
    """Return the spec that an operator was told."""
    return ProjectionSpec.from_json(json.loads(told))


def borders_of(spans: Spans) -> list[int]:
    """Return the borders of slices, as an operator takes them."""
    return [border for at in spans for border in (at.start, at.stop)]


def spans_of(borders: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices that have these borders."""
    return tuple(map(slice, borders[::2], borders[1::2]))


def length_of(borders: Sequence[int]) -> int:
    """Return how many numbers the slices have that have these borders."""
    return sum(borders[1::2]) - sum(borders[::2])


def row_by_row(operator: Callable[..., Tensor], count: int) -> Callable[..., tuple[Any, Any]]:
    """Make the rule of `torch.vmap` for an operator whose first ``count`` arguments may be many tensors."""

    def mapped(info: Any, axes: tuple, *given: Any) -> tuple[Any, Any]:
        rows = [
            [x if axis is None else x.select(axis, i) for x, axis in zip(given[:count], axes[:count], strict=True)]
            for i in range(info.batch_size)
        ]
        found = [operator(*row, *given[count:]) for row in rows]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    return mapped


def _moved(field: Any, device: torch.device) -> Any:
    if isinstance(field, tuple):
        return tuple(_moved(each, device) for each in field)
    return field.to(device) if isinstance(field, Tensor) else field
