"""Saving of an adapter as one file."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unilora_core import ProjectionSpec, save_adapter
from unilora_core.header import write_identity, write_targets
from unilora_torch.frozen import tensors_of
from unilora_torch.targets import Target, row_of
from unilora_torch.vector import Vector

__all__ = ["rows_of", "save", "storable", "write"]


def save(
    vector: Vector,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write θ_d, the spec, the targets and the modules to save as one file, atomically; see `Adapter.save`."""
    gathered = dict(state or {}) | (vector.kept_heads or {})  # heads that are switched off are not in the model's state
    heads = {name: gathered.get(name, tensor) for name, tensor in vector.heads().items()}
    theta_d = vector.theta_d if state is None else state[f"{vector.name}.theta_d"]
    written = write_targets(rows_of(vector.spec, vector.targets), vector.modules_to_save)
    written |= write_identity(vector.base) | dict(metadata or {})
    write(path, vector.spec, theta_d, heads | tensors_of(vector.spec, vector.chains.frozen), written)


def rows_of(spec: ProjectionSpec, targets: Iterable[Target]) -> list[tuple]:
    """Return what the header of a file says of the targets of a spec."""
    return [row_of(target, spec.frame != "pair") for target in targets]


def write(
    path: str | os.PathLike,
    spec: ProjectionSpec,
    theta_d: Tensor,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write an adapter file from tensors on any device."""
    arrays = {name: storable(tensor) for name, tensor in tensors.items()}
    save_adapter(path, spec, storable(theta_d), tensors=arrays, metadata=dict(metadata))


def storable(tensor: Tensor) -> Any:
    """Return a tensor as a NumPy array; bfloat16, which NumPy lacks, as float32 (exact); a DTensor gathered."""
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
