"""Maps whose rows have one entry each, so that P is a gather: θ_D[i] = (θ_d·s)[g(i)], s_j = 1/√n_j.

Scaling θ_d first gives the same bits as scaling θ_D, D/d times cheaper. Pᵀ is a scatter-add, which the Array API
standard lacks (2025.12), so `scatter_add` names its source in each namespace.
Source: Uni-LoRA (arXiv 2506.00799), section 3, and its ablations: each target has columns of its own (not global), each
kind of factor has columns of its own (not uniform), columns are not divided by √n_j (not isometric).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import ModuleType

import numpy as np

from unilora_core import grouping
from unilora_core._namespace import Array, array_namespace, device, is_jax_array, is_torch_array, standard
from unilora_core.errors import SpecError, ValuesError
from unilora_core.layout import Layout
from unilora_core.maps.mapping import FIRST_D, Frozen, Instance, Map, Options
from unilora_core.schema import shown

__all__ = ["GATHERS", "IDENTITY", "Class", "carried", "problem_of", "scale", "scatter_add", "sixteenth", "theta_rate"]

RATIO = 16
"""The default D/d: θ_d has a sixteenth of LoRA's parameters."""

SHRUNK = 2**12
"""The largest ratio of the first d to d: θ_d⁰ of the first d is drawn, and a file of few numbers must not ask for any
number of them."""

Groups = Callable[[Instance, int, int, ModuleType, object], Array]
Counts = Callable[[Instance], np.ndarray]
Split = Callable[[Iterable[str]], list[list[str]]]
"""A function from names of factors to classes of them."""


def sixteenth(layout: Layout, _options: Options) -> int:
    """Return the d of ``d="auto"``."""
    return max(1, round(layout.size / RATIO))


def theta_rate(of: Instance) -> float:
    """Return (D/d)^¾, between √(D/d), by which entries move, and D/d, by which the loss falls. The evidence is in
    docs/method.md.
    """
    return (of.D / of.d) ** 0.75


def scale(counts: np.ndarray, xp: ModuleType, where: object = None, dtype: object = None) -> Array:
    """Return 1/√n_j: (d,), computed in float64, rounded once to ``dtype`` (default float32); 1 for an empty group."""
    xp = standard(xp)
    exact = np.sqrt(np.maximum(counts, 1), dtype=np.float64)
    np.divide(1, exact, out=exact)  # of millions of groups each fresh array costs more than the arithmetic
    narrow = exact if dtype == xp.float64 else exact.astype(np.float32)
    return xp.asarray(narrow, dtype=dtype or xp.float32, device=where)


def scatter_add(y: Array, groups: Array, d: int, xp: ModuleType) -> Array:
    """Sum y over each group: (d,).

    PyTorch: `index_add_` (in order on the CPU; atomic on CUDA unless `torch.use_deterministic_algorithms(True)`).
    JAX: `.at[].add`, XLA's scatter. NumPy and every other namespace: `numpy.bincount` on the host, in order of
    position, summed in float64.

    Raises:
        ValuesError: NumPy cannot read the arrays of this namespace.
    """
    if is_torch_array(y):
        return xp.zeros(d, dtype=y.dtype, device=device(y)).index_add(0, groups, y)
    if is_jax_array(y):
        return xp.zeros(d, dtype=y.dtype).at[groups].add(y)
    host = np.bincount(_on_host(groups), _on_host(y), minlength=d)
    return xp.asarray(host, dtype=y.dtype, device=device(y))


def _on_host(x: Array) -> np.ndarray:
    why = "NumPy sees no numbers in them"
    try:
        host = np.asarray(x)
        if host.shape == tuple(x.shape) and host.dtype.kind in "fiu":
            return host
    except Exception as error:  # each library raises its own error
        why = f"{type(error).__name__}: {error}"
    raise ValuesError(
        f"project_transpose: arrays of {type(x).__module__.partition('.')[0]} do not become NumPy arrays ({why}), and "
        "the Array API has no scatter-add; bring one, by project_transpose= of a unilora_core.testing.Backend, or "
        "differentiate project."
    )


def carried(x: Array, before: np.ndarray, after: np.ndarray, power: int = 1) -> Array:
    """Carry x, a number for each group, to groups that were split, or were joined again: g mod d is kept.

    Args:
        x: (d,) float32 or float64, any namespace.
        before, after: the n_j, (d,) and (d′,) int64, NumPy, none 0; one length is a multiple of the other.
        power: 1 for what is linear in θ_d: a split copies it, times √(n′/n), so that θ_D stays; joining is the least
            squares fit, which undoes a split. 2 for mean squares of such numbers: a split copies them, since a
            gradient's entry under P has the same mean square whatever d; joining is the mean, by n.

    Returns:
        (d′,), in the namespace, dtype and device of ``x``.
    """
    longer, shorter = (after, before) if len(after) > len(before) else (before, after)
    parts = len(longer) // len(shorter)
    xp, share = array_namespace(x), longer / np.tile(shorter, parts)
    weight = np.sqrt(share) if power == 1 else share
    weights = xp.asarray(weight if x.dtype == xp.float64 else weight.astype(np.float32), device=device(x))
    if longer is after:
        copies = xp.tile(x, (parts,))
        return copies * weights if power == 1 else copies
    return xp.sum(xp.reshape(x * weights, (parts, -1)), axis=0)


