"""Swapping: another file takes the place of an attached adapter."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from unilora_core import MismatchError, ProjectionSpec, TargetError
from unilora_torch.base import check_base, with_fresh
from unilora_torch.chains import Frozen
from unilora_torch.heads import whole_names
from unilora_torch.opened import Opened, open_file
from unilora_torch.vector import Vector

__all__ = ["fill", "swap"]


def swap(vector: Vector, path: str | os.PathLike) -> None:
    """Put the adapter of a file in the place of an attached one.

    θ_d, P and the saved modules are overwritten where they are, so that a compiled model is not compiled again and an
    optimiser keeps its parameters (but not its state's meaning).

    Raises:
        AdapterFileError: as in `load`.
        MismatchError: the file has other targets, ranks, modules to save, another d or another start: `detach` this one
            and `load` that one. In each case nothing has changed.
        TargetError: the adapter is merged, or another thread is calling the model.
    """
    before, theta_d = vector.spec, vector.theta_d.detach().clone()
    frozen = vector.chains.clones()
    heads = {name: tensor.detach().clone() for name, tensor in vector.heads().items()}
    with vector.alone("swap"):
        try:
            _swap(vector, path)
        except BaseException:
            _undo(vector, before, frozen, theta_d, heads)
            raise


def fill(vector: Vector, found: Opened) -> None:
    """Give an adapter the values of a file: θ_d, and the state of the modules to save."""
    mine = vector.heads()
    with torch.no_grad():
        vector.theta_d.copy_(found.theta_d)
        for name, value in whole_names(found.heads).items():
            mine[name].copy_(value)


def _swap(vector: Vector, path: str | os.PathLike) -> None:
    if vector.live.merged:
        raise TargetError("swap: the adapter is merged; unmerge it first.")
    vector.structure.check("swap")
    found = open_file(path, vector.model, any_rank=True)  # another layout is refused below
    _check_alike(path, vector, found)
    check_base(str(path), found.header.base, with_fresh(vector.base, vector.model, found.fresh))
    vector.reseed(found.spec, found.frozen)
    fill(vector, found)


def _check_alike(path: str | os.PathLike, vector: Vector, found: Opened) -> None:
    mine, heads = vector.spec, found.header.modules_to_save
    kept = {
        "targets": (found.targets == vector.targets, len(found.targets), len(vector.targets)),
        "frame": (found.spec.frame == mine.frame, found.spec.frame, mine.frame),
        "kind of map": (_kind(found.spec) == _kind(mine), found.spec.grouping, mine.grouping),
        "options": (found.spec.first.options == mine.first.options, found.spec.chosen, mine.chosen),
        "layout": (found.spec.layout == mine.layout, found.spec.D, mine.D),
        "modules_to_save": (heads == vector.modules_to_save, heads, vector.modules_to_save),
        "d": (found.spec.d == mine.d, found.spec.d, mine.d),
        "start": (found.spec.start == mine.start, found.spec.start, mine.start),
    }
    for what, (same, theirs, ours) in kept.items():
        if not same:
            raise MismatchError(
                f"{path}: swap expects the same {what} as the attached adapter's ({ours}), the file has {theirs}; "
                "detach the adapter and load the file instead."
            )


def _kind(spec: ProjectionSpec) -> str:
    """Return the kind of projection: gathers of one size have tables of one size; another map has arrays of its own."""
    return "gather" if spec.map.groups is not None else spec.grouping


def _undo(vector: Vector, spec: ProjectionSpec, frozen: Frozen, theta_d: Tensor, heads: Mapping[str, Tensor]) -> None:
    if vector.spec is not spec:
        vector.reseed(spec, frozen)
    with torch.no_grad():
        vector.theta_d.copy_(theta_d)
        for name, tensor in vector.heads().items():
            tensor.copy_(heads[name])
