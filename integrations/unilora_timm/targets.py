"""Choice of the adapted layers of a timm model: words that mean the same in every family go in, a tuple of `Target`
comes out.
"""

import dataclasses
import re
from collections.abc import Iterable

from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d
from torch import nn

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Target
from unilora_torch.targets import is_conv, is_linear

__all__ = ["WORDS", "classifier", "find_targets"]

WORDS = {
    "q": {"q", "q_proj", "q_proj_weight", "wq", "to_query", "query"},
    "k": {"k", "k_proj", "k_proj_weight", "wk", "to_key", "key"},
    "v": {"v", "v_proj", "v_proj_weight", "wv", "value"},
    "qkv": {"qkv", "qkvs", "qkv_proj", "in_proj_weight"},
    "proj": {"proj", "o_proj", "out_proj", "attn_out_proj", "output"},
    "fc1": {"fc1", "fc1_g", "fc1_x", "ln1", "w0", "w1", "gate_proj", "up_proj", "pwconv1"},
    "fc2": {"fc2", "ln2", "w2", "mlp_out_proj", "down_proj", "pwconv2"},
    "mlp": set(),
    "patch_embed": set(),
    "conv": set(),
    "all-linear": set(),
}
"""The layer names that each word means. q, k and v also mean their blocks of a fused layer."""

FUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qkv", "qkvs", "qkv_proj", "in_proj_weight"), ("q", "k", "v")),
    "kv": ("k", "v"),
    "qk": ("q", "k"),
    "in_proj": ("fc1", "q", "k", "v"),  # of attention and MLP side by side
}
"""The blocks of each fused layer, by its name, in order of rows."""

DEFAULTS = (("q", "v"), ("qkv",), ("mlp",))
"""The first of these that a model has is adapted by default (q and v as in the paper); without any, every layer."""

INNER = re.compile(r"linear|conv|c|l|ln|\d+")
"""The names of a layer inside a wrapper (with a norm, say), whose name tells its role: ``attn.q.conv`` is a q."""

EMBEDS = re.compile(r"(.*\.)?(patch_embed\w*|stem\w*|conv_stem|embeds)(\..*)?")
"""The places where a model makes patches of an image."""


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str | Target] | None = None,
    *,
    exclude: str | Iterable[str] = (),
) -> tuple[Target, ...]:
    """Return the layers, or blocks of fused ones, that ``targets`` selects, in the model's order.

    Args:
        targets: None (query and value where the model has them, else the MLPs, else all linear layers and
            convolutions); a word of `WORDS`; a regular expression for whole names; or a list of words, names and
            endings of names.
        exclude: a regular expression or a list of names or endings, to remove from the selection.

    Raises:
        TargetError: nothing is selected (the error lists the known words, and those that the model has), or there is no
            layer to adapt.
    """
    listed = (targets,) if targets is None or isinstance(targets, str) else tuple(targets)
    words = [entry for entry in listed if isinstance(entry, str)]
    if targets is not None and len(words) < len(listed):
        return unilora_torch.find_targets(model, targets)  # a list of `Target`
    layers = _layers(model, exclude)
    if targets is None:
        chosen = [_default(model, layers)]
    else:
        chosen = [
            _select(model, layers, word)
            if word in WORDS
            else _match(model, layers, word if isinstance(targets, str) else [word], exclude)
            for word in words
        ]
        if empty := [word for word, found in zip(words, chosen, strict=True) if not found]:
            raise TargetError(_nothing(model, layers, empty[0]))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(set().union(*chosen), key=lambda target: (order[target.module], target.first_row)))


