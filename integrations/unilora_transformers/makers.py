"""Makers of inputs: text, images, sounds and series of the sizes that a model's config says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["MAKERS", "MEDIA", "Medium", "media_token", "plain_tokens", "token_types"]

TOKENS = 8


def plain_tokens(config: Any) -> Tensor:
    """Make different tokens of no special meaning, and the end token, which some heads look for."""
    text = config.get_text_config()
    ends = ("_token_id", "_token_index")
    named = [value for each in (config, text) for key, value in vars(each).items() if key.endswith(ends)]
    special = {token for value in named for token in (value if isinstance(value, list | tuple) else [value])}
    plain = [token for token in range(getattr(text, "vocab_size", None) or TOKENS) if token not in special]
    chosen = plain[1 : 1 + TOKENS] or [0]
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list | tuple) and end else end
    return torch.tensor([chosen + ([end] if config.is_encoder_decoder and isinstance(end, int) else [])])


def media_token(config: Any, which: str) -> int | None:
    """Return the token that an image or a sound stands at."""
    word = {"vision_config": "image", "audio_config": "audio"}[which]
    for name in (f"{word}_token_id", f"{word}_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def token_types(config: Any, tokens: Tensor) -> Tensor:
    """Return 1 where an image is, as some models want it beside the tokens."""
    return (tokens == (media_token(config, "vision_config") or -1)).long()


def _ones(config: Any) -> Tensor:
    return torch.ones_like(plain_tokens(config))


def _boxes(config: Any) -> Tensor:
    """Make the box of each token on the page."""
    return torch.tensor([0, 0, 5, 5]).expand(1, plain_tokens(config).shape[1], 4)


def _states(config: Any) -> Tensor:
    """Make what an encoder would give."""
    return _noise(1, TOKENS, getattr(config, "cross_attention_hidden_size", None) or config.hidden_size)


def _sides(config: Any) -> tuple[int, int]:
    vision = getattr(config, "vision_config", config)
    for name in ("image_size", "img_size", "input_size"):
        size = getattr(vision, name, None) or getattr(config, name, None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return size[0], size[1]
        if isinstance(size, dict):
            return size["height"], size["width"]
    return 224, 224


def _image(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    return _noise(1, getattr(vision, "num_channels", 3), *_sides(config))


def _image_or_video(config: Any) -> Tensor:
    frames = getattr(config, "num_frames", None)
    return _video(config) if isinstance(frames, int) and not hasattr(config, "vision_config") else _image(config)


def _video(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None) or 4
    return _noise(1, frames, getattr(vision, "num_channels", 3), *_sides(config))


def _patches_hidden(config: Any) -> Tensor:
    """Say whether each patch of an image, or each tube of a video, is hidden: every second one."""
    size = math.prod(side // patch for side, patch in zip(_sides(config), _pair(config.patch_size), strict=True))
    count = size * (getattr(config, "num_frames", 1) // getattr(config, "tubelet_size", 1))
    return (torch.arange(count) % 2 == 0)[None]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sound(config: Any) -> Tensor:
    """Make a spectrogram (1, bins, time)."""
    inner = [getattr(config, name, None) for name in ("audio_config", "encoder_config", "speech_config")]
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
    named = ((getattr(each, name, None)) for each in (config, *inner) for name in names)
    bins = next((value for value in named if isinstance(value, int)), 80)
    longest = max(getattr(each, "max_source_positions", None) or 0 for each in (config, *inner))
    return _noise(1, bins, 2 * min(longest, 1500) if longest else 256)


def _sound_by_time(config: Any) -> Tensor:
    return _sound(config).mT


def _heard(config: Any) -> Tensor:
    return torch.ones(1, _sound(config).shape[-1], dtype=torch.long)


def _wave(config: Any) -> Tensor:
    """Make a second of sound, or the spectrogram that some models call by the same name."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _noise(1, config.max_length, config.num_mel_bins)
    return _noise(1, 16000)


def _wave_of_channels(_config: Any) -> Tensor:
    return _noise(1, 1, 16000)


def _series(config: Any) -> Tensor:
    """Make a series as long as the model looks back."""
    lags = getattr(config, "lags_sequence", None) or [0]
    length = (getattr(config, "context_length", None) or 32) + max(lags)
    channels = getattr(config, "num_input_channels", None)
    return _noise(1, length, channels) if channels else _noise(1, length)


def _series_features(config: Any) -> Tensor:
    return _noise(1, _series(config).shape[1], max(getattr(config, "num_time_features", 0), 0))


def _series_seen(config: Any) -> Tensor:
    return torch.ones_like(_series(config))


def _future(config: Any) -> Tensor:
    return _noise(1, getattr(config, "prediction_length", None) or 1)


def _future_features(config: Any) -> Tensor:
    return _noise(1, _future(config).shape[1], max(getattr(config, "num_time_features", 0), 0))


def _noise(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape).cos()


def _no_cache(_config: Any) -> bool:
    return False


# ---- images and sounds among tokens --------------------------------------------------------------------------------


def _plain_image(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": _image(config)}


def _sized_image(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    """Make an image of several tiles, as LLaVA-NeXT takes it."""
    tiles = _image(config)[None].expand(1, 5, -1, -1, -1)
    return {"pixel_values": tiles, "image_sizes": torch.tensor([_sides(config)])}


def _image_and_size(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": _image(config), "image_sizes": torch.tensor([_sides(config)])}


def _tiles(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": _image(config)[None]}


def _patches(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    """Make the flat patches of an image and say how they lie, as Qwen's models take them."""
    vision = config.vision_config
    side = 2 * (getattr(vision, "spatial_merge_size", None) or 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    depth = channels * (getattr(vision, "temporal_patch_size", None) or 1) * math.prod(_pair(vision.patch_size))
    return {"pixel_values": _noise(side * side, depth), "image_grid_thw": torch.tensor([[1, side, side]])}


def _mel(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"input_features": _sound(config), "input_features_mask": _heard(config)}


def _mel_by_time(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"input_features": _sound_by_time(config), "input_features_mask": _heard(config)}


def _only_mel(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"input_features": _sound(config)}


@dataclass(frozen=True)
class Medium:
    """A kind of input that may stand among tokens.

    Attributes:
        config: the name of its part of the config.
        features: the model's method that makes features of it.
        makers: functions, each of which gives the method's arguments in one layout.
    """

    config: str
    features: str
    makers: tuple[Callable[[Any, PreTrainedModel], dict[str, Any]], ...]


MEDIA = (
    Medium("vision_config", "get_image_features", (_plain_image, _image_and_size, _sized_image, _patches, _tiles)),
    Medium("audio_config", "get_audio_features", (_mel, _mel_by_time, _only_mel)),
)

MAKERS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "input_ids": (plain_tokens,),
    "decoder_input_ids": (plain_tokens,),
    "qformer_input_ids": (plain_tokens,),
    "attention_mask": (_ones,),
    "encoder_hidden_states": (_states,),
    "use_cache": (_no_cache,),
    "bbox": (_boxes,),
    "pixel_values": (_image_or_video, _image),
    "pixel_values_videos": (_video,),
    "bool_masked_pos": (_patches_hidden,),
    "input_features": (_sound, _sound_by_time),
    "input_features_mask": (_heard,),
    "input_values": (_wave, _wave_of_channels),
    "past_values": (_series,),
    "past_time_features": (_series_features,),
    "past_observed_mask": (_series_seen,),
    "future_values": (_future,),
    "future_time_features": (_future_features,),
}
"""The makers of each input, by the name of the model's argument: they make it of the config, in one layout or
another.
"""
