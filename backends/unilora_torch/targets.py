"""Which layers are adapted: names in, a checked tuple of `Target` out."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from unilora_core import TargetError

__all__ = ["Target", "check_targets", "features", "find_targets", "linear_target", "nearest"]


@dataclass(frozen=True)
class Target:
    """One low-rank update: B·A beside a linear layer, or beside a block of its outputs.

    Attributes:
        name: the prefix of its two factors, ``name.A`` (r, in_features) and ``name.B`` (out_features, r).
        module: the qualified name of the layer.
        in_features: width of the layer's input.
        out_features: width of the outputs that are adapted.
        first_row: where these outputs start in the layer's output; not 0 for the k and v blocks of a fused qkv.
        transposed: the weight is stored (in, out), as in transformers' Conv1D.
    """

    name: str
    module: str
    in_features: int
    out_features: int
    first_row: int = 0
    transposed: bool = False


def linear_target(name: str, module: nn.Module) -> Target:
    """The `Target` of an `nn.Linear` (or a subclass of it).

    Raises:
        TargetError: another kind of module.
    """
    if isinstance(module, nn.Linear):
        return Target(name, name, module.in_features, module.out_features)
    raise TargetError(
        f"{name}: a {type(module).__name__} is no linear layer; unilora adapts nn.Linear here. "
        "Name its linear submodules, or exclude it."
    )


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str | Target],
    *,
    exclude: str | Iterable[str] = (),
    to_target: Callable[[str, nn.Module], Target] = linear_target,
    all_linear: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> tuple[Target, ...]:
    """The layers that ``targets`` selects, in the order of `model.named_modules`.

    Args:
        targets: ``"all-linear"``; or a regular expression that the whole name must match; or a list of names, each
            of which selects the modules that it equals or that end in ``.name``; or a list of `Target`, taken as it is.
        exclude: a regular expression or a list of names, likewise; taken away from the selection.
        to_target: makes the `Target` of a selected module, or raises `TargetError`.
        all_linear: the module types that ``"all-linear"`` means.

    Raises:
        TargetError: nothing selected (the nearest names are listed), or a selected module is no linear layer.
    """
    if not isinstance(targets, str):
        targets = tuple(targets)
        given = tuple(target for target in targets if isinstance(target, Target))
        if given and len(given) < len(targets):
            raise TargetError(
                "expected a list of names or a list of Target, got both in one; make a Target of each name."
            )
        if given:
            return given
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, all_linear)]
    chosen = linear if targets == "all-linear" else [name for name in modules if _matches(name, targets)]
    kept = [name for name in chosen if not _matches(name, exclude)]
    if not kept:
        raise TargetError(_no_match(targets, exclude, chosen, linear))
    return tuple(to_target(name, modules[name]) for name in kept)


def check_targets(model: nn.Module, targets: Iterable[Target]) -> None:
    """Refuse what cannot be adapted rightly: no such layer, a tied, meta or integer weight, overlapping blocks.

    Raises:
        TargetError: with the module and the remedy.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    taken: dict[str, list[Target]] = {}
    for target in targets:
        if target.module not in modules:
            raise TargetError(f"{target.module}: no such module; the nearest are {nearest(model, target.module)}.")
        module = modules[target.module]
        width, height = features(module, target.transposed)
        if width != target.in_features or not 0 <= target.first_row <= height - target.out_features:
            raise TargetError(
                f"{target.module}: the target expects a linear layer of {target.in_features} inputs and outputs up to "
                f"{target.first_row + target.out_features}, {type(module).__name__} has {width} and {height}."
            )
        weight = module.weight
        if len(owners.get(id(weight), ())) > 1:
            raise TargetError(
                f"{target.module}: its weight is tied, it is also {_others(owners[id(weight)], target.module)}; "
                "an update of one would change the other. Exclude it, or untie the weights first."
            )
        if weight.is_meta:
            raise TargetError(
                f"{target.module}: its weight is on the meta device and has no values; "
                "load the model's weights before attaching."
            )
        if not (weight.is_floating_point() or _known_quantised(module)):
            raise TargetError(
                f"{target.module}: its weight holds {weight.dtype} and {type(module).__qualname__} is no "
                "quantised layer known to work; exclude it, or load the model unquantised."
            )
        for other in taken.setdefault(target.module, []):
            if target.first_row < other.first_row + other.out_features and other.first_row < (
                target.first_row + target.out_features
            ):
                raise TargetError(f"{target.name} and {other.name} adapt the same outputs of {target.module}.")
        taken[target.module].append(target)


def features(module: nn.Module, transposed: bool = False) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; (0, 0) for a module that is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return 0, 0
    height, width = weight.shape
    return (height, width) if transposed else (width, height)


def nearest(model: nn.Module, name: str) -> list[str]:
    """The names of the model's modules that look most like ``name``."""
    return difflib.get_close_matches(name, [other for other, _ in model.named_modules() if other], 3)


def _known_quantised(module: nn.Module) -> bool:
    """The low-rank path beside these needs their input and output only; their integer weights are never read."""
    return any(
        cls.__module__.startswith("bitsandbytes.") and cls.__name__ in {"Linear4bit", "Linear8bitLt"}
        for cls in type(module).__mro__
    )


def _matches(name: str, pattern: str | Iterable[str | Target]) -> bool:
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise TargetError(
                f"{pattern!r} is not a regular expression ({error}); give a list for plain names."
            ) from None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def _no_match(targets: str | Iterable[str | Target], exclude: object, chosen: list[str], linear: list[str]) -> str:
    if chosen:
        return f"all {len(chosen)} modules selected by {targets!r} are excluded by {exclude!r}."
    if not linear:
        return f"no module matches {targets!r}: the model has no linear layer at all."
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))
    words = [targets] if isinstance(targets, str) else [str(target) for target in targets]
    near = [match for word in words for match in difflib.get_close_matches(word.rsplit(".", 1)[-1], ends, 3, 0.4)]
    return (
        f"no module matches {targets!r}; the nearest linear layers end in {list(dict.fromkeys(near)) or ends[:8]}, "
        f"for example {linear[0]!r}. A list holds names or endings, a string is a regular expression of the whole name."
    )


def _others(names: list[str], module: str) -> str:
    return ", ".join(name for name in names if name != f"{module}.weight")
