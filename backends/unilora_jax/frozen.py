"""The arrays that a frame keeps beside the pieces of each target: drawn from the seed, or made of the weights."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unilora_core import MismatchError, ProjectionSpec, TargetError, ValuesError
from unilora_core.frames import Sizes
from unilora_core.header import FROZEN
from unilora_core.schema import shown
from unilora_jax.targets import Target

__all__ = ["Frozen", "frozen_in_file", "frozen_of_seed", "frozen_of_weights", "tensors_of"]

Arrays = dict[str, Array]
Frozen = tuple[Arrays, ...]
"""Name → array, of each target."""


def frozen_of_seed(spec: ProjectionSpec, targets: tuple[Target, ...]) -> Frozen:
    """Draw the frozen arrays of each target by name; what is equal is one array."""
    made: dict[Sizes, Arrays] = {}
    known: dict[tuple[Any, ...], Array] = {}
    for target in targets:
        if target.sizes not in made:
            drawn = spec.form.frozen(target.sizes, spec.seed, spec.chosen)
            made[target.sizes] = {
                name: known.setdefault((array.shape, array.tobytes()), jnp.asarray(array))
                for name, array in drawn.items()
            }
    return tuple(made[target.sizes] for target in targets)


def frozen_of_weights(spec: ProjectionSpec, targets: tuple[Target, ...], leaves: Mapping[str, Any]) -> Frozen:
    """Make the frozen arrays of each target of its weights: by name, (layers, …), float32.

    Raises:
        TargetError: a leaf is a shape without values.
        ValuesError: a weight holds NaN or infinity.
    """
    of_weight, rank = spec.form.of_weight, int(spec.chosen["rank"])
    assert of_weight is not None  # see plan
    return tuple(_stacked([of_weight(W, rank) for W in _matrices(target, leaves[target.path])]) for target in targets)


def _matrices(target: Target, leaf: Any) -> list[Array]:
    """Return what is adapted of each layer of a leaf: (out, in), float32."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TargetError(
            f"{target.path}: this method is made of the weight's values, and the tree has only its shape; give the "
            "parameters themselves."
        )
    weight = jnp.asarray(leaf, jnp.float32)
    if not isinstance(weight, jax.core.Tracer) and not bool(jnp.isfinite(weight).all()):
        raise ValuesError(f"{target.path}: the weight holds NaN or infinity, so it has no singular vectors.")
    layers = weight if target.stacked else weight[None]
    inputs = [axis - target.stacked for axis in target.inputs]
    outputs = [axis for axis in range(layers.ndim - 1) if axis not in inputs]
    rows = slice(target.first_row, target.first_row + target.out_features)
    return [layer.transpose(*outputs, *inputs).reshape(-1, target.in_features)[rows] for layer in layers]


def _stacked(layers: list[Arrays]) -> Arrays:
    return {name: jnp.stack([arrays[name] for arrays in layers]) for name in layers[0]}


def tensors_of(targets: tuple[Target, ...], frozen: Frozen) -> dict[str, np.ndarray]:
    """Collect what `frozen_in_file` reads: the extra tensors of a file, by layer."""
    return {
        f"{FROZEN}{name}.{piece}": np.asarray(array[i])
        for target, arrays in zip(targets, frozen, strict=True)
        for piece, array in arrays.items()
        for i, name in enumerate(target.names)
    }


def frozen_in_file(
    where: str | os.PathLike, spec: ProjectionSpec, targets: tuple[Target, ...], tensors: Mapping[str, np.ndarray]
) -> Frozen:
    """Read the frozen arrays of each target by name, (layers, …), float32, out of a file's tensors.

    Raises:
        MismatchError: one is missing, or has another shape or dtype.
    """
    return tuple(
        _stacked(
            [
                {
                    array: _tensor(where, tensors, f"{FROZEN}{name}.{array}", shape)
                    for array, shape in spec.form.kept(target.sizes, spec.chosen).items()
                }
                for name in target.names
            ]
        )
        for target in targets
    )


def _tensor(where: str | os.PathLike, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> Array:
    array = tensors.get(name)
    if array is None or array.shape != shape or array.dtype != np.float32:
        found = "none" if array is None else f"{array.shape} {array.dtype}"
        raise MismatchError(
            f"{where}: expected the tensor {shown(name)} {shape} float32, which the method keeps, got {found}."
        )
    return jnp.asarray(array)
