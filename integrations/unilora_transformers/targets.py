"""Choice of the adapted layers of a transformers model, and of the modules that are its freshly made head."""

import warnings
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unilora_core import TargetError
from unilora_torch import Adapter, Target, find_targets
from unilora_torch.heads import inside
from unilora_torch.targets import embedding_target, is_linear, linear_target

__all__ = ["select_targets", "task_heads", "to_target"]

QUERY_AND_VALUE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, BART, Whisper, CLIP
    ("query", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "v"),  # T5
    ("to_q", "to_v"),
    ("linear_q", "linear_v"),  # the conformers
    ("q_b_proj", "kv_b_proj"),  # DeepSeek-V3: latent attention
    ("q_proj", "kv_b_proj"),  # DeepSeek-V2-Lite
    ("q_attn", "c_attn"),  # GPT-2's cross-attention: k and v are blocks of c_attn
    ("c_attn",),  # GPT-2: q, k and v are blocks of it, see `_query_and_value_blocks`
    ("query_key_value",),  # BLOOM, GPT-NeoX, Falcon: q, k and v interleave, so the layer is adapted as a whole
    ("qkv_proj",),  # Phi-3, CodeGen
    ("Wqkv",),  # MPT, ModernBERT
    ("qkv",),  # Swin-v2, BEiT
)
"""The endings that mean query and value; for each attention the first row counts of which it has every layer."""

IN_PROJ = "in_proj"
"""The ending that counts in models without any of these: DeBERTa, Mamba."""

HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "projector", "logits_proj")
"""The names of a head in models that do not name their base model."""


def select_targets(
    model: PreTrainedModel, targets: str | Iterable[str | Target] | None, exclude: str | Iterable[str] = ()
) -> tuple[Target, ...]:
    """Return the targets that are selected; see `unilora_transformers.attach`.

    Raises:
        TargetError: nothing is selected, or a selected module is no linear layer.
    """
    selection = _query_and_value(model) if targets is None else targets
    found = find_targets(model, selection, exclude=exclude, to_target=_chosen_target, all_linear=_is_linear)
    if targets is None:
        return tuple(block for target in found for block in _query_and_value_blocks(target))
    return _without_heads(model, found) if targets == "all-linear" else found


def to_target(name: str, module: nn.Module) -> Target:
    """Make the `Target` of a linear layer or a Conv1D.

    Raises:
        TargetError: the module is of another kind.
    """
    if isinstance(module, Conv1D):
        width, height = module.weight.shape
        return Target(name, name, width, height, transposed=True)
    return linear_target(name, module)


def task_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the modules that a task adds freshly made to the base model; none in a language model."""
    if model.get_output_embeddings() is not None:
        return ()
    base = getattr(model, model.base_model_prefix, None)
    children = [
        (name, child)
        for name, child in model.named_children()
        if any(True for _ in child.parameters()) and not isinstance(child, Adapter)
    ]
    if isinstance(base, nn.Module):
        return tuple(name for name, child in children if child is not base)
    return tuple(name for name, _ in children if name in HEADS)


def _chosen_target(name: str, module: nn.Module) -> Target:
    """Make the target of a module that was chosen by name, which may be an embedding, too."""
    return embedding_target(name, module) if isinstance(module, nn.Embedding) else to_target(name, module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or is_linear(module)


def _query_and_value(model: PreTrainedModel) -> list[str]:
    """Return the query and value layers of every attention in every part of a model."""
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    layers: dict[str, dict[str, str]] = {}
    for name in linear:
        owner, _, last = name.rpartition(".")
        layers.setdefault(owner, {})[last] = name
    rows = {
        owner: next((row for row in QUERY_AND_VALUE if set(row) <= mine.keys()), ()) for owner, mine in layers.items()
    }
    found = {layers[owner][last] for owner, row in rows.items() for last in row}
    found = found or {name for name in linear if name.rpartition(".")[-1] == IN_PROJ}
    if not found:
        ends = sorted({name.rpartition(".")[-1] for name in linear})
        raise TargetError(
            f"{type(model).__name__}: no query and value projection under a known name; choose targets=[…] among the "
            f"linear layers, whose names end in {ends}, or targets='all-linear'."
        )
    _warn_of_parts(model, found, linear)
    return [name for name in linear if name in found]


def _warn_of_parts(model: PreTrainedModel, found: Iterable[str], linear: Iterable[str]) -> None:
    """Warn of the models inside a model that have linear layers, and none that is found."""
    parts = [name for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)]
    missed = [
        part
        for part in parts
        if any(inside(name, [part]) for name in linear) and not any(inside(name, [part]) for name in found)
    ]
    if outermost := [part for part in missed if not inside(part, set(missed) - {part})]:
        warnings.warn(
            f"unilora: {', '.join(outermost)}: no query and value projection under a known name, so no target is "
            "there; name targets=[…] to adapt it as well.",
            stacklevel=4,
        )


def _query_and_value_blocks(target: Target) -> list[Target]:
    """Return a target for q and one for v of GPT-2's c_attn, which computes q, k and v side by side, or k and v."""
    width, blocks = target.in_features, target.out_features // target.in_features
    if not target.module.endswith("c_attn") or target.out_features not in (2 * width, 3 * width):
        return [target]
    return [
        Target(f"{target.name}.{block}", target.module, width, width, row, target.transposed)
        for block, row in (("q", 0), ("v", (blocks - 1) * width))[3 - blocks :]
    ]


def _without_heads(model: PreTrainedModel, found: tuple[Target, ...]) -> tuple[Target, ...]:
    output = model.get_output_embeddings()
    heads = [*task_heads(model), *(name for name, module in model.named_modules() if module is output)]
    inside = tuple(f"{name}." for name in heads)
    return tuple(target for target in found if not f"{target.module}.".startswith(inside))
