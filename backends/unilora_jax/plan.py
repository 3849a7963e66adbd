"""plan and load make an `Adapter` for a tree of parameters."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from unilora_core import AdapterFileError, ProjectionSpec, SpecError, read_adapter
from unilora_core.errors import printable
from unilora_core.frames import FRAMES
from unilora_core.header import FROZEN, Header, read_header
from unilora_core.maps.mapping import Option
from unilora_core.methods import METHODS, method_of, plan_spec
from unilora_core.serialisation import AdapterFile
from unilora_jax.adapter import Adapter
from unilora_jax.chains import Chains, numbers_of
from unilora_jax.fitting import check_fits
from unilora_jax.frozen import Frozen, frozen_in_file, frozen_of_seed, frozen_of_weights
from unilora_jax.opened import short, targets_for, tree_of
from unilora_jax.targets import ALL_LINEAR, STACKED, Target, find_targets, leaves_of

__all__ = ["load", "plan"]

Groups = Literal["computed", "cached"]

DENSE = (
    "makes ΔW itself, for which there is no low-rank path in JAX. Use it in PyTorch (unilora_torch; merge it there for "
    "JAX), or take a method of factors, such as 'uni-lora'."
)


def plan(
    params: Any,
    targets: str | Iterable[str | Target] = ALL_LINEAR,
    *,
    exclude: str | Iterable[str] = (),
    method: str = "uni-lora",
    rank: int | Mapping[str, int] | None = None,
    d: int | Literal["auto"] = "auto",
    seed: int = 0,
    grouping: str | None = None,
    start: str | None = None,
    bound: float | None = None,
    stacked: str = STACKED,
    groups: Groups = "computed",
    **options: Option,
) -> Adapter:
    """Decide how one vector θ_d adapts the matrices of a tree. Nothing is changed, and no parameter is kept.

    Args:
        params: any pytree: dictionaries, Flax Linen parameters, an NNX state or module, an Equinox module. Shapes are
            enough (`jax.eval_shape`), except for methods that are made of the weights (LoRA-XS, TinyLoRA).
        targets: ``"all-linear"``, every matrix of a linear layer except the output head; a regular expression for whole
            paths (``".*/(q|v)_proj/kernel"``), a list of layers (``["q_proj", "v_proj"]``), or a list of `Target`; see
            `find_targets`.
        exclude: the names to remove from ``targets``, as a regular expression or a list.
        method: a name of `unilora_core.methods.METHODS`; an argument below that is None takes the method's own value.
        rank: r of every target, 16 for Uni-LoRA; or a mapping from names of layers, or their endings
            (``{"q_proj": 8, "v_proj": 16}``); the longest name that fits counts.
        d: the number of trained values, or ``"auto"``: for Uni-LoRA a sixteenth of LoRA's at rank 4.
        seed: the seed of P, of θ_d⁰ and of what a method draws.
        grouping: the map P: ``"balanced"``, ``"iid"``, ``"numpy-shuffle"``, …; see `unilora_core.ProjectionSpec`.
        start: ``"identity"`` (the adapted model starts as the base), ``"paper"`` (θ_D = P θ_d, U(-0.02, 0.02)) or
            ``"zero"``.
        bound: the bound of θ_d⁰; by default 0.02 for the paper's start; for the identity start θ_d⁰ is as large as
            LoRA's A.
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.
        groups: ``"computed"`` computes the groups inside each compiled step, ``"cached"`` keeps them as int32, 4 bytes
            per LoRA parameter.
        options: the options of the method, such as ``vectors`` of VB-LoRA.

    Raises:
        TargetError: there is nothing to adapt, or a leaf cannot be adapted rightly.
        SpecError: the method is unknown, makes ΔW itself, or does not take an option; or rank or d is out of range.
        ValuesError: the method is made of the weights, and one of them holds NaN or infinity.
    """
    if method in METHODS and FRAMES[METHODS[method].frame].dense:
        raise SpecError(f"plan: the method {method!r} {DENSE}")
    found, leaves = find_targets(params, targets, exclude=exclude, stacked=stacked), leaves_of(params)
    check_fits(leaves, found)
    layers = [(name, target.sizes) for target in found for name in target.names]
    spec = plan_spec(
        layers, method=method, rank=rank, d=d, seed=seed, grouping=grouping, start=start, bound=bound, options=options
    )
    if isinstance(rank, Mapping):
        _check_stacks(spec, found)
    of_weights = spec.form.of_weight is not None
    frozen = frozen_of_weights(spec, found, leaves) if of_weights else frozen_of_seed(spec, found)
    return _adapter(leaves, spec, found, frozen, groups)


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
    trained head), which `unilora_core.read_adapter` gives.

    Args:
        rename: a function from a layer's name in the file (``model.layers.0.self_attn.q_proj``) to its path here,
            joined by dots and without ``kernel`` or ``weight`` (``layers.0.self_attn.q_proj``; a stack's number comes
            after it).
        stacked, groups: as in `plan`.
        any_rank: whether to take factors of a rank beyond min(in, out) (and the frame's usual rank: 64, or 1,024 where
            a pair is shared), which need more memory than the weight that they adapt.

    Returns:
        The adapter, and θ_d (d,) float32.

    Raises:
        AdapterFileError: the file is damaged, of an unknown version (see `unilora_core.read_adapter`), or of a method
            that makes ΔW itself.
        MismatchError: the file belongs to another model; the error names the leaf, and what was expected and found.
            Nothing of a size that the file states is made before it is checked.
    """
    file = read_adapter(path)
    header, spec = read_header(path, file), file.spec
    if spec.form.dense:
        raise AdapterFileError(f"{path}: its method, {method_of(spec) or spec.frame!r}, {DENSE}")
    usual = None if any_rank else spec.form.usual
    tree = tree_of(path, params, rename, stacked)
    targets = targets_for(tree, header.targets, usual)
    _warn_of_the_rest(path, header, file)
    of_file = spec.form.of_weight is not None
    frozen = frozen_in_file(path, spec, targets, file.tensors) if of_file else frozen_of_seed(spec, targets)
    return _adapter(tree.leaves, spec, targets, frozen, groups), jnp.asarray(file.theta_d)