def _frozen(of: Instance, xp: ModuleType, where: object, *, groups: Groups, counts: Counts) -> Frozen:
    """Return g (D,) int32, and n_j (d,) in NumPy, of which each dtype makes its own scale."""
    return groups(of, 0, of.D, xp, where), counts(of)


def _project(_of: Instance, theta: Array, frozen: Frozen, start: int, stop: int) -> Array:
    groups, counts = frozen
    xp = array_namespace(theta)
    return xp.take(theta * scale(counts, xp, device(theta), theta.dtype), groups[start:stop], axis=0)


def _transpose(of: Instance, y: Array, frozen: Frozen, start: int) -> Array:
    groups, counts = frozen
    xp = array_namespace(y)
    summed = scatter_add(y, groups[start : start + y.shape[0]], of.d, xp)
    return summed * scale(counts, xp, device(y), y.dtype)


def _sorted_members(
    of: Instance, start: int, stop: int, xp: ModuleType, where: object, *, groups: Groups, counts: Counts
) -> tuple[Array, Array]:
    """Return the members of each group by one stable sort of all D groups, which is kept."""
    ends = np.concatenate([[0], np.cumsum(counts(of))])[start : stop + 1]
    positions = _ordered(of, groups)[ends[0] : ends[-1]].copy()  # what is kept is not given away
    xp = standard(xp)
    dtype = grouping.wide(of.D, xp)
    return tuple(xp.asarray(part, dtype=dtype, device=where) for part in (ends - ends[0], positions))


@lru_cache(maxsize=2)
def _ordered(of: Instance, groups: Groups) -> np.ndarray:
    """Return all D positions in order of their groups."""
    return np.argsort(groups(of, 0, of.D, np, None), kind="stable").astype(grouping.wide(of.D, np))


# ---- one grouping for all positions: the grouping module's algorithms ------------------------------------------------


def problem_of(of: Instance) -> grouping.Problem:
    """Return what one grouping for all positions depends on."""
    first_d = of.chosen.get(FIRST_D)
    return grouping.Problem(of.D, of.d, of.seed, None if first_d is None else int(first_d))


def _check_d(of: Instance) -> None:
    if not 1 <= of.d <= min(of.D, grouping.MAX_d):
        raise SpecError(
            f"ProjectionSpec: expected 1 ≤ d ≤ min(D, 2^31), got d = {shown(of.d)} with D = {of.D}; "
            "d is the number of trained values, the default is a sixteenth of the numbers of LoRA at rank 4."
        )


def _check_nested(of: Instance) -> None:
    _check_d(of)
    first_d = of.chosen.get(FIRST_D)
    if first_d is None:
        return
    nested = of.d != first_d and 0 in (of.d % first_d, first_d % of.d)
    if not (nested and first_d <= min(of.D, grouping.MAX_d, SHRUNK * of.d)):
        raise SpecError(
            f"ProjectionSpec: {FIRST_D} is the d with which training began: expected a divisor or multiple of d, not d "
            f"itself, at most min(D, 2^31) and at most {SHRUNK} times d; got {FIRST_D} = {shown(first_d)} with "
            f"d = {of.d} and D = {of.D}."
        )


def _check_shuffle(of: Instance) -> None:
    _check_d(of)
    if of.D > grouping.WORD:
        raise SpecError(f"ProjectionSpec: numpy-shuffle shuffles all D positions; D = {of.D} is more than 2^31.")


def _gather(version: int, groups: Groups, counts: Counts, check: Callable[[Instance], None], weighs: Counts) -> Map:
    """Make the map of a gather; ``weighs`` gives what takes the place of n_j in 1/√n_j."""
    return Map(
        version=version,
        width=sixteenth,
        check=check,
        frozen=partial(_frozen, groups=groups, counts=weighs),
        project=_project,
        transpose=_transpose,
        rate=theta_rate,
        source="Uni-LoRA (arXiv 2506.00799)",
        groups=groups,
        counts=counts,
        weighs=weighs,
        members=partial(_sorted_members, groups=groups, counts=counts),
        exact=True,
    )


def _whole(name: str) -> Map:
    def groups(of: Instance, start: int, stop: int, xp: ModuleType, where: object) -> Array:
        return grouping.groups(name, problem_of(of), start, stop, xp, where)

    def counts(of: Instance) -> np.ndarray:
        return grouping.counts(name, problem_of(of))

    check = _check_shuffle if name == "numpy-shuffle" else _check_d
    return _gather(grouping.ALGORITHMS[name].version, groups, counts, check, counts)


# ---- ablations: classes of factors, each with columns of its own -----------------------------------------------------


@dataclass(frozen=True)
class Class:
    """A class of factors that share columns: `balanced` numbers their positions one after the other.

    Attributes:
        slices: its slices of θ_D, in order.
        first: its first column.
        problem: the grouping of its positions into its columns.
    """

    slices: tuple[slice, ...]
    first: int
    problem: grouping.Problem


