"""attach, load: put one vector beside a model."""

import os
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from unilora_core import (
    AdapterFile,
    Layout,
    MismatchError,
    ProjectionSpec,
    TargetError,
    read_adapter,
)
from unilora_core.header import read_header
from unilora_core.lora import lora_layout
from unilora_core.rates import planned_spec
from unilora_torch import base
from unilora_torch.adapter import NAME, Adapter, adapters, check_name
from unilora_torch.checks import check_parameter, check_targets
from unilora_torch.heads import check_apart, check_heads, head_state, submodule
from unilora_torch.targets import Target, features, find_targets, target_of

__all__ = ["attach", "check_fits", "contents", "layout_of", "load", "swap", "tensors_of"]


def attach(
    model: nn.Module,
    targets: str | Iterable[str | Target] = "all-linear",
    *,
    exclude: str | Iterable[str] = (),
    rank: int = 4,
    d: int | Literal["auto"] = "auto",
    seed: int = 0,
    grouping: str = "balanced",
    start: str = "identity",
    bound: float | None = None,
    modules_to_save: Iterable[str] = (),
    name: str = NAME,
) -> Adapter:
    """Freeze a model and put one trainable vector beside its linear layers.

    A model can carry several adapters under different names: their updates add up, and the latest trains; `switch`
    chooses.

    Args:
        model: any module; changed in place. Its outputs change by B·A·x at each target, its `state_dict` gains
            ``unilora.theta_d``.
        targets: ``"all-linear"``, a regular expression for whole names, a list of names or endings (see
            `find_targets`), or a list of `Target`.
        exclude: taken away from ``targets``, by regular expression or list.
        rank: r of every target.
        d: the number of trained values, or ``"auto"``: D/16.
        seed: fixes P and θ_d⁰.
        grouping: ``"balanced"``, ``"iid"`` or ``"numpy-shuffle"``; see `unilora_core.ProjectionSpec`.
        start: ``"identity"`` (the adapted model starts as the base) or ``"paper"`` (θ_D = P θ_d, U(-0.02, 0.02)).
        bound: of θ_d⁰; by default 0.02 for the paper's start, and as large as LoRA's A for the identity.
        modules_to_save: names of modules that train in full, such as ``("classifier",)``.
        name: the adapter's name among the model's submodules.

    Returns:
        The adapter, also found at ``model.unilora``.

    Raises:
        TargetError: nothing to adapt, something that cannot be adapted rightly, or a name that is taken; the model is
            unchanged.
        SpecError: rank or d out of range; the model is unchanged.
    """
    check_name(model, name)
    modules_to_save = (modules_to_save,) if isinstance(modules_to_save, str) else tuple(modules_to_save)
    found = _resolve(model, targets, exclude, modules_to_save)
    spec = planned_spec(layout_of(found, rank), d, seed, grouping, start, bound)
    return _install(model, spec, found, modules_to_save, name)


def load(model: nn.Module, path: str | os.PathLike, *, name: str = NAME, check_base: bool = True) -> Adapter:
    """Read an adapter file and attach it to its base model, under ``name``.

    The file names its targets, so the order in which the model registers its layers does not matter.

    Args:
        check_base: refuse a base with other values than the one that the file was made for (any dtype and any
            quantisation of it will do); files of other backends do not say.

    Raises:
        AdapterFileError: the file is damaged or of an unknown version (see `unilora_core.read_adapter`).
        MismatchError: the file belongs to another model; the message names the module, expected and found.
        TargetError: a layer that cannot be adapted rightly. In each case the model is unchanged.
    """
    check_name(model, name)
    file = read_adapter(path)
    targets, modules_to_save = contents(path, file, model)
    for target in targets:
        check_fits(path, model, target)
    stored = tensors_of(file)
    heads = {module: head_state(path, model, module, stored) for module in modules_to_save}
    check_heads(model, modules_to_save)
    check_targets(model, targets)
    if check_base:
        base.check_base(str(path), file.metadata, base.identity(model, (*modules_to_save, *adapters(model))))
    adapter = _install(model, file.spec, targets, modules_to_save, name)
    _fill(adapter, file, heads)
    return adapter