def classifier(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's classifier (two for a distilled model); empty without one (``num_classes=0``)."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    names = [name for name, module in model.named_modules() if name and any(module is head for head in heads)]
    if not names:
        configured = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        names = [configured] if isinstance(configured, str) else list(configured)
    present = dict(model.named_modules())
    return tuple(name for name in names if name in present and any(True for _ in present[name].parameters()))


def _layers(model: nn.Module, exclude: str | Iterable[str]) -> dict[str, Target]:
    """Return the target of every linear layer, convolution and matrix of `nn.MultiheadAttention` outside the
    classifier, by name.
    """
    heads = tuple(f"{name}." for name in classifier(model))
    every = unilora_torch.find_targets(
        model, "all-linear", exclude=exclude, all_linear=lambda module: is_linear(module) or is_conv(module)
    )
    layers = {target.name: target for target in every if not f"{target.name}.".startswith(heads)}
    if not layers:
        raise TargetError(f"{type(model).__name__}: no linear layer or convolution is left outside the classifier.")
    return layers


def _default(model: nn.Module, layers: dict[str, Target]) -> list[Target]:
    """Return the first of `DEFAULTS` that the body of the model has; every layer where it has none."""
    body = {name: target for name, target in layers.items() if not _pools(model, name)}
    for words in DEFAULTS:
        if all(_select(model, body, word) for word in words):
            return [target for word in words for target in _select(model, layers, word)]
    return list(layers.values())


def _pools(model: nn.Module, name: str) -> bool:
    """Say whether a layer belongs to an attention that pools the features."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return any(isinstance(module, (AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d)) for module in above)


def _select(model: nn.Module, layers: dict[str, Target], word: str) -> list[Target]:
    """Return the targets that a word means in this model."""
    chosen = []
    for name, target in layers.items():
        parent, role = _role(name)
        if _means(model, layers, name, word):
            chosen.append(target)
        elif role in FUSED:
            blocks = _blocks(model.get_submodule(parent), role, target.out_features)
            for block in blocks.keys() & ({"fc1"} if word == "mlp" else {word}):
                rows, start = blocks[block]
                chosen.append(dataclasses.replace(target, name=f"{name}.{block}", out_features=rows, first_row=start))
    return chosen


def _means(model: nn.Module, layers: dict[str, Target], name: str, word: str) -> bool:
    """Say whether a word means a whole layer."""
    convolves, (parent, role) = is_conv(model.get_submodule(layers[name].module)), _role(name)
    match word:
        case "all-linear":
            return not convolves
        case "conv":
            return convolves
        case "patch_embed":
            first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
            return EMBEDS.fullmatch(name) is not None or name == first
        case "proj":
            return role in WORDS[word] and _is_attention(layers, parent)
        case "fc1" | "fc2":
            return role in WORDS[word] and (not convolves or re.search("mlp|ffn", parent) is not None)
        case "mlp":
            return _means(model, layers, name, "fc1") or _means(model, layers, name, "fc2")
    return role in WORDS[word]


def _role(name: str) -> tuple[str, str]:
    """Return the module that a layer serves, and its role: ``0.attn`` and ``proj`` for ``0.attn.proj.ln.linear``."""
    parts = name.split(".")
    while len(parts) > 1 and INNER.fullmatch(parts[-1]):
        parts.pop()
    if parts[-1] == "proj" and parts[-2:-1] and parts[-2] in {"query", "key", "value", "output"}:
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]


def _is_attention(layers: dict[str, Target], parent: str) -> bool:
    """Say whether a module holds queries, so that its `proj` is attention's and not a patch embedding's."""
    roles = {role for holder, role in map(_role, layers) if holder == parent}
    return bool(roles & (FUSED.keys() | WORDS["q"]))


def _blocks(attention: nn.Module, role: str, height: int) -> dict[str, tuple[int, int]]:
    """Return rows and first row of each block of a fused layer; none where each head's q, k and v lie together."""
    names = FUSED[role]
    if getattr(attention, "use_global", False):  # GCViT: q comes from elsewhere
        names = FUSED["kv"]
    if _is_by_head(attention, role):
        return {}
    sizes = _sizes(attention, role) or [height // len(names)] * len(names)
    if sum(sizes) != height:
        return {}
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return dict(zip(names, zip(sizes, starts, strict=True), strict=True))


def _is_by_head(attention: nn.Module, role: str) -> bool:
    """Say whether each head's blocks lie together, as in MaxViT and CoAtNet; LeViT, TinyViT and EfficientFormer;
    HaloNet; EfficientViT (MIT).
    """
    keys = hasattr(attention, "key_dim") and hasattr(attention, "val_dim") and role != "qkvs"
    return getattr(attention, "head_first", False) or keys or type(attention).__name__ in {"HaloAttn", "LiteMLA"}


def _sizes(attention: nn.Module, role: str) -> list[int] | None:
    """Return the rows of each block where they differ."""
    if role == "in_proj":
        return getattr(attention, "in_split", [0])
    match type(attention).__name__:
        case "CascadedGroupAttention":  # EfficientViT (MSRA)
            return [attention.key_dim, attention.key_dim, attention.val_dim]
        case "SHSA":  # SHViT
            return [attention.qk_dim, attention.qk_dim, attention.pdim]
        case "BottleneckAttn":
            return [attention.dim_out_qk, attention.dim_out_qk, attention.dim_out_v]
        case "LambdaLayer":
            return [attention.num_heads * attention.dim_qk, attention.dim_qk, attention.dim_v]
        case "LinearSelfAttention":  # MobileViT v2
            return [1, attention.embed_dim, attention.embed_dim]
    return None


def _match(
    model: nn.Module, layers: dict[str, Target], pattern: str | list[str], exclude: str | Iterable[str]
) -> list[Target]:
    """Return what a regular expression, or the end of a name, selects."""
    try:
        return list(unilora_torch.find_targets(model, pattern, exclude=exclude))
    except TargetError as error:
        raise TargetError(f"{error} {_words(model, layers)}") from None


def _nothing(model: nn.Module, layers: dict[str, Target], word: str) -> str:
    by_head = word in {"q", "k", "v"} and any(_role(name)[1] in FUSED for name in layers)
    why = " (its qkv keeps each head's q, k and v together, so none is a block of rows)" if by_head else ""
    return f"the word {word!r} selects nothing in {type(model).__name__}{why}. {_words(model, layers)}"


def _words(model: nn.Module, layers: dict[str, Target]) -> str:
    have = [word for word in WORDS if _select(model, layers, word)]
    return f"Known words: {', '.join(WORDS)}; this model has {', '.join(have)}."
