"""The projection θ_D = P θ_d and its transpose, for every map. Source:
Uni-LoRA (arXiv 2506.00799), section 3.
"""

from types import ModuleType

from unilora_core._namespace import Array, array_namespace, device
from unilora_core.errors import SpecError, ValuesError
from unilora_core.maps.gather import scale
from unilora_core.maps.mapping import Frozen
from unilora_core.spec import ProjectionSpec

__all__ = ["project", "project_transpose"]


def project(spec: ProjectionSpec, theta_d: Array) -> Array:
    """Compute the factors' numbers θ_D = P θ_d (with ``start="identity"`` P (θ_d - θ_d⁰) in the factors that are
    shifted).

    Args:
        theta_d: (d,) floating point, any namespace. Floats narrower than float32 are computed in float32.

    Returns:
        θ_D: (D,), in the namespace, dtype and device of ``theta_d``; differentiable where the namespace is.

    Raises:
        ValuesError: ``theta_d`` has another shape or a dtype that is not floating point.
    """
    xp, wide = _floating(theta_d, "project: theta_d", (spec.d,))
    where = device(theta_d)
    theta, frozen = xp.astype(theta_d, wide), spec.map.frozen(spec, xp, where)
    if spec.start == "identity":
        moved = theta - xp.astype(spec.init(xp=xp, device=where), wide)
        theta_D = _joined(spec, {False: theta, True: moved}, frozen)
    else:
        theta_D = spec.map.project(spec, theta, frozen, 0, spec.D)
    return xp.astype(theta_D, theta_d.dtype)


def _joined(spec: ProjectionSpec, of: dict[bool, Array], frozen: Frozen) -> Array:
    """Compute θ_D from one vector in the factors that are shifted, and from another in the rest."""
    xp = array_namespace(of[True])
    if spec.map.groups is not None:  # factor by factor: this order fixes the gradient's bits
        groups, counts = frozen
        narrow = scale(counts, xp, device(of[True]), of[True].dtype)
        of = {shifted: theta * narrow for shifted, theta in of.items()}
        parts = [xp.take(of[spec.shifted(name)], groups[at], axis=0) for name, at in spec.layout.slices.items()]
    else:
        of = {shifted: spec.map.project(spec, theta, frozen, 0, spec.D) for shifted, theta in of.items()}
        parts = [of[spec.shifted(name)][at] for name, at in spec.layout.slices.items()]
    return xp.concat(parts)


def project_transpose(spec: ProjectionSpec, y: Array) -> Array:
    """Compute Pᵀ y, which turns the gradient of a loss with respect to θ_D into the gradient for θ_d.

    Args:
        y: (D,) floating point, any namespace (for a gather: one that `unilora_core.maps.gather.scatter_add` knows).

    Returns:
        Pᵀ y: (d,), in the namespace, dtype and device of ``y``.

    Raises:
        SpecError: the map is not linear.
        ValuesError: ``y`` has another shape or a dtype that is not floating point.
    """
    if spec.map.transpose is None:
        raise SpecError(f"project_transpose: the grouping {spec.grouping!r} is not linear; differentiate project.")
    xp, wide = _floating(y, "project_transpose: y", (spec.D,))
    frozen = spec.map.frozen(spec, xp, device(y))
    return xp.astype(spec.map.transpose(spec, xp.astype(y, wide), frozen, 0), y.dtype)


def _floating(x: Array, what: str, shape: tuple[int]) -> tuple[ModuleType, object]:
    """Return the namespace of x and the float dtype that it is computed in."""
    xp = array_namespace(x)
    if tuple(x.shape) != shape or not xp.isdtype(x.dtype, "real floating"):
        raise ValuesError(f"{what}: expected shape {shape} and a floating-point dtype, got {tuple(x.shape)} {x.dtype}.")
    return xp, x.dtype if x.dtype == xp.float64 else xp.float32
