"""Arithmetic of adapters of one spec, which are vectors of one R^d: θ_d⁰ + Σ w_k (θ_k - θ_d⁰).

Weights that add up to 1 give means and interpolations, in which θ_d⁰ drops out; other weights add, scale and negate
what training has changed, as task arithmetic does (arXiv 2212.04089). θ_D follows exactly, as P is linear. B·A does
not, as it is a product: a sum of updates is what a bank's mixtures compute.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import numpy as np

from unilora_core._namespace import Array, array_namespace, device
from unilora_core.errors import MismatchError, SpecError, ValuesError
from unilora_core.header import FROZEN, Header, read_header
from unilora_core.identity import difference, name_of
from unilora_core.serialisation import AdapterFile
from unilora_core.spec import ProjectionSpec

__all__ = ["averages", "checked_weights", "combine", "combine_files", "weighted"]


def combine(spec: ProjectionSpec, thetas: Iterable[Array], weights: Iterable[float] | None = None) -> Array:
    """Compute θ_d⁰ + Σ w_k (θ_k - θ_d⁰) of adapters of one spec.

    Args:
        thetas: (d,) floating point each, of any one namespace.
        weights: w_k, one for each; by default 1/n, the mean.

    Returns:
        (d,) in the dtype and on the device of the first, differentiable where the namespace is.

    Raises:
        SpecError: the map is not linear.
        ValuesError: there is no θ_d, one has another shape or is not floating point, or the weights are not finite
            numbers, one for each.
    """
    thetas = list(thetas)
    weights = checked_weights(len(thetas), weights, "combine")
    if spec.map.transpose is None:
        raise SpecError(f"combine: the grouping {spec.grouping!r} is not linear, so a sum of θ_d means nothing.")
    for i, theta_d in enumerate(thetas):
        xp = array_namespace(theta_d)
        if tuple(theta_d.shape) != (spec.d,) or not xp.isdtype(theta_d.dtype, "real floating"):
            raise ValuesError(
                f"combine: theta_d {i}: expected shape {(spec.d,)} and a floating-point dtype, got "
                f"{tuple(theta_d.shape)} {theta_d.dtype}."
            )
    xp, where = array_namespace(thetas[0]), device(thetas[0])
    total = weighted(thetas, weights)
    if (rest := 1 - math.fsum(weights)) != 0:
        total = total + rest * xp.astype(spec.init(xp=xp, device=where), thetas[0].dtype)
    return total


def combine_files(files: Mapping[str, AdapterFile], weights: Iterable[float] | None = None) -> AdapterFile:
    """Combine adapter files of one spec, targets and base into one; see `combine`. It is computed in float64.

    Trained heads are averaged by the same weights, which then must add up to 1: where a head began is in no file. Whole
    numbers in them, and what else the first file says, stay (labels, the name of its base).

    Args:
        files: name for messages, such as the path → contents, as `unilora_core.read_adapter` returns them.

    Raises:
        SpecError: the map is not linear.
        MismatchError: the files differ in spec, targets, base, labels or heads; the error has both names, and what
            differs. Or in what the method keeps.
        ValuesError: there is no file, the weights are not finite numbers, one for each, or there are heads and the
            weights do not add up to 1.
    """
    weights = checked_weights(len(files), weights, "combine")
    (where, first), *others = files.items()
    header = read_header(where, first)
    for name, file in others:
        _check_alike(where, first, header, name, file)
    if heads := [name for name in first.tensors if not name.startswith(FROZEN)]:
        averages(weights, f"combine: {where}", heads)
    theta_d = combine(first.spec, [file.theta_d.astype(np.float64) for file in files.values()], weights)
    tensors = {name: _mean(name, list(files.values()), weights) for name in first.tensors}
    return dataclasses.replace(first, theta_d=theta_d.astype(np.float32), tensors=tensors)


def weighted(arrays: Sequence[Array], weights: Iterable[float]) -> Array:
    """Compute Σ w_k x_k."""
    first, *others = (weight * array for weight, array in zip(weights, arrays, strict=True))
    return sum(others, start=first)


def checked_weights(count: int, weights: Iterable[float] | None, what: str) -> tuple[float, ...]:
    """Return one weight for each of ``count`` adapters, 1/n unless given.

    Raises:
        ValuesError: there are none, or other numbers of them, or one is not finite.
    """
    if not count:
        raise ValuesError(f"{what}: expected at least one adapter, got none.")
    found = [1 / count] * count if weights is None else list(weights)
    if len(found) != count or not all(isinstance(each, Real) and math.isfinite(each) for each in found):
        raise ValuesError(f"{what}: expected {count} finite weights, one for each adapter, got {found}.")
    return tuple(map(float, found))


def averages(weights: Iterable[float], where: str, heads: Sequence[str]) -> None:
    """Refuse weights of heads that do not add up to 1.

    Raises:
        ValuesError: they do not.
    """
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        raise ValuesError(
            f"{where} holds a trained head ({', '.join(heads[:4])}), and weights that add up to {total:g}; a head can "
            "only be averaged, since no file says where its training began. Give weights that add up to 1, or combine "
            "adapters that were trained with modules_to_save=()."
        )


def _check_alike(where: str, first: AdapterFile, header: Header, name: str, file: AdapterFile) -> None:
    """Refuse a second file that differs from the first in what a sum needs alike."""
    other, what = read_header(name, file), f"combine: {where} and {name}"
    if file.spec != first.spec:
        raise MismatchError(f"{what} have different specs: {_different(first.spec, file.spec)}; {SAME}")
    if other.targets != header.targets:
        raise MismatchError(f"{what} adapt other layers, or other rows of them, by factors of one name; {SAME}")
    if header.base and other.base and (how := difference(header.base, other.base)):
        raise MismatchError(
            f"{what} were made for other bases, {name_of(header.base)} and {name_of(other.base)}: of the first, {how}; "
            "train both on one base."
        )
    shapes, theirs = ({key: (a.shape, str(a.dtype)) for key, a in each.tensors.items()} for each in (first, file))
    if shapes != theirs:
        differ = sorted({key for key, _ in shapes.items() ^ theirs.items()})
        raise MismatchError(f"{what} hold other heads: {', '.join(differ[:4])} is missing in one, or of another shape.")
    if header.labels != other.labels:
        raise MismatchError(f"{what} have heads for other labels, {header.labels} and {other.labels}.")


SAME = "train both from one start: one model, targets, rank, d, seed and method."


def _different(ours: ProjectionSpec, theirs: ProjectionSpec) -> str:
    """Return what differs in words."""
    a, b = ours.to_json(), theirs.to_json()
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return ", ".join("the layout" if key == "layout" else f"{key} = {a.get(key)!r} and {b.get(key)!r}" for key in keys)


def _mean(name: str, files: Sequence[AdapterFile], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted mean of a tensor; of whole numbers the first, such as the batches that a norm has counted.

    Raises:
        MismatchError: what a method keeps beside θ_d differs.
    """
    arrays = [file.tensors[name] for file in files]
    first = arrays[0]
    if name.startswith(FROZEN):
        if any(not np.array_equal(first, array) for array in arrays):
            raise MismatchError(
                f"combine: expected the same {name} in every file, as it cannot be averaged; the files differ, so "
                "these adapters do not fit together."
            )
        return first
    if first.dtype.kind in "biu":
        return first
    return weighted([array.astype(np.float64) for array in arrays], weights).astype(first.dtype)
