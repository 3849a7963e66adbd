"""A file that is matched with a tree of parameters: each row belongs to a leaf, or to a layer of a stacked leaf."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from unilora_core import MismatchError, TargetError
from unilora_core.header import TargetRow
from unilora_core.lora import BLOCKS, check_rank, largest_rank
from unilora_core.schema import shown
from unilora_jax.fitting import check_fits
from unilora_jax.targets import TABLE, WEIGHTS, Target, leaves_of, linear_target, nearest, readings_of

__all__ = ["Tree", "short", "targets_for", "tree_of"]


class Tree(NamedTuple):
    """A tree of parameters, in which the layers of a file are looked up.

    Attributes:
        where: the file, for messages.
        leaves: the leaves by path.
        rename: a function from a layer's name in the file to its name here.
        stacked: as in `plan`.
        known: name of each layer → what its weight can be, and which layer of the stack it is.
    """

    where: str | os.PathLike
    leaves: dict[str, Any]
    rename: Callable[[str], str]
    stacked: str
    known: dict[str, list[tuple[Target, int]]]


def tree_of(where: str | os.PathLike, params: Any, rename: Callable[[str], str], stacked: str) -> Tree:
    """Return all that can be adapted in a tree, by the layer that it belongs to."""
    known: dict[str, list[tuple[Target, int]]] = {}
    leaves = leaves_of(params)
    for weight in readings_of(params, leaves, stacked):
        for i, name in enumerate(weight.names):
            known.setdefault(name, []).append((weight, i))
    return Tree(where, leaves, rename, stacked, known)


def targets_for(tree: Tree, rows: tuple[TargetRow, ...], usual: int | None) -> tuple[Target, ...]:
    """Make the targets of the rows of a file in this tree.

    Args:
        usual: the rank that is accepted in layers of any width; None for ranks of any size.

    Raises:
        MismatchError: the file belongs to another model; the error names the leaf, and what was expected and found.
    """
    found: dict[tuple[str, int], tuple[Target, dict[int, TargetRow]]] = {}
    ranks: Counter[tuple[str, int]] = Counter()
    for row in rows:
        weight, layer = _place_of(tree, row)
        ranks[weight.path, layer] += row.rank
        if usual is not None:
            _check_rank(tree.where, row, weight, ranks[weight.path, layer], usual)
        members = found.setdefault((weight.path, row.first_row), (weight, {}))[1]
        if layer in members:
            raise MismatchError(
                f"{tree.where}: {short(members[layer].name)} and {short(row.name)} both belong to the layer "
                f"{weight.names[layer]!r}."
            )
        members[layer] = row
    targets = tuple(_stack_of(tree.where, weight, members) for weight, members in found.values())
    try:
        check_fits(tree.leaves, targets)
    except TargetError as error:
        raise MismatchError(f"{tree.where}: {error}") from error
    return targets


def _place_of(tree: Tree, row: TargetRow) -> tuple[Target, int]:
    """Return the weight of the layer that a row of the file belongs to and fits, and which layer of a stack it is."""
    if row.parameter is not None or row.experts:
        raise MismatchError(
            f"{tree.where}: {short(row.name)} adapts the parameter {shown(row.parameter)} of a PyTorch module (the "
            "experts of a mixture, for example); the JAX backend reads adapters of layers only."
        )
    weights = _weights_of(tree, tree.rename(row.module))
    weight, layer = next((each for each in weights if _fits(row, each[0])), weights[0])
    if row.first_row < 0:
        raise MismatchError(
            f"{tree.where}: {weight.path}: expected a first row from 0 on, the file has {row.first_row}."
        )
    if not _fits(row, weight):
        raise MismatchError(
            f"{tree.where}: {weight.path}: expected a layer of {row.in_features} inputs and at least "
            f"{row.first_row + row.out_features} outputs, the tree has {weight.in_features} and {weight.out_features}; "
            "the adapter was trained on another model."
        )
    return weight, layer


def _fits(row: TargetRow, weight: Target) -> bool:
    return row.in_features == weight.in_features and row.first_row + row.out_features <= weight.out_features


def _weights_of(tree: Tree, name: str) -> list[tuple[Target, int]]:
    """Return what the weight of a layer can be, with the number of the layer in its stack."""
    if name not in tree.known:
        _check_layer(tree, name)
        raise MismatchError(
            f"{tree.where}: the tree has no matrix for the layer {shown(name)}; the nearest are "
            f"{nearest(tree.known, name)}. If it has another name here, say so: load(…, rename=…)."
        )
    first, *others = dict.fromkeys(weight.path for weight, _ in tree.known[name])
    if others:
        raise MismatchError(f"{tree.where}: {first} and {others[0]} both are the layer {name!r}; rename one.")
    return tree.known[name]


def _check_layer(tree: Tree, name: str) -> None:
    """Raise an error that says what is wrong with the weight of a layer that is there, but cannot be adapted."""
    for path, leaf in tree.leaves.items():
        if path.replace("/", ".") in (name, *(f"{name}.{last}" for last in (*WEIGHTS, TABLE))):
            linear_target(path, leaf, stacked=tree.stacked)


def _check_rank(where: str | os.PathLike, row: TargetRow, weight: Target, total: int, usual: int) -> None:
    """Check a rank, and the sum of the ranks of a layer's blocks so far, against the layer."""
    check_rank(where, short(row.name), row.rank, row.in_features, row.out_features, usual)
    if total > (most := BLOCKS * largest_rank(weight.in_features, weight.out_features, usual)):
        raise MismatchError(
            f"{where}: {weight.path}: expected blocks whose ranks add up to at most {most}, those in the file add up "
            f"to {total} and more; if that is meant, and there is memory for it, say any_rank=True (--any-rank of the "
            "command)."
        )


def _stack_of(where: str | os.PathLike, weight: Target, rows: dict[int, TargetRow]) -> Target:
    """Make one `Target` of the rows of a leaf: of one row, or of one for each of its layers."""
    shapes = {(row.rank, row.out_features) for row in rows.values()}
    if len(rows) < len(weight.names) or len(shapes) > 1:
        raise MismatchError(
            f"{where}: {weight.path} is a stack of {len(weight.names)} layers; expected factors of one shape for each, "
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


def short(name: str) -> str:
    """Return a name from a file as text for a message."""
    return shown(name)[1:-1]
