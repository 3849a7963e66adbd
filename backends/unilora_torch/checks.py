"""Checks that refuse what cannot be adapted rightly, before anything changes."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unilora_core import TargetError, ValuesError
from unilora_core.selecting import check_apart
from unilora_torch.replaced import adds, convolves, is_registered, looks_up, still
from unilora_torch.targets import Target, features, is_conv, matrices_in, nearest, weight_name

__all__ = [
    "REMEDY",
    "check_adds",
    "check_initialised",
    "check_merged",
    "check_parameter",
    "check_targets",
    "check_untied",
    "computed",
    "is_plain",
    "kind_of",
    "own_weight",
    "owners_of",
    "weight_of",
    "without_idle_experts",
]


def check_targets(model: nn.Module, targets: Iterable[Target], *, loaded: bool = True) -> None:
    """Refuse what cannot be adapted rightly: no such layer, a tied or meta weight, overlapping blocks, an integer or
    quantised weight that the update would have to be added to.

    Args:
        loaded: whether the model has its values; without them, ties and meta weights say nothing.

    Raises:
        TargetError: such a target is found; the error has the module and the remedy.
    """
    owners = owners_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    taken: dict[str, list[Target]] = {}
    for target in targets:
        if target.module not in modules:
            raise TargetError(f"{target.module}: no such module; the nearest are {nearest(model, target.module)}.")
        module = modules[target.module]
        (_check_layer if target.parameter is None else check_parameter)(module, target)
        taken.setdefault(weight_name(target), []).append(target)
        if loaded:
            _check_own_values(module, target)
            check_untied(module, target, owners)
    for blocks in taken.values():
        check_apart(blocks[0].module, ((block.name, block.first_row, block.out_features) for block in blocks))


def check_initialised(model: nn.Module) -> None:
    """Refuse a model with lazy layers that have not seen an input yet.

    Raises:
        TargetError: such a layer is found; the error has its first tensor, and the remedy.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise TargetError(
                f"{name}: it has no size yet, its module is lazy and learns it from its first input; run the model "
                "once on an example, then attach."
            )


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the parameters of a model by their `_memory`."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_memory(parameter), []).append(name)
    return owners


def _memory(weight: Tensor) -> int:
    """Return a number that two tensors share if they begin at one place in memory."""
    return (weight.data_ptr() if is_plain(weight) else 0) or id(weight)


def check_untied(module: nn.Module, target: Target, owners: Mapping[int, list[str]]) -> None:
    """Refuse a weight that is tied. ``owners``: see `owners_of`.

    Raises:
        TargetError: the weight is tied; the error has its other names.
    """
    weight = weight_of(module, target)
    if weight is not None and len(names := owners.get(_memory(weight), ())) > 1:
        others = ", ".join(name for name in names if name != weight_name(target))
        raise TargetError(
            f"{target.module}: its weight is tied, it is also {others}; an update of one would change the other. "
            "Exclude it, or untie the weights first (for a transformers model: load it with "
            "tie_word_embeddings=False, and save that copy as the base)."
        )


def _check_own_values(module: nn.Module, target: Target) -> None:
    """Refuse a weight that has no values."""
    weight = weight_of(module, target)
    offloaded = hasattr(module, "_hf_hook")  # accelerate fetches its weights for each pass
    if not offloaded and any(tensor.is_meta for tensor in ([weight] if weight is not None else module.parameters())):
        raise TargetError(
            f"{target.module}: its weight is on the meta device and has no values; "
            "load the model's weights before attaching."
        )