def _adapter(
    leaves: dict[str, Any], spec: ProjectionSpec, targets: tuple[Target, ...], frozen: Frozen, groups: Groups
) -> Adapter:
    if groups not in ("computed", "cached"):
        raise SpecError(f"groups must be 'computed' or 'cached', got {groups!r}.")
    if groups == "cached" and spec.map.groups is None:
        raise SpecError(f"the grouping {spec.grouping!r} has no groups to be cached; leave groups out.")
    shapes = {target.path: tuple(leaves[target.path].shape) for target in targets}
    numbers = numbers_of(spec, targets, cached=groups == "cached")
    return Adapter(Chains(targets, tuple(shapes.items()), numbers, frozen))


def _check_stacks(spec: ProjectionSpec, targets: Iterable[Target]) -> None:
    """Refuse several ranks in one stack, whose factors are one array."""
    for target in targets:
        ranks = sorted({spec.layout.shapes[f"{name}.A"][-2] for name in target.names})
        if len(ranks) > 1:
            raise SpecError(
                f"plan: {target.path} is a stack of {len(target.names)} layers; expected one rank for all of them, got "
                f"{', '.join(map(str, ranks))}. Unstack the parameters to have a rank for each."
            )


def _warn_of_the_rest(path: str | os.PathLike, header: Header, file: AdapterFile) -> None:
    """Warn of what else was trained."""
    names = header.modules_to_save or tuple(sorted(name for name in file.tensors if not name.startswith(FROZEN)))
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            printable(f"{path}: the file also holds {', '.join(map(short, names[:8]))}{more}, trained with ")
            + "θ_d; put unilora_core.read_adapter(path).tensors into the parameters.",
            stacklevel=3,
        )