def _by_target(names: Iterable[str]) -> list[list[str]]:
    return _by(names, lambda name: name.rpartition(".")[0])


def _by_piece(names: Iterable[str]) -> list[list[str]]:
    return _by(names, lambda name: name.rpartition(".")[2])


def _by(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return list(found.values())


def _classes(of: Instance, split: Split, even: bool) -> tuple[Class, ...]:
    """Return the classes, with columns in proportion to their positions (``even``), or to 1, 2, …, which is uneven."""
    return _cached_classes(of.layout, of.d, of.seed, split, even)


@lru_cache(maxsize=8)
def _cached_classes(layout: Layout, d: int, seed: int, split: Callable, even: bool) -> tuple[Class, ...]:
    classes = split(layout.shapes)
    slices = [tuple(layout.slices[name] for name in names) for names in classes]
    sizes = [sum(at.stop - at.start for at in each) for each in slices]
    shares = np.cumsum(sizes if even else range(1, len(sizes) + 1))
    ends = [round(d * int(share) / int(shares[-1])) for share in shares]
    found = []
    for k, (mine, size, first, end) in enumerate(zip(slices, sizes, [0, *ends], ends, strict=False)):
        if not 1 <= end - first <= min(size, grouping.MAX_d):
            raise SpecError(
                f"ProjectionSpec: this grouping gives {end - first} of d = {d} columns to {classes[k][0]!r} and those "
                f"like it, expected 1 to {size}: they have {size} numbers. Take another d, or the grouping 'balanced'."
            )
        found.append(Class(mine, first, grouping.Problem(size, end - first, _derived(seed, k))))
    return tuple(found)


def _derived(seed: int, k: int) -> int:
    return int.from_bytes(hashlib.sha256(f"unilora/class/1 seed={seed} class={k}".encode()).digest()[:8], "little")


def _class_groups(of: Instance, start: int, stop: int, xp: ModuleType, where: object, classes: Callable) -> Array:
    """Compute the groups piece by piece, one for each slice that start … stop-1 meets, in order of position."""
    parts = []
    for each in classes(of):
        done = 0
        for at in each.slices:
            low, high = max(start, at.start), min(stop, at.stop)
            if low < high:
                mine = (done + low - at.start, done + high - at.start)
                parts.append((low, grouping.groups("balanced", each.problem, *mine, xp, where) + each.first))
            done += at.stop - at.start
    xp = standard(xp)
    ordered = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    return xp.concat(ordered) if ordered else xp.zeros(0, dtype=xp.int32, device=where)


def _class_counts(of: Instance, classes: Callable) -> np.ndarray:
    return np.concatenate([grouping.counts("balanced", each.problem) for each in classes(of)])


def _in_classes(split: Split, even: bool) -> Map:
    def classes(of: Instance) -> Sequence[Class]:
        return _classes(of, split, even)

    def check(of: Instance) -> None:
        _check_d(of)
        classes(of)

    counts = partial(_class_counts, classes=classes)
    return _gather(1, partial(_class_groups, classes=classes), counts, check, counts)


def _unnormalised() -> Map:
    balanced = GATHERS["balanced"]
    assert balanced.groups is not None
    assert balanced.counts is not None
    return _gather(1, balanced.groups, balanced.counts, balanced.check, lambda of: np.ones(of.d, np.int64))


GATHERS: dict[str, Map] = {name: _whole(name) for name in grouping.ALGORITHMS}
GATHERS |= {"local": _in_classes(_by_target, even=True), "by-factor": _in_classes(_by_piece, even=False)}
GATHERS["unnormalised"] = _unnormalised()
GATHERS |= {
    name: replace(GATHERS[name], members=lambda of, *where: grouping.members(problem_of(of), *where))
    for name in ("balanced", "unnormalised")
}
GATHERS["balanced"] = replace(GATHERS["balanced"], check=_check_nested, nests=2)


# ---- identity: θ_D = θ_d ---------------------------------------------------------------------------------------------


def _check_identity(of: Instance) -> None:
    if of.d != of.D:
        raise SpecError(f"ProjectionSpec: with the grouping 'identity' d is D = {of.D}, got d = {shown(of.d)}.")
    if of.d > grouping.MAX_d:
        raise SpecError(f"ProjectionSpec: with the grouping 'identity' D is at most 2^31, got {of.D}.")


def _placed(of: Instance, y: Array, _: Frozen, start: int) -> Array:
    xp = array_namespace(y)
    after = of.D - start - y.shape[0]
    around = [xp.zeros(count, dtype=y.dtype, device=device(y)) for count in (start, after)]
    return xp.concat([around[0], y, around[1]]) if start or after else y


IDENTITY = Map(
    version=1,
    width=lambda layout, _: layout.size,
    check=_check_identity,
    frozen=lambda *_: (),
    project=lambda _of, theta, _frozen, start, stop: theta[start:stop],
    transpose=_placed,
    rate=lambda _of: 1.0,
    source="LoRA (arXiv 2106.09685)",
    fixed=True,
    exact=True,
)
