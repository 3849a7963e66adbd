"""plan, load: from a tree of parameters to an `Adapter`."""

import contextlib
import dataclasses
import itertools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from unilora_core import MismatchError, ProjectionSpec, SpecError, TargetError, read_adapter
from unilora_core.errors import printable
from unilora_core.header import TargetRow, read_header
from unilora_core.lora import BLOCKS, check_rank, largest_rank, lora_layout
from unilora_core.rates import planned_spec
from unilora_core.schema import shown
from unilora_jax.adapter import Adapter
from unilora_jax.factors import factors_of
from unilora_jax.targets import (
    STACKED,
    Target,
    check_leaf,
    factor_names,
    find_targets,
    leaves_of,
    linear_target,
    nearest,
)

__all__ = ["load", "plan"]

Groups = Literal["computed", "cached"]


def plan(
    params: Any,
    targets: str | Iterable[str | Target],
    *,
    exclude: str | Iterable[str] = (),
    rank: int = 4,
    d: int | Literal["auto"] = "auto",
    seed: int = 0,
    grouping: str = "balanced",
    start: str = "identity",
    bound: float | None = None,
    stacked: str = STACKED,
    groups: Groups = "computed",
) -> Adapter:
    """Decide how one vector θ_d adapts the matrices of a tree. Nothing is changed, and no parameter is kept.

    Args:
        params: any pytree: dictionaries, Flax Linen parameters, an NNX state or module, an Equinox module. Shapes are
            enough (`jax.eval_shape`).
        targets: a regular expression for whole paths (``".*/(q|v)_proj/kernel"``), or a list of layers
            (``["q_proj", "v_proj"]``), or a list of `Target`; see `find_targets`.
        exclude: taken away from ``targets``, by regular expression or list.
        rank: r of every target.
        d: the number of trained values, or ``"auto"``: D/16.
        seed: fixes P and θ_d⁰.
        grouping: ``"balanced"``, ``"iid"`` or ``"numpy-shuffle"``; see `unilora_core.ProjectionSpec`.
        start: ``"identity"`` (the adapted model starts as the base) or ``"paper"`` (θ_D = P θ_d, U(-0.02, 0.02)).
        bound: of θ_d⁰; by default 0.02 for the paper's start, and as large as LoRA's A for the identity.
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.
        groups: ``"computed"`` inside each compiled step, or ``"cached"`` as int32, 4 bytes per LoRA parameter.

    Raises:
        TargetError: nothing to adapt, or a leaf that cannot be adapted rightly.
        SpecError: rank or d out of range.
    """
    found = find_targets(params, targets, exclude=exclude, stacked=stacked)
    _check_fits(params, found)
    layers = ((name, target.in_features, target.out_features) for target in found for name in target.names)
    spec = planned_spec(lora_layout(layers, rank), d, seed, grouping, start, bound)
    return _adapter(params, spec, found, groups)


def load(
    params: Any,
    path: str | os.PathLike,
    *,
    rename: Callable[[str], str] = str,
    stacked: str = STACKED,
    groups: Groups = "computed",
    any_rank: bool = False,
) -> tuple[Adapter, Array]:
    """Read an adapter file, written here or by another backend, for a tree of parameters.

    The layers are found by name, so the order of the tree does not matter. A warning names what else the file holds (a
    trained head): `unilora_core.read_adapter` gives it.

    Args:
        rename: from a layer's name in the file (``model.layers.0.self_attn.q_proj``) to its path here, joined by dots
            and without ``kernel`` or ``weight`` (``layers.0.self_attn.q_proj``; a stack's number comes after it).
        stacked, groups: as in `plan`.
        any_rank: take factors of a rank beyond min(in, out) (and 64), which need more memory than the weight that they
            adapt.

    Returns:
        The adapter, and θ_d (d,) float32.

    Raises:
        AdapterFileError: the file is damaged or of an unknown version (see `unilora_core.read_adapter`).
        MismatchError: the file belongs to another model; the message names the leaf, expected and found. Nothing of a
            size that the file states is made before it is checked.
    """
    file = read_adapter(path)
    header = read_header(path, file)
    targets = _targets_for(path, params, header.targets, rename, stacked, any_rank)
    try:
        _check_fits(params, targets)
    except TargetError as error:
        raise MismatchError(f"{path}: {error}") from error
    if names := header.modules_to_save or tuple(sorted(file.tensors)):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            printable(f"{path}: the file also holds {', '.join(map(_short, names[:8]))}{more}, trained with ")
            + "θ_d; put unilora_core.read_adapter(path).tensors into the parameters.",
            stacklevel=2,
        )
    return _adapter(params, file.spec, targets, groups), jnp.asarray(file.theta_d)