def swap(adapter: Adapter, path: str | os.PathLike) -> None:
    """Put the adapter of a file in the place of an attached one.

    θ_d, P and the saved modules are overwritten where they are, so that a compiled model is not compiled again and an
    optimiser keeps its parameters (but not its state's meaning).

    Raises:
        AdapterFileError: as `load`.
        MismatchError: the file has other targets, ranks, modules to save, another d or another start: `detach` this one
            and `load` that one. In each case nothing has changed.
        TargetError: the adapter is merged.
    """
    if adapter.merged:
        raise TargetError("swap: the adapter is merged; unmerge it first.")
    file, mine = read_adapter(path), adapter.spec
    targets, modules_to_save = contents(path, file, adapter._root[0])
    kept = {
        "targets": (targets == adapter.targets, len(targets), len(adapter.targets)),
        "layout": (file.spec.layout == mine.layout, file.spec.D, mine.D),
        "modules_to_save": (modules_to_save == adapter.modules_to_save, modules_to_save, adapter.modules_to_save),
        "d": (file.spec.d == mine.d, file.spec.d, mine.d),
        "start": (file.spec.start == mine.start, file.spec.start, mine.start),
    }
    for what, (same, theirs, ours) in kept.items():
        if not same:
            raise MismatchError(
                f"{path}: swap expects the same {what} as the attached adapter's ({ours}), the file has {theirs}; "
                "detach the adapter and load the file instead."
            )
    base.check_base(str(path), file.metadata, adapter.base)
    stored = tensors_of(file)
    heads = {module: head_state(path, adapter._root[0], module, stored) for module in modules_to_save}
    adapter.reseed(file.spec)
    _fill(adapter, file, heads)


def layout_of(targets: Iterable[Target], rank: int) -> Layout:
    """``name.A`` (r, in) and ``name.B`` (out, r) of each target, in order.

    Raises:
        SpecError: rank < 1.
    """
    layers = ((target.name, target.in_features, target.out_features, target.experts) for target in targets)
    return lora_layout(layers, rank)


def _resolve(
    model: nn.Module,
    targets: str | Iterable[str | Target],
    exclude: str | Iterable[str],
    modules_to_save: tuple[str, ...],
) -> tuple[Target, ...]:
    for name in modules_to_save:
        submodule(model, name, "modules_to_save", TargetError)
    check_heads(model, modules_to_save)
    chosen = find_targets(model, targets, exclude=exclude)
    inside = tuple(f"{name}." for name in modules_to_save)
    kept = tuple(target for target in chosen if not f"{target.module}.".startswith(inside or ("\0",)))
    if not kept:
        raise TargetError(f"every target lies inside modules_to_save = {modules_to_save}; nothing is left to adapt.")
    check_targets(model, kept)
    return kept


def _fill(adapter: Adapter, file: AdapterFile, heads: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        adapter.theta_d.copy_(torch.from_numpy(file.theta_d))
    for module, state in heads.items():
        adapter._root[0].get_submodule(module).load_state_dict(state)


def _install(
    model: nn.Module, spec: ProjectionSpec, targets: tuple[Target, ...], modules_to_save: tuple[str, ...], name: str
) -> Adapter:
    acting = {other: adapter.modules_to_save for other, adapter in adapters(model).items() if adapter.enabled}
    check_apart(acting | {name: modules_to_save})
    adapter = Adapter(model, spec, targets, modules_to_save)
    model.requires_grad_(False)
    for module in modules_to_save:
        model.get_submodule(module).requires_grad_(True)
    model.add_module(name, adapter)
    return adapter


def contents(
    path: str | os.PathLike, file: AdapterFile, model: nn.Module
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The targets and the modules to save that a file names, as this model stores its weights."""
    header = read_header(path, file)
    targets = tuple(target_of(row, submodule(model, row.module, str(path))) for row in header.targets)
    return targets, header.modules_to_save


def tensors_of(file: AdapterFile) -> dict[str, torch.Tensor]:
    """The extra tensors of a file, by name."""
    return {name: torch.from_numpy(array) for name, array in file.tensors.items()}


def check_fits(path: str | os.PathLike, model: nn.Module, target: Target) -> None:
    """Refuse a model without the layer that a file names, or with one of other widths.

    Raises:
        MismatchError: expected and found, by name.
    """
    module = submodule(model, target.module, str(path))
    if target.parameter is not None:
        try:
            check_parameter(module, target)
        except TargetError as error:
            raise MismatchError(f"{path}: {error}") from error
        return
    width, height = features(module, target.transposed)
    if not width:
        raise MismatchError(f"{path}: {target.module} should be a linear layer, the model has {type(module).__name__}.")
    if width != target.in_features or height < target.first_row + target.out_features:
        raise MismatchError(
            f"{path}: {target.module}: expected a layer of {target.in_features} inputs and at least "
            f"{target.first_row + target.out_features} outputs, the model has {width} and {height}; "
            "the adapter was trained on another model."
        )
