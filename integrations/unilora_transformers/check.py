"""Inputs made up from a model's config, to run it once and see that no target is dead."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unilora_core import TargetError
from unilora_torch import Adapter

__all__ = ["check", "made_up_inputs"]

TOKENS = 8


def check(model: PreTrainedModel, adapter: Adapter, example: Mapping[str, Any] | None = None) -> None:
    """Run the model on ``example``, or on made-up inputs; see `Adapter.verify`.

    A model that cannot run on made-up inputs is left unchecked, with a warning: its first forward pass still checks
    that the targets are reached.
    So it is, without one, where DeepSpeed's ZeRO-3 has no values until its engine runs the model.

    Raises:
        TargetError: a target that is bypassed, or through which no gradient flows.
    """
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        return
    if example is not None:
        adapter.verify(**{"use_cache": False} | dict(example) if _takes(model, "use_cache") else dict(example))
        return
    inputs = made_up_inputs(model)
    try:
        adapter.verify(**inputs)
    except TargetError as error:
        raise TargetError(
            f"{error} (Seen with made-up inputs {sorted(inputs)}; if the model needs others, give attach a batch of "
            "them: example=…)"
        ) from error
    except Exception as error:  # whatever a model raises on inputs that it was not made for
        warnings.warn(
            f"unilora: {type(model).__name__} does not run on made-up inputs {sorted(inputs)} ({error!r:.200}), so its "
            "targets are unchecked; give attach a batch: example=…",
            stacklevel=3,
        )


def made_up_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """One sequence of a few tokens, one image or one sound, as the model's `forward` takes them."""
    config, name = model.config, model.main_input_name
    inputs: dict[str, Any] = {}
    if name == "input_ids":
        inputs |= {"input_ids": _tokens(config), "decoder_input_ids": _tokens(config), "use_cache": False}
    if name == "pixel_values" or (hasattr(config, "vision_config") and not hasattr(config, "image_token_id")):
        inputs["pixel_values"] = _image(config)
    if name == "input_features":
        inputs |= {name: _sound(config), "decoder_input_ids": _tokens(config), "use_cache": False}
    if name == "input_values":
        inputs[name] = _noise(1, 16000)
    if not config.is_encoder_decoder:
        inputs.pop("decoder_input_ids", None)
    return {key: _like(model, value) for key, value in inputs.items() if _takes(model, key)}


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _like(model: PreTrainedModel, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _tokens(config: Any) -> Tensor:
    """Different tokens of no special meaning, and the end token, which some heads look for."""
    text = config.get_text_config()
    ends = ("_token_id", "_token_index")
    special = {value for each in (config, text) for key, value in vars(each).items() if key.endswith(ends)}
    plain = [token for token in range(getattr(text, "vocab_size", TOKENS)) if token not in special]
    chosen = plain[1 : 1 + TOKENS] or [0]
    end = getattr(text, "eos_token_id", None)
    return torch.tensor([chosen + ([end] if config.is_encoder_decoder and isinstance(end, int) else [])])


def _image(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return _noise(1, getattr(vision, "num_channels", 3), height, width)


def _sound(config: Any) -> Tensor:
    return _noise(1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500))


def _noise(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape).cos()