def _adapter(params: Any, spec: ProjectionSpec, targets: tuple[Target, ...], groups: Groups) -> Adapter:
    if groups not in ("computed", "cached"):
        raise SpecError(f"groups must be 'computed' or 'cached', got {groups!r}.")
    leaves = leaves_of(params)
    shapes = {target.path: tuple(leaves[target.path].shape) for target in targets}
    names = [(factor_names(target, factor), factor == "B") for target in targets for factor in "AB"]
    return Adapter(targets, tuple(shapes.items()), factors_of(spec, names, cached=groups == "cached"))


def _check_fits(params: Any, targets: tuple[Target, ...]) -> None:
    """Refuse targets that are not in the tree, that do not fit their leaf, or that overlap."""
    leaves = leaves_of(params)
    for target in targets:
        if target.path not in leaves:
            raise TargetError(f"{target.path}: no such leaf; the nearest are {nearest(leaves, target.path)}.")
        leaf, end = leaves[target.path], target.first_row + target.out_features
        check_leaf(target.path, leaf)
        matrix = range(target.stacked, leaf.ndim)
        width = math.prod(leaf.shape[axis] for axis in matrix if axis in target.inputs)
        height = math.prod(leaf.shape[axis] for axis in matrix if axis not in target.inputs)
        layers = leaf.shape[0] if target.stacked and leaf.ndim else 1
        if (
            not set(target.inputs) < set(matrix)
            or (len(target.names), len(target.modules), target.in_features) != (layers, layers, width)
            or not 0 <= target.first_row < end <= height
        ):
            raise TargetError(
                f"{target.path}: the target expects {len(target.names)} × {target.in_features} inputs at the axes "
                f"{target.inputs} and the outputs {target.first_row} to {end}; the leaf {tuple(leaf.shape)} has "
                f"{layers} × {width} inputs and {height} outputs."
            )
    _check_apart(targets)


def _check_apart(targets: tuple[Target, ...]) -> None:
    """Refuse targets that overlap, or that read one leaf in two ways."""
    by_path: dict[str, list[Target]] = {}
    for target in targets:
        parts = by_path.setdefault(target.path, [])
        parts.append(target)
        if (parts[0].inputs, parts[0].stacked) != (target.inputs, target.stacked):
            raise TargetError(f"{target.names[0]} and {parts[0].names[0]} contract different axes of {target.path}.")
    for path, parts in by_path.items():
        for above, below in itertools.pairwise(sorted(parts, key=lambda part: part.first_row)):
            if below.first_row < above.first_row + above.out_features:
                raise TargetError(f"{above.names[0]} and {below.names[0]} adapt the same outputs of {path}.")


def _targets_for(
    path: str | os.PathLike,
    params: Any,
    rows: tuple[TargetRow, ...],
    rename: Callable[[str], str],
    stacked: str,
    any_rank: bool,
) -> tuple[Target, ...]:
    """The leaf, or the layer of a stacked leaf, that each row of the file belongs to."""
    known = _weights_by_layer(params, stacked)
    found: dict[tuple[str, int], tuple[Target, dict[int, TargetRow]]] = {}
    ranks: Counter[tuple[str, int]] = Counter()
    for row in rows:
        weight, layer = _place_of(path, params, row, rename, known, stacked)
        ranks[weight.path, layer] += row.rank
        if not any_rank:
            _check_rank(path, row, weight, ranks[weight.path, layer])
        members = found.setdefault((weight.path, row.first_row), (weight, {}))[1]
        if layer in members:
            raise MismatchError(
                f"{path}: {_short(members[layer].name)} and {_short(row.name)} both belong to the layer "
                f"{weight.names[layer]!r}."
            )
        members[layer] = row
    return tuple(_stack_of(path, weight, members) for weight, members in found.values())


