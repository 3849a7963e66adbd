"""The one place where unilora meets the Array API: no other module imports array_api_compat."""

from types import ModuleType
from typing import Any

import array_api_compat
from array_api_compat import device, is_jax_array, is_numpy_namespace, is_torch_array

__all__ = [
    "Array",
    "array_namespace",
    "device",
    "has_int64",
    "is_jax_array",
    "is_numpy_namespace",
    "is_torch_array",
    "standard",
]

Array = Any
"""An array of any namespace that follows the Array API standard."""


def array_namespace(*arrays: Array) -> ModuleType:
    """Return the Array API namespace of arrays. A compiler that cannot trace how it is found may be told of this
    function what it gives.
    """
    return array_api_compat.array_namespace(*arrays)


def standard(xp: ModuleType) -> ModuleType:
    """Return the Array API namespace for ``xp``, which may be a framework's own module (``torch``, ``jax.numpy``)."""
    return array_namespace(xp.zeros(0))


def has_int64(xp: ModuleType) -> bool:
    """Say whether a namespace has integers of 64 bits (JAX has them in its x64 mode only)."""
    return "int64" in standard(xp).__array_namespace_info__().dtypes()