def check_parameter(module: nn.Module, target: Target) -> None:
    """Refuse a target whose parameter is not there, has another shape, or is quantised.

    Raises:
        TargetError: the target is such a one; the error has the remedy.
    """
    try:
        weight, says = weight_of(module, target), computed(module, target)
    except AttributeError:
        weight, says = None, ""
    if says:
        raise TargetError(f"{target.name}: {says}, and so cannot be W + B·A; {REMEDY}, or exclude it.")
    if not isinstance(weight, nn.Parameter):
        there = sorted(name for name, parameter in module.named_parameters() if parameter.dim() in (2, 3))
        near = difflib.get_close_matches(target.parameter or "", there, 3) or there[:3]
        raise TargetError(f"{target.module}: no parameter {target.parameter!r}; the nearest are {near}.")
    if not is_plain(weight):
        raise TargetError(
            f"{target.name}: a weight of {kind_of(weight)} cannot take the update, and its module has no output that "
            "could; exclude it, or load the model unquantised."
        )
    experts, width, height = matrices_in(weight_name(target), weight, target.experts > 0, target.transposed)
    if (experts, width) != (target.experts, target.in_features) or not (
        0 <= target.first_row <= height - target.out_features
    ):
        raise TargetError(
            f"{target.name}: the target expects a weight of {target.experts or 1} × {target.in_features} inputs and at "
            f"least {target.first_row + target.out_features} outputs, {type(module).__name__}.{target.parameter} has "
            f"{experts or 1} × {width} and {height}; was it made for another model?"
        )


def own_weight(module: nn.Module, target: Target) -> Tensor:
    """Return the weight of a target: a parameter that B·A can be added to for good.

    Raises:
        TargetError: the weight is computed from others; the layer keeps it quantised, in integers, in float8 or
            sharded; or it has no values here, or another shape than it had when it was adapted.
    """
    weight, where = weight_of(module, target), weight_name(target)
    if says := computed(module, target):
        raise TargetError(f"{where}: {says}, where an update would be lost; {REMEDY}, or leave the adapter unmerged.")
    if weight is None or not is_plain(weight):
        raise TargetError(
            f"{target.module}: a weight of {kind_of(weight)} cannot take the update; merge into an unquantised copy of "
            "the base model: save the adapter, load the base in float32 or bfloat16, whole, and load the adapter there."
        )
    if weight.is_meta:
        raise TargetError(
            f"{where}: it is on the meta device (offloaded), where an update would be lost; save the adapter, load the "
            "base whole, and load the adapter there."
        )
    (_check_layer if target.parameter is None else check_parameter)(module, target)
    return weight


def computed(module: nn.Module, target: Target) -> str:
    """Say in words what a target's weight is, where it has plain values but is no parameter; "" for any other.

    Weight and spectral normalisation, pruning and every other parametrisation, in the old style and the new, compute it
    in each pass.
    """
    owner, name = _place(module, target)
    weight = weight_of(module, target)
    if is_registered(owner, name) or weight is None or not is_plain(weight):
        return ""
    of = [key for key, _ in owner.named_parameters() if f"{name}_" in key or f".{name}." in key]
    return f"the {name} is no parameter of the {type(owner).__name__}" + (
        f", but computed of {' and '.join(of)} in each pass" if of else ""
    )


def check_adds(module: nn.Module, target: Target) -> None:
    """Refuse a layer that does more with its weight than to multiply by it: a merge would not give its output with B·A
    beside it.

    Raises:
        TargetError: the layer is such a one; the error has the remedy.
    """
    if not adds(module, target.transposed):
        raise TargetError(
            f"{target.name}: the forward pass of this {type(module).__name__} is not linear in its weight, or was "
            "replaced by another, so a merge would not give what B·A beside it gives; give the target "
            f'parameter="weight", or leave the adapter unmerged.'
        )


REMEDY = (
    "take off first what computes it (torch.nn.utils.parametrize.remove_parametrizations, prune.remove, "
    "remove_weight_norm, remove_spectral_norm)"
)
"""The remedy for a weight that is computed."""


