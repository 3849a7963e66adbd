"""Changes of d that keep the function: θ_d grows where a small one has learned what it can, and shrinks where it may.

With g(i) = π(i) mod d each group of d is whole groups of a multiple of d, so P of the larger d makes every θ_D that P
of the smaller d makes. Growing keeps θ_D. Shrinking is its least squares fit, which undoes a growth.
"""

import dataclasses
from types import ModuleType

from unilora_core._namespace import Array, array_namespace, device
from unilora_core.errors import SpecError, ValuesError
from unilora_core.grouping import MAX_d
from unilora_core.layout import integer
from unilora_core.maps import FIRST_D, MAPS
from unilora_core.maps import gather as _gather
from unilora_core.schema import shown
from unilora_core.spec import ProjectionSpec

__all__ = ["carried", "grow", "grown", "moved", "resized", "shrink", "shrunk"]


def grow(spec: ProjectionSpec, theta_d: Array, factor: int = 2) -> tuple[ProjectionSpec, Array]:
    """Return the spec of ``factor`` times d, and its θ_d, which gives the same θ_D but for rounding.

    Args:
        theta_d: (d,) float32 or float64, any namespace.

    Raises:
        SpecError: the map does not nest, or the new d is past D; the error says the largest factor.
        ValuesError: ``theta_d`` has another shape or dtype.
    """
    after = grown(spec, factor)
    return after, moved(spec, after, theta_d)


def shrink(spec: ProjectionSpec, theta_d: Array, factor: int = 2) -> tuple[ProjectionSpec, Array]:
    """Return the spec of d / ``factor``, and the θ_d whose θ_D is nearest to this one: each group's mean of what it
    joins.

    Args:
        theta_d: (d,) float32 or float64, any namespace.

    Raises:
        SpecError: the map does not nest, or ``factor`` does not divide d.
        ValuesError: ``theta_d`` has another shape or dtype.
    """
    after = shrunk(spec, factor)
    return after, moved(spec, after, theta_d)


def grown(spec: ProjectionSpec, factor: int = 2) -> ProjectionSpec:
    """Return the spec of ``factor`` times d; see `grow`."""
    factor, limit = _factor("grow", factor), min(spec.D, MAX_d)
    if spec.map.nests is not None and spec.d * factor > limit:
        most = limit // spec.d
        raise SpecError(
            f"grow: {factor} times d = {spec.d} would be more than min(D, 2^31) = {limit}; "
            + (f"the largest factor is {most}." if most > 1 else "d cannot grow any more.")
        )
    return resized(spec, spec.d * factor, "grow")


def shrunk(spec: ProjectionSpec, factor: int = 2) -> ProjectionSpec:
    """Return the spec of d / ``factor``; see `shrink`."""
    factor = _factor("shrink", factor)
    if spec.map.nests is not None and spec.d % factor:
        divisors = [str(each) for each in range(2, min(spec.d, 1000) + 1) if spec.d % each == 0]
        raise SpecError(
            f"shrink: d = {spec.d} is no multiple of {factor}; "
            + (f"factors of it are {', '.join(divisors[:8])}." if divisors else "it has no factor below 1000.")
        )
    return resized(spec, spec.d // factor, "shrink")


def resized(spec: ProjectionSpec, d: int, what: str = "resize") -> ProjectionSpec:
    """Return the spec of another d; the d with which training began has its own options again.

    Raises:
        SpecError: the map does not nest, or neither ``d`` nor the first d is a multiple of the other; the error names
            ``what``.
    """
    if spec.map.nests is None:
        raise SpecError(f"{what}: {_no_nest(spec)}")
    first = spec.first
    if d == first.d:
        return first
    if d % first.d and first.d % d:
        raise SpecError(
            f"{what}: expected a d that divides the d with which training began, {first.d}, or is a multiple of it, "
            f"got d = {d}; the start of the training would be lost. Take another factor."
        )
    return dataclasses.replace(first, d=d, options=(*first.options, (FIRST_D, first.d)))


def moved(before: ProjectionSpec, after: ProjectionSpec, theta_d: Array) -> Array:
    """Carry θ_d of one spec to the same spec with another d; with the identity start, θ_d⁰ becomes exactly θ_d⁰ again.

    Raises:
        ValuesError: ``theta_d`` has another shape or dtype.
    """
    xp, where = _checked(before, theta_d), device(theta_d)
    if before.start != "identity":
        return carried(before, after, theta_d)
    was, is_ = (xp.astype(spec.init(xp=xp, device=where), theta_d.dtype) for spec in (before, after))
    return is_ + carried(before, after, theta_d - was)


def carried(before: ProjectionSpec, after: ProjectionSpec, x: Array, power: int = 1) -> Array:
    """Carry what else has a number for each of θ_d, such as an optimiser's state, to another d.

    Args:
        x: (d,) float32 or float64, any namespace.
        power: 1 for what is linear in θ_d or in its gradient (Adam's first moment, momentum): it changes as θ_d without
            its start. 2 for mean squares (Adam's second moment): growing copies them, shrinking averages them, since a
            gradient's entry under P has the same mean square whatever d.

    Returns:
        (d′,), in the namespace, dtype and device of ``x``.

    Raises:
        ValuesError: ``x`` has another shape or dtype.
    """
    _checked(before, x)
    return x if before.d == after.d else _gather.carried(x, before.counts(), after.counts(), power)


def _factor(what: str, factor: object) -> int:
    try:
        number = integer(factor)
    except TypeError:
        number = 0
    if number < 2:
        raise SpecError(f"{what}: factor must be an integer of at least 2, got {shown(factor)}.")
    return number


def _no_nest(spec: ProjectionSpec) -> str:
    nesting = ", ".join(repr(name) for name, each in MAPS.items() if each.nests is not None)
    why = "has one d only" if spec.map.fixed else "has another P for another d, and the function would change"
    return (
        f"the grouping {spec.grouping!r} {why}; begin anew with the d that is wanted, or with the grouping {nesting}, "
        "whose P at one d holds those of its factors."
    )


def _checked(spec: ProjectionSpec, x: Array) -> ModuleType:
    """Return the namespace of an array that has a number for each of θ_d."""
    xp = array_namespace(x)
    if tuple(x.shape) != (spec.d,) or x.dtype not in (xp.float32, xp.float64):
        raise ValuesError(
            f"resizing: expected shape ({spec.d},) and float32 or float64, got {tuple(x.shape)} {x.dtype}."
        )
    return xp
