"""Which layers of a timm model are adapted: words that mean the same in every family in, a tuple of `Target` out."""

import dataclasses
from collections.abc import Iterable

from torch import nn

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Target

__all__ = ["WORDS", "classifier", "find_targets"]

WORDS = {
    "q": {"q", "q_proj", "wq"},
    "k": {"k", "k_proj", "wk"},
    "v": {"v", "v_proj", "wv"},
    "qkv": {"qkv"},
    "proj": {"proj"},
    "fc1": {"fc1", "fc1_g", "fc1_x"},
    "fc2": {"fc2"},
    "mlp": {"fc1", "fc1_g", "fc1_x", "fc2"},
    "all-linear": set(),
}
"""Word → how the names of the layers that it means end. q, k and v also mean their blocks of a fused layer."""

FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "qk": ("q", "k")}
"""Last name of a fused layer → its blocks, in order of rows."""

DEFAULTS = (("q", "v"), ("qkv",), ("mlp",), ("all-linear",))
"""The first of these that a model has is adapted by default; q and v as in the paper."""


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str | Target] | None = None,
    *,
    exclude: str | Iterable[str] = (),
) -> tuple[Target, ...]:
    """The linear layers, or blocks of fused ones, that ``targets`` selects, in the model's order.

    Args:
        targets: None (query and value where the model has them, else the MLPs, else all linear layers); a word of
            `WORDS`; a regular expression for whole names; or a list of words, names and endings of names.
        exclude: a regular expression or a list of names or endings; taken away from the selection.

    Raises:
        TargetError: nothing selected (known words and those that the model has are listed), or no linear layer.
    """
    listed = (targets,) if targets is None or isinstance(targets, str) else tuple(targets)
    words = [entry for entry in listed if isinstance(entry, str)]
    if targets is not None and len(words) < len(listed):
        return unilora_torch.find_targets(model, targets)  # a list of `Target`
    linear = _linear_layers(model, exclude)
    if targets is None:
        choices = ([_select(model, linear, word) for word in default] for default in DEFAULTS)
        chosen = next(choice for choice in choices if all(choice))
    else:
        chosen = [
            _select(model, linear, word)
            if word in WORDS
            else _match(model, linear, word if isinstance(targets, str) else [word], exclude)
            for word in words
        ]
        if empty := [word for word, found in zip(words, chosen, strict=True) if not found]:
            raise TargetError(_nothing(model, linear, empty[0]))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(set().union(*chosen), key=lambda target: (order[target.module], target.first_row)))


def classifier(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's classifier (two for a distilled model); empty without one (``num_classes=0``)."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    names = [name for name, module in model.named_modules() if name and any(module is head for head in heads)]
    if not names:
        configured = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        names = [configured] if isinstance(configured, str) else list(configured)
    present = dict(model.named_modules())
    return tuple(name for name in names if name in present and any(True for _ in present[name].parameters()))


def _linear_layers(model: nn.Module, exclude: str | Iterable[str]) -> dict[str, Target]:
    """Name → target of every linear layer outside the classifier."""
    heads = tuple(f"{name}." for name in classifier(model))
    every = unilora_torch.find_targets(model, "all-linear", exclude=exclude)
    linear = {target.module: target for target in every if not f"{target.module}.".startswith(heads)}
    if not linear:
        raise TargetError(
            f"{type(model).__name__}: no linear layer is left outside the classifier, and no other kind of layer is "
            "adapted (convolutions are not)."
        )
    return linear


def _select(model: nn.Module, linear: dict[str, Target], word: str) -> list[Target]:
    """What a word means in this model."""
    chosen = []
    for name, target in linear.items():
        parent, _, last = name.rpartition(".")
        if word == "all-linear" or (last in WORDS[word] and (word != "proj" or _is_attention(linear, parent))):
            chosen.append(target)
        elif last in FUSED and word in (blocks := _blocks(model.get_submodule(parent), last)):
            height = target.out_features // len(blocks)
            first_row = height * blocks.index(word)
            chosen.append(dataclasses.replace(target, name=f"{name}.{word}", out_features=height, first_row=first_row))
    return chosen


def _blocks(attention: nn.Module, fused: str) -> tuple[str, ...]:
    """The equal blocks of rows in a fused layer; none where each head's q, k and v lie together."""
    by_head = getattr(attention, "head_first", False) or (
        hasattr(attention, "key_dim") and hasattr(attention, "val_dim")
    )
    if by_head:  # MaxViT and CoAtNet; TinyViT and EfficientFormer
        return ()
    if fused == "qkv" and getattr(attention, "use_global", False):  # GCViT: q comes from elsewhere
        return FUSED["kv"]
    return FUSED[fused]


def _is_attention(linear: dict[str, Target], parent: str) -> bool:
    """Whether a module holds queries, so that its `proj` is attention's and not a patch embedding's."""
    return any(f"{parent}.{name}" in linear for name in (*FUSED, *WORDS["q"]))


def _match(
    model: nn.Module, linear: dict[str, Target], pattern: str | list[str], exclude: str | Iterable[str]
) -> list[Target]:
    """What a regular expression, or the end of a name, selects."""
    try:
        return list(unilora_torch.find_targets(model, pattern, exclude=exclude))
    except TargetError as error:
        raise TargetError(f"{error} {_words(model, linear)}") from None


def _nothing(model: nn.Module, linear: dict[str, Target], word: str) -> str:
    by_head = word in {"q", "k", "v"} and _select(model, linear, "qkv")
    why = " (its qkv keeps each head's q, k and v together, so none is a block of rows)" if by_head else ""
    return f"the word {word!r} selects nothing in {type(model).__name__}{why}. {_words(model, linear)}"


def _words(model: nn.Module, linear: dict[str, Target]) -> str:
    have = [word for word in WORDS if _select(model, linear, word)]
    return f"Known words: {', '.join(WORDS)}; this model has {', '.join(have)}."
