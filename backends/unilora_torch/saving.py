"""Saving of an adapter as one file."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unilora_core import save_adapter
from unilora_core.header import write_identity, write_targets
from unilora_torch.frozen import tensors_of
from unilora_torch.targets import row_of
from unilora_torch.vector import Vector

__all__ = ["save", "storable"]


def save(
    vector: Vector,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write θ_d, the spec, the targets and the modules to save as one file, atomically; see `Adapter.save`."""
    gathered = dict(state or {}) | (vector.kept_heads or {})  # heads that are switched off are not in the model's state
    tensors = {name: storable(gathered.get(name, tensor)) for name, tensor in vector.heads().items()}
    tensors |= {name: storable(array) for name, array in tensors_of(vector.spec, vector.chains.frozen).items()}
    rows = [row_of(target, vector.spec.frame != "pair") for target in vector.targets]
    written = write_targets(rows, vector.modules_to_save)
    theta_d = storable(vector.theta_d if state is None else state[f"{vector.name}.theta_d"])
    written |= write_identity(vector.base) | dict(metadata or {})
    save_adapter(path, vector.spec, theta_d, tensors=tensors, metadata=written)


def storable(tensor: Tensor) -> Any:
    """Return a tensor as a NumPy array; bfloat16, which NumPy lacks, as float32 (exact); a DTensor gathered."""
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
