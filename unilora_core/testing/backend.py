"""The description that a backend gives of itself, and the same with the core's functions filled in."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import unilora_core
from unilora_core._namespace import Array, standard
from unilora_core.grouping import ALGORITHMS
from unilora_core.maps import MAPS
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.compare import expect

__all__ = ["Backend", "Subject"]

Function = Callable[[Array], Array]


@dataclass(frozen=True)
class Backend:
    """The description that a backend gives to the suite; beyond ``name`` and ``xp``, what is left out is as the core
    does it.

    Args:
        name: the first part of the name of each case.
        xp: the Array API namespace, or the framework's own module; ``xp.float32`` and the other dtypes are its dtypes.
        device: where the arrays are placed; None is the default of the namespace. Another device is another `Backend`.
        groups: (spec, start, stop) → g(start) … g(stop-1), (stop-start,) int32, on the device.
        init: spec → θ_d⁰, (d,) float32, on the device.
        project: spec → the function θ_d (d,) → θ_D (D,). The outer call does what is done once for a spec (groups,
            scale); the inner function is called, differentiated and compiled.
        project_transpose: spec → the function y (D,) → Pᵀ y (d,).
        asarray: (NumPy array, dtype of ``xp``) → array of the backend, on the device.
        asnumpy: array of the backend → NumPy array; bfloat16 may come as float32.
        pullback: (function, x, y) → the vector-Jacobian product of the function at x with y, (d,); None where the
            namespace has no differentiation.
        compile: function → the compiled function; None where there is no compiler.
        compiled: the kinds of function that ``compile`` can take: ``"groups"`` (the core's kernels, functions of the
            positions; not asked of a backend with ``groups`` of its own), ``"project"`` (with its transpose and its
            gradient), and ``"maps"`` (``project`` of the maps whose rows have many entries).
        dtypes: the floating-point dtypes that ``project`` and ``project_transpose`` take and give back, by name.
        maps: the maps that it has, by name; the three groupings of `unilora_core.grouping` are always asked for.
    """

    name: str
    xp: ModuleType
    device: object = None
    groups: Callable[[ProjectionSpec, int, int], Array] | None = None
    init: Callable[[ProjectionSpec], Array] | None = None
    project: Callable[[ProjectionSpec], Function] | None = None
    project_transpose: Callable[[ProjectionSpec], Function] | None = None
    asarray: Callable[[np.ndarray, Any], Array] | None = None
    asnumpy: Callable[[Array], np.ndarray] = np.asarray
    pullback: Callable[[Function, Array, Array], Array] | None = None
    compile: Callable[[Function], Function] | None = None
    compiled: tuple[str, ...] = ("groups", "project", "maps")
    dtypes: tuple[str, ...] = ("float32",)
    maps: tuple[str, ...] = tuple(MAPS)


class Subject:
    """A backend as the checks use it: the core's function stands wherever it brings none of its own."""

    def __init__(self, backend: Backend):
        self.name, self.xp, self.dtypes = backend.name, backend.xp, backend.dtypes
        self.maps = {*ALGORITHMS, *backend.maps}
        self.pullback, self.compile = backend.pullback, backend.compile
        self.computes_groups = not backend.groups
        self.compiles_groups = bool(backend.compile and not backend.groups and "groups" in backend.compiled)
        self.compiles_project = bool(backend.compile and "project" in backend.compiled)
        self.compiles_maps = bool(self.compiles_project and "maps" in backend.compiled)
        xp, device = backend.xp, backend.device
        self.groups = backend.groups or (lambda spec, start, stop: spec.groups(start, stop, xp=xp, device=device))
        self.members = functools.partial(ProjectionSpec.members, xp=xp, device=device)
        self.init = backend.init or (lambda spec: spec.init(xp=xp, device=device))
        self.project = backend.project or (lambda spec: functools.partial(unilora_core.project, spec))
        self.project_transpose = backend.project_transpose or (
            lambda spec: functools.partial(unilora_core.project_transpose, spec)
        )
        self._asarray = backend.asarray or (
            lambda values, dtype: standard(xp).asarray(values, dtype=dtype, device=device)
        )
        self._asnumpy = backend.asnumpy

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """Make an array of the backend from a NumPy array, in the dtype of that name (by default the dtype of
        ``values``).
        """
        return self._asarray(np.array(values), getattr(self.xp, dtype or values.dtype.name))

    def numpy(self, array: Array) -> np.ndarray:
        """Return an array of the backend as a NumPy array."""
        return np.asarray(self._asnumpy(array))

    def expect_dtype(self, what: str, array: Array, dtype: str) -> None:
        """Check that the array has the dtype of this name."""
        if array.dtype != getattr(self.xp, dtype):
            raise AssertionError(f"{what}: expected {dtype}, got {array.dtype}")

    def expect_device(self, what: str, array: Array) -> None:
        """Check that the array lies where the backend's inputs do."""
        placed = self.array(np.zeros(1, np.float32))
        expect(f"{what}: device", getattr(array, "device", None), getattr(placed, "device", None))