def _place_of(
    path: str | os.PathLike,
    params: Any,
    row: TargetRow,
    rename: Callable[[str], str],
    known: dict[str, list[tuple[Target, int]]],
    stacked: str,
) -> tuple[Target, int]:
    """The weight of the layer that a row of the file belongs to and fits, and which layer of a stack it is."""
    if row.parameter is not None:
        raise MismatchError(
            f"{path}: {_short(row.name)} adapts the parameter {shown(row.parameter)} of a PyTorch module (the experts "
            "of a mixture, for example); the JAX backend reads adapters of layers only."
        )
    name = rename(row.module)
    if name not in known:
        _check_layer(params, name, stacked)
        raise MismatchError(
            f"{path}: the tree has no matrix for the layer {shown(name)}; the nearest are {nearest(known, name)}. "
            "If it has another name here, say so: load(…, rename=…)."
        )
    (weight, layer), *others = known[name]
    if others:
        raise MismatchError(f"{path}: {weight.path} and {others[0][0].path} both are the layer {name!r}; rename one.")
    outputs = weight.out_features
    if row.first_row < 0:
        raise MismatchError(f"{path}: {weight.path}: expected a first row from 0 on, the file has {row.first_row}.")
    if row.in_features != weight.in_features or row.first_row + row.out_features > outputs:
        raise MismatchError(
            f"{path}: {weight.path}: expected a layer of {row.in_features} inputs and at least "
            f"{row.first_row + row.out_features} outputs, the tree has {weight.in_features} and {outputs}; the adapter "
            "was trained on another model."
        )
    return weight, layer


def _check_rank(path: str | os.PathLike, row: TargetRow, weight: Target, total: int) -> None:
    """Hold a rank, and what those of a layer's blocks add up to so far, against the layer."""
    check_rank(path, _short(row.name), row.rank, row.in_features, row.out_features)
    if total > (most := BLOCKS * largest_rank(weight.in_features, weight.out_features)):
        raise MismatchError(
            f"{path}: {weight.path}: expected blocks whose ranks add up to at most {most}, those in the file add up to "
            f"{total} and more; if that is meant, and there is memory for it, say any_rank=True (--any-rank of the"
            " command)."
        )


def _check_layer(params: Any, name: str, stacked: str) -> None:
    """Say what is wrong with the weight of a layer that is there, but cannot be adapted."""
    for path, leaf in leaves_of(params).items():
        if path.replace("/", ".") in (name, f"{name}.kernel", f"{name}.weight"):
            linear_target(path, leaf, stacked=stacked)


def _weights_by_layer(params: Any, stacked: str) -> dict[str, list[tuple[Target, int]]]:
    """Name of each layer → its weight, and which layer of the stack it is; more than one where names collide."""
    known: dict[str, list[tuple[Target, int]]] = {}
    for path, leaf in leaves_of(params).items():
        with contextlib.suppress(TargetError):  # what is no matrix belongs to no layer
            weight = linear_target(path, leaf, stacked=stacked)
            for i, name in enumerate(weight.names):
                known.setdefault(name, []).append((weight, i))
    return known


def _stack_of(path: str | os.PathLike, weight: Target, rows: dict[int, TargetRow]) -> Target:
    """One `Target` of the rows of a leaf: one, or one for each of its layers."""
    shapes = {(row.rank, row.out_features) for row in rows.values()}
    if len(rows) < len(weight.names) or len(shapes) > 1:
        raise MismatchError(
            f"{path}: {weight.path} is a stack of {len(weight.names)} layers; expected factors of one shape for each, "
            f"the file has {len(rows)} layers with (rank, outputs) {shown(sorted(shapes))}. Unstack the parameters to "
            "load it."
        )
    ordered = [rows[i] for i in range(len(rows))]
    return dataclasses.replace(
        weight,
        names=tuple(row.name for row in ordered),
        modules=tuple(row.module for row in ordered),
        out_features=ordered[0].out_features,
        first_row=ordered[0].first_row,
    )


def _short(name: str) -> str:
    """A name from a file, for a message."""
    return shown(name)[1:-1]
