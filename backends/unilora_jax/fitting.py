"""Checks of targets against the leaves that they belong to."""

import math
from collections.abc import Mapping
from typing import Any

from unilora_core import TargetError
from unilora_core.selecting import check_apart
from unilora_jax.targets import Target, check_leaf, nearest

__all__ = ["check_fits"]


def check_fits(leaves: Mapping[str, Any], targets: tuple[Target, ...]) -> None:
    """Refuse targets that are not among the leaves, that do not fit their leaf, or that overlap.

    Raises:
        TargetError: there is such a target; the error has the path, what the target expects, and what the leaf is.
    """
    for target in targets:
        if target.path not in leaves:
            raise TargetError(f"{target.path}: no such leaf; the nearest are {nearest(leaves, target.path)}.")
        check_leaf(target.path, leaves[target.path])
        _check_leaf_of(target, tuple(leaves[target.path].shape))
    _check_apart(targets)


def _check_leaf_of(target: Target, shape: tuple[int, ...]) -> None:
    matrix, end = range(target.stacked, len(shape)), target.first_row + target.out_features
    width = math.prod(shape[axis] for axis in matrix if axis in target.inputs)
    height = math.prod(shape[axis] for axis in matrix if axis not in target.inputs)
    layers = shape[0] if target.stacked and shape else 1
    if (
        not set(target.inputs) < set(matrix)
        or len(set(target.inputs)) < len(target.inputs)
        or (len(target.names), len(target.modules), target.in_features) != (layers, layers, width)
        or not 0 <= target.first_row < end <= height
    ):
        raise TargetError(
            f"{target.path}: the target expects {len(target.names)} × {target.in_features} inputs at the axes "
            f"{target.inputs} and the outputs {target.first_row} to {end}; the leaf {shape} has "
            f"{layers} × {width} inputs and {height} outputs."
        )


def _read(target: Target) -> tuple:
    return target.inputs, target.stacked, target.table


def _check_apart(targets: tuple[Target, ...]) -> None:
    """Refuse targets that overlap, or that read one leaf in two ways."""
    by_path: dict[str, list[Target]] = {}
    for target in targets:
        parts = by_path.setdefault(target.path, [])
        parts.append(target)
        if _read(parts[0]) != _read(target):
            raise TargetError(
                f"{target.path}: expected targets that read it in one way, but {target.names[0]} and "
                f"{parts[0].names[0]} take different axes for its inputs; give both the same inputs=(…)."
            )
    for path, parts in by_path.items():
        check_apart(path, ((part.names[0], part.first_row, part.out_features) for part in parts))
