"""attach and load put one vector beside a model."""

import os
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn
from typing_extensions import Unpack

from unilora_core import Layout, ProjectionSpec, TargetError
from unilora_core.lora import lora_layout
from unilora_core.methods import MethodOptions, plan_spec
from unilora_torch import base
from unilora_torch.adapter import NAME, Adapter, adapters
from unilora_torch.chains import Frozen, sizes_of
from unilora_torch.checks import check_initialised, check_targets
from unilora_torch.heads import check_apart, check_heads, inside, part_of, state_of, submodule
from unilora_torch.opened import open_file
from unilora_torch.options import Groups
from unilora_torch.swapping import fill, swap
from unilora_torch.targets import Target, find_targets, weight_name
from unilora_torch.vector import check_name

__all__ = ["attach", "layout_of", "load", "swap"]


def attach(
    model: nn.Module,
    targets: str | Iterable[str | Target] = "all-linear",
    *,
    exclude: str | Iterable[str] = (),
    method: str = "uni-lora",
    rank: int | Mapping[str, int] | None = None,
    d: int | Literal["auto"] = "auto",
    seed: int = 0,
    grouping: str | None = None,
    start: str | None = None,
    bound: float | None = None,
    modules_to_save: Iterable[str] = (),
    name: str = NAME,
    groups: Groups = "cached",
    **options: Unpack[MethodOptions],
) -> Adapter:
    """Freeze a model and put one trainable vector beside its linear layers.

    A model can carry several adapters under different names: their updates add up, and the latest trains; `switch`
    chooses.

    Args:
        model: any module; changed in place. Its outputs change by B·A·x at each target, its `state_dict` gains
            ``unilora.theta_d``.
        targets: ``"all-linear"``, a regular expression for whole names, a list of names or endings (see
            `find_targets`), or a list of `Target`.
        exclude: the names to remove from ``targets``, as a regular expression or a list.
        method: ``"uni-lora"``, or another of `unilora_core.methods.METHODS`: ``"lora"``, ``"vera"``, ``"lora-xs"``, …
        rank: r of every target, by default the method's, 16 for Uni-LoRA; or a mapping from names of targets, or their
            endings (``{"q_proj": 8, "v_proj": 16}``); the longest name that fits counts.
        d: the number of trained values, or ``"auto"``: a sixteenth of LoRA's at rank 4, or what follows from the
            method.
        seed: the seed of P, of θ_d⁰, and of the frozen random arrays.
        grouping: the map P; by default the method's: ``"balanced"`` for Uni-LoRA. See `unilora_core.ProjectionSpec`.
        start: ``"identity"`` (the adapted model starts as the base) or ``"paper"`` (θ_D = P θ_d, U(-0.02, 0.02)), or
            ``"zero"``; by default the method's.
        bound: the bound of θ_d⁰; by default θ_d⁰ is as large as LoRA's A for the identity start, else the bound is
            0.02.
        modules_to_save: names of modules that train in full, such as ``("classifier",)``, or of single parameters.
        name: the adapter's name among the model's submodules.
        groups: ``"cached"`` keeps the groups as int32, 4 bytes for each LoRA parameter; ``"computed"`` computes them in
            each pass, 0 bytes: on CUDA in Triton's kernels, elsewhere by the core, which takes longer (docs/method.md).
        **options: the options of the method, such as ``vectors=64`` of VB-LoRA; docs/framework.md lists them.

    Returns:
        The adapter, also found at ``model.unilora``.

    Raises:
        TargetError: there is nothing to adapt, something cannot be adapted rightly, or the name is taken; the model is
            unchanged.
        SpecError: a method or an option is unknown, or rank or d is out of range; the model is unchanged.
    """
    check_name(model, name)
    modules_to_save = (modules_to_save,) if isinstance(modules_to_save, str) else tuple(dict.fromkeys(modules_to_save))
    found = _resolve(model, targets, exclude, modules_to_save)
    spec = plan_spec(
        [(target.name, sizes_of(target)) for target in found],
        method=method,
        rank=rank,
        d=d,
        seed=seed,
        grouping=grouping,
        start=start,
        bound=bound,
        options=options,
    )
    return _install(model, spec, found, modules_to_save, name, groups=groups)


def load(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str = NAME,
    check_base: bool = True,
    any_rank: bool = False,
    groups: Groups = "cached",
) -> Adapter:
    """Read an adapter file and attach it to its base model, under ``name``.

    The file names its targets, so the order in which the model registers its layers does not matter.

    Args:
        check_base: whether to refuse a base with other values than the one that the file was made for (any dtype and
            any quantisation of it fits); files of other backends do not say.
        any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.
        groups: as in `attach`.

    Raises:
        AdapterFileError: the file is damaged or of an unknown version (see `unilora_core.read_adapter`), or says what
            cannot exist.
        MismatchError: the file belongs to another model; the error names the module, and what was expected and found.
        TargetError: a layer cannot be adapted rightly.
        ValuesError: a value is NaN or infinite. In each case the model is unchanged.
    """
    check_name(model, name)
    found = open_file(path, model, any_rank=any_rank)
    heads = found.header.modules_to_save
    if check_base:
        ours = base.identity(model, (*heads, *adapters(model)), found.fresh)
        base.check_base(str(path), found.header.base, ours)
    before = {name: value.clone() for head in heads for name, value in state_of(model, head).items()}
    adapter = _install(model, found.spec, found.targets, heads, name, found.frozen, groups)
    adapter.base = base.with_fresh(adapter.base, model, found.fresh)
    try:
        fill(adapter, found)
    except BaseException:  # nothing is left half done
        adapter.detach()
        for name, value in adapter.heads().items():
            value.copy_(before[name])
        raise
    return adapter


def layout_of(targets: Iterable[Target], rank: int) -> Layout:
    """Make the layout of ``name.A`` (r, in) and ``name.B`` (out, r) of each target, in order.

    Raises:
        SpecError: the rank is below 1.
    """
    layers = ((target.name, target.in_features, target.out_features, target.experts) for target in targets)
    return lora_layout(layers, rank)


def _resolve(
    model: nn.Module,
    targets: str | Iterable[str | Target],
    exclude: str | Iterable[str],
    modules_to_save: tuple[str, ...],
) -> tuple[Target, ...]:
    check_initialised(model)
    for name in modules_to_save:
        try:
            part_of(model, name)
        except AttributeError:
            submodule(model, name, "modules_to_save", TargetError)
    check_heads(model, modules_to_save)
    chosen = find_targets(model, targets, exclude=exclude)
    kept = tuple(target for target in chosen if not inside(weight_name(target), modules_to_save))
    if not kept:
        raise TargetError(f"every target lies inside modules_to_save = {modules_to_save}; nothing is left to adapt.")
    check_targets(model, kept)
    return kept


def _install(
    model: nn.Module,
    spec: ProjectionSpec,
    targets: tuple[Target, ...],
    modules_to_save: tuple[str, ...],
    name: str,
    frozen: Frozen | None = None,
    groups: Groups = "cached",
) -> Adapter:
    acting = {other: adapter.modules_to_save for other, adapter in adapters(model).items() if adapter.enabled}
    check_apart(acting | {name: modules_to_save})
    adapter = Adapter(model, spec, targets, modules_to_save, frozen, groups)
    adapter.put_on(name)
    return adapter
