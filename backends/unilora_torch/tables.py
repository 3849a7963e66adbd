"""The tables that P is made of, as tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from unilora_core import ProjectionSpec

__all__ = ["Tables"]


class Tables(NamedTuple):
    """What P is made of. They follow from the spec, so they are no buffers: nothing copies or broadcasts D numbers.

    Attributes:
        groups: (D,) int32; for the identity start those of the factors B point into the second half of the table.
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰ of the identity start.
    """

    groups: Tensor
    scale: Tensor
    origin: Tensor | None

    @classmethod
    def of(cls, spec: ProjectionSpec) -> "Tables":
        """Those of a spec, on the CPU."""
        groups, identity = torch.from_numpy(spec.groups()), spec.start == "identity"
        if identity:
            for name, at in spec.layout.slices.items():
                if name.endswith(".B"):
                    groups[at] += spec.d
        origin = torch.from_numpy(spec.init()) if identity else None
        return cls(groups, torch.from_numpy(spec.scale()), origin)

    def to(self, device: torch.device) -> "Tables":
        """The same on another device."""
        if self.groups.device == device:
            return self
        return Tables(*(None if table is None else table.to(device) for table in self))
