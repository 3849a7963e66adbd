"""Inputs to run a model on once, made up from its config and from what its `forward` takes."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from unilora_torch.untouched import untouched
from unilora_transformers.makers import MAKERS, MEDIA, Medium, media_token, plain_tokens, token_types

__all__ = ["made_up_inputs", "takes"]

LONGER = 8
"""The factor on the number of tokens, where a few are not enough."""

MOST_FEATURES = 1024
"""The largest number of tokens that is tried: a run with more would take long, and much memory."""

CROSS_ATTENTION = {"encoder_attn", "crossattention", "EncDecAttention"}
"""The names of the attention to an encoder."""

PAIRED = {"pixel_values": "vision_config", "input_features": "audio_config"}
"""The inputs that are given beside tokens where the config has such a part."""

ALWAYS = {"use_cache", "bbox", "past_time_features", "past_observed_mask", "future_values"}
ALWAYS |= {"future_time_features", "bool_masked_pos"}
"""The inputs that are given wherever a model takes them."""


def made_up_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the fullest first: one sequence of a few tokens, one image, video, sound or series, or a
    sequence with images or sounds in it, as the model's `forward` takes them.
    """
    seen: list[dict[str, Any]] = []
    plain = list(_plain(model))
    for inputs in (*_with_media(model), *plain, *map(_longer, plain)):
        shapes = {key: getattr(value, "shape", value) for key, value in inputs.items()}
        if shapes not in seen:
            seen.append(shapes)
            yield {key: _like(model, value) for key, value in inputs.items()}


def _plain(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield all that is made of the config alone, in each layout that a class may have."""
    config, kind = model.config, type(model).__name__
    for layout in range(2):
        makers = {name: layouts[min(layout, len(layouts) - 1)] for name, layouts in MAKERS.items()}
        wanted = {}
        for name, make in makers.items():
            if _wants(model, name):
                with contextlib.suppress(Exception):  # the config may lack fields: the model will say so
                    wanted[name] = make(config)
        if kind.endswith("MultipleChoice"):
            wanted = {name: _choices(value) for name, value in wanted.items()}
        yield wanted
        yield {name: value for name, value in wanted.items() if _needs(model, name) or name == "use_cache"}


def _longer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return more of the same tokens: some models pool them, or attend within blocks of them."""
    ids = inputs.get("input_ids")
    length = ids.shape[1] if isinstance(ids, Tensor) else None
    return {
        name: torch.cat([value] * LONGER, dim=1) if isinstance(value, Tensor) and value.shape[1] == length else value
        for name, value in inputs.items()
    }


def _choices(value: Any) -> Any:
    """Return the same input for two choices."""
    return torch.stack([value, value], dim=1) if isinstance(value, Tensor) else value


def _wants(model: PreTrainedModel, name: str) -> bool:
    """Say whether a model is given what its `forward` may take under a name."""
    if not takes(model, name):
        return False
    if name == "encoder_hidden_states":  # a decoder alone takes it
        parts = {each.rpartition(".")[2] for each, _ in model.named_modules()}
        return not takes(model, "decoder_input_ids") and bool(parts & CROSS_ATTENTION)
    if name == "decoder_input_ids":
        return model.config.is_encoder_decoder or hasattr(model.config, "vision_config")
    paired = name in PAIRED and hasattr(model.config, PAIRED[name]) and media_token(model.config, PAIRED[name]) is None
    return paired or name in ALWAYS or _needs(model, name)


def _needs(model: PreTrainedModel, name: str) -> bool:
    """Say whether the model cannot run without this input."""
    parameter, main = inspect.signature(model.forward).parameters.get(name), model.main_input_name
    return parameter is not None and (parameter.default is inspect.Parameter.empty or name in (main, *main))


def _with_media(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield tokens and an image or a sound, or both, with as many tokens of its kind as it has features."""
    found = [list(_placed(model, medium)) for medium in MEDIA]
    for chosen in itertools.product(*(each or [{}] for each in found)):
        if any(chosen):
            ids = [each.pop("input_ids") for each in map(dict, chosen) if each]
            others = {name: value for each in chosen for name, value in each.items() if name != "input_ids"}
            tokens = torch.cat([plain_tokens(model.config), *ids], dim=1)
            extra = {"use_cache": False, "attention_mask": torch.ones_like(tokens)}
            extra |= {"mm_token_type_ids": token_types(model.config, tokens)}
            extra = {name: value for name, value in extra.items() if takes(model, name)}
            yield {"input_ids": tokens, **others, **extra}


def _placed(model: PreTrainedModel, medium: Medium) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a medium, and its tokens; nothing where the model has no such medium."""
    config, features = model.config, getattr(model, medium.features, None)
    token = media_token(config, medium.config)
    if token is None or features is None or not isinstance(getattr(config, medium.config, None), PreTrainedConfig):
        return
    for make in medium.makers:
        with contextlib.suppress(Exception), untouched(model), torch.no_grad():  # a wrong layout may raise anything
            model.eval()
            given = {name: _like(model, value) for name, value in make(config, model).items()}
            count = _count(features(**given), config.get_text_config().hidden_size)
            if 0 < count <= MOST_FEATURES:
                yield {"input_ids": torch.full((1, count), token), **given}


def _count(features: Any, width: int) -> int:
    """Count the tokens that these features take the place of."""
    features = getattr(features, "pooler_output", features)
    return sum(leaf.numel() for leaf in tree_leaves(features) if isinstance(leaf, Tensor)) // width


def takes(model: PreTrainedModel, name: str) -> bool:
    """Say whether its `forward` has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def _like(model: PreTrainedModel, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