def check_merged(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse a sum that its dtype cannot hold.

    Raises:
        ValuesError: the sum is too large; the error has the weight's name, and the remedy.
    """
    bad = int((before.isfinite() & ~after.isfinite()).sum())
    if bad:
        raise ValuesError(
            f"{name}: {bad} of its {after.numel()} values would be infinite or NaN in {after.dtype} with the update; "
            "merge in float32 or bfloat16. Nothing was changed."
        )


def is_plain(weight: Tensor) -> bool:
    """Say whether a weight holds its values as they are: no subclass (torchao, bitsandbytes, a shard), no integers."""
    return (
        type(weight) in (Tensor, nn.Parameter, nn.Buffer) and weight.is_floating_point() and weight.element_size() > 1
    )


def without_idle_experts(alive: Mapping[str, bool]) -> list[str]:
    """Return the targets that are dead, without the experts in a list of modules of which another expert is alive.

    A router sends a batch to some experts only; the others are not called, and are no less adapted for it.
    """
    groups = {name: re.sub(r"(experts?[._])\d+", r"\1*", name) for name in alive}
    living = {group for name, group in groups.items() if alive[name] and "*" in group}
    return [name for name, group in groups.items() if not alive[name] and group not in living]


def weight_of(module: nn.Module, target: Target) -> Tensor | None:
    """Return the weight that a target adapts; None where the layer has no tensor of that name."""
    owner, name = _place(module, target)
    with still(owner, name):
        weight = getattr(owner, name, None)
    return weight if isinstance(weight, Tensor) else None


def _place(module: nn.Module, target: Target) -> tuple[nn.Module, str]:
    """Return the module that holds the weight of a target, and the weight's name there."""
    owner, _, name = ("weight" if target.parameter is None else target.parameter).rpartition(".")
    return module.get_submodule(owner), name


def kind_of(weight: Tensor | None) -> str:
    """Say what a weight is that holds no plain values, for a message."""
    if weight is None:
        return "a quantised layer"
    return f"{weight.dtype}" if type(weight) in (Tensor, nn.Parameter) else f"type {type(weight).__name__}"


def _check_layer(module: nn.Module, target: Target) -> None:
    with still(module, "weight"):
        _check_kind(module, target)


def _check_kind(module: nn.Module, target: Target) -> None:
    width, height = features(module, target.transposed)
    if width != target.in_features or not 0 <= target.first_row <= height - target.out_features:
        raise TargetError(
            f"{target.module}: the target expects a linear layer of {target.in_features} inputs and at least "
            f"{target.first_row + target.out_features} outputs, {type(module).__name__} has {width} and {height}; was "
            "it made for another model?"
        )
    weight = weight_of(module, target)
    if weight is not None and weight.is_complex():
        raise TargetError(
            f"{target.module}: its weight holds {weight.dtype}, and the numbers of B·A are real; exclude it."
        )
    if isinstance(module, nn.Embedding):
        _check_embedding(module, target)
    elif is_conv(module) and not convolves(module):
        raise TargetError(
            f"{target.module}: this {type(module).__name__} has groups, or is not linear in its weight, so B·A beside "
            'it would not be what a merge gives; give the target parameter="weight".'
        )
    elif type(module) is nn.Linear and weight is not None and not weight.is_floating_point():
        raise TargetError(
            f"{target.module}: its weight holds {weight.dtype}, which an nn.Linear cannot multiply by; exclude it, or "
            "load the model unquantised."
        )


def _check_embedding(module: nn.Embedding, target: Target) -> None:
    if module.max_norm is not None:
        raise TargetError(
            f"{target.module}: its max_norm rescales the rows in the forward pass, so B·A beside it would not be what "
            "a merge gives; exclude it."
        )
    if not is_plain(module.weight):
        raise TargetError(f"{target.module}: an embedding of {kind_of(module.weight)} cannot be adapted; exclude it.")
    if type(module).forward is not nn.Embedding.forward and not looks_up(module):
        raise TargetError(
            f"{target.module}: {type(module).__name__} does more than look rows up and scale them, so B·A beside it "
            "would not be what a merge gives; exclude it."
        )
