"""Which layers of a transformers model are adapted, and which modules are its freshly made head."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unilora_core import TargetError
from unilora_torch import Adapter, Target, find_targets
from unilora_torch.targets import embedding_target, is_linear, linear_target

__all__ = ["select_targets", "task_heads", "to_target"]

QUERY_AND_VALUE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, BART, Whisper, CLIP
    ("query", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "v"),  # T5
    ("to_q", "to_v"),
    ("q_b_proj", "kv_b_proj"),  # DeepSeek-V3: latent attention
    ("q_proj", "kv_b_proj"),  # DeepSeek-V2-Lite
    ("c_attn",),  # GPT-2: q, k and v are blocks of it, see `_query_and_value_blocks`
    ("query_key_value",),  # BLOOM, GPT-NeoX, Falcon: q, k and v interleave, so the layer is adapted as a whole
    ("qkv_proj",),  # Phi-3, CodeGen
    ("Wqkv",),  # MPT, ModernBERT
    ("qkv",),  # Swin-v2, BEiT
    ("in_proj",),  # DeBERTa, Mamba
)
"""The endings that mean query and value; the first row counts of which every ending names a linear layer."""

HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "projector", "logits_proj")
"""Names of a head in models that do not name their base model."""


def select_targets(
    model: PreTrainedModel, targets: str | Iterable[str | Target] | None, exclude: str | Iterable[str] = ()
) -> tuple[Target, ...]:
    """See `unilora_transformers.attach`.

    Raises:
        TargetError: nothing selected, or a selected module is no linear layer.
    """
    selection = _query_and_value(model) if targets is None else targets
    found = find_targets(model, selection, exclude=exclude, to_target=_chosen_target, all_linear=_is_linear)
    if targets is None:
        return tuple(block for target in found for block in _query_and_value_blocks(target))
    return _without_heads(model, found) if targets == "all-linear" else found


def to_target(name: str, module: nn.Module) -> Target:
    """The `Target` of a linear layer or a Conv1D.

    Raises:
        TargetError: another kind of module.
    """
    if isinstance(module, Conv1D):
        width, height = module.weight.shape
        return Target(name, name, width, height, transposed=True)
    return linear_target(name, module)


def task_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules beside the base model, which a task adds freshly made; none in a language model."""
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
    """What was asked for by name may be an embedding, too."""
    return embedding_target(name, module) if isinstance(module, nn.Embedding) else to_target(name, module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or is_linear(module)


def _query_and_value(model: PreTrainedModel) -> list[str]:
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    last = {name: name.rsplit(".", 1)[-1] for name in linear}
    for row in QUERY_AND_VALUE:
        if set(row) <= set(last.values()):
            return [name for name in linear if last[name] in row]
    raise TargetError(
        f"{type(model).__name__}: no query and value projection under a known name; choose targets=[…] among the "
        f"linear layers, whose names end in {sorted(set(last.values()))}, or targets='all-linear'."
    )


def _query_and_value_blocks(target: Target) -> list[Target]:
    """GPT-2's c_attn computes q, k and v side by side: a target each for q and v."""
    width = target.in_features
    if not target.module.endswith("c_attn") or target.out_features != 3 * width:
        return [target]
    return [
        Target(f"{target.name}.{block}", target.module, width, width, row, target.transposed)
        for block, row in (("q", 0), ("v", 2 * width))
    ]


def _without_heads(model: PreTrainedModel, found: tuple[Target, ...]) -> tuple[Target, ...]:
    output = model.get_output_embeddings()
    heads = [*task_heads(model), *(name for name, module in model.named_modules() if module is output)]
    inside = tuple(f"{name}." for name in heads)
    return tuple(target for target in found if not f"{target.module}.".startswith(inside))
