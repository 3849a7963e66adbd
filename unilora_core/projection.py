"""θ_D = P θ_d and its transpose.

P is a gather: θ_D[i] = (θ_d·s)[g(i)], s_j = 1/√n_j. Scaling θ_d first gives the same bits as scaling θ_D, D/d times
cheaper. Pᵀ is a scatter-add, which the Array API standard lacks (2025.12), so `_scatter_add` names its source in each
namespace. Source: Uni-LoRA (arXiv 2506.00799), section 3.
"""

from types import ModuleType

import numpy as np

from unilora_core._namespace import Array, array_namespace, device, is_jax_array, is_torch_array
from unilora_core.errors import ValuesError
from unilora_core.spec import ProjectionSpec

__all__ = ["project", "project_transpose"]


def project(spec: ProjectionSpec, theta_d: Array) -> Array:
    """The LoRA factors' numbers: θ_D = P θ_d (for ``start="identity"``, P (θ_d - θ_d⁰) in the factors ``*.B``).

    Args:
        theta_d: (d,) floating point, any namespace. Narrower floats than float32 are computed in float32.

    Returns:
        θ_D: (D,), in the namespace, dtype and device of ``theta_d``; differentiable where the namespace is.

    Raises:
        ValuesError: another shape or a dtype that is not floating point.
    """
    xp, wide = _floating(theta_d, "project: theta_d", (spec.d,))
    where = device(theta_d)
    theta = xp.astype(theta_d, wide)
    groups = spec.groups(xp=xp, device=where)
    scale = spec.scale(xp=xp, device=where, dtype=wide)
    if spec.start == "paper":
        theta_D = xp.take(theta * scale, groups, axis=0)
    else:
        moved = theta - xp.astype(spec.init(xp=xp, device=where), wide)
        of = {"A": theta * scale, "B": moved * scale}
        theta_D = xp.concat([xp.take(of[name[-1]], groups[at], axis=0) for name, at in spec.layout.slices.items()])
    return xp.astype(theta_D, theta_d.dtype)


def project_transpose(spec: ProjectionSpec, y: Array) -> Array:
    """Pᵀ y: what the gradient of a loss with respect to θ_D becomes for θ_d.

    Args:
        y: (D,) floating point, any namespace that `_scatter_add` knows.

    Returns:
        (d,), in the namespace, dtype and device of ``y``.

    Raises:
        ValuesError: another shape or a dtype that is not floating point.
    """
    xp, wide = _floating(y, "project_transpose: y", (spec.D,))
    where = device(y)
    summed = _scatter_add(xp.astype(y, wide), spec.groups(xp=xp, device=where), spec.d, xp)
    return xp.astype(summed * spec.scale(xp=xp, device=where, dtype=wide), y.dtype)


def _scatter_add(y: Array, groups: Array, d: int, xp: ModuleType) -> Array:
    """Σ of y over each group: (d,).

    PyTorch: `index_add_` (in order on the CPU; atomic on CUDA unless `torch.use_deterministic_algorithms(True)`).
    JAX: `.at[].add`, XLA's scatter. NumPy and every other namespace: `numpy.bincount` on the host, in order of
    position, summed in float64.
    """
    if is_torch_array(y):
        return xp.zeros(d, dtype=y.dtype, device=device(y)).index_add(0, groups, y)
    if is_jax_array(y):
        return xp.zeros(d, dtype=y.dtype).at[groups].add(y)
    host = np.bincount(np.asarray(groups), np.asarray(y), minlength=d)
    return xp.asarray(host, dtype=y.dtype, device=device(y))


def _floating(x: Array, what: str, shape: tuple[int]) -> tuple[ModuleType, object]:
    """The namespace of x and the float that it is computed in."""
    xp = array_namespace(x)
    if tuple(x.shape) != shape or not xp.isdtype(x.dtype, "real floating"):
        raise ValuesError(f"{what}: expected shape {shape} and a floating-point dtype, got {tuple(x.shape)} {x.dtype}.")
    return xp, x.dtype if x.dtype == xp.float64 else xp.float32
