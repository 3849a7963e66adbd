"""Inputs made up from a model's config, to run it once and see that no target is dead."""

import contextlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from unilora_core import TargetError
from unilora_torch import Adapter
from unilora_torch.untouched import untouched
from unilora_torch.verifying import verify

__all__ = ["check", "made_up_inputs"]

TOKENS, LONGER = 8, 8


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
    failed: dict[type[Exception], str] = {}
    for inputs in made_up_inputs(model):
        seen = f"made-up inputs {sorted(inputs)}"
        try:
            asleep = verify(adapter, (), inputs, whole=TargetError in failed)  # it tells of a bypassed layer once
        except TargetError as error:  # others may tell more: attention over one token has no gradient
            failed.setdefault(TargetError, f"{error} (Seen with {seen}; if the model needs others, ")
        except Exception as error:  # whatever a model raises on inputs that it was not made for
            failed.setdefault(
                Exception,
                f"unilora: {type(model).__name__} does not run on {seen} ({error!r:.200}), so its targets are "
                "unchecked; ",
            )
        else:
            if asleep:
                _warn_of(asleep, seen)
            return
    if TargetError in failed:
        raise TargetError(f"{failed[TargetError]}give attach a batch of them: example=…)")
    warnings.warn(f"{failed[Exception]}give attach a batch: example=…", stacklevel=3)


def _warn_of(asleep: list[str], seen: str) -> None:
    warnings.warn(
        f"unilora: {asleep[0]}: {seen} do not run this part of the model ({len(asleep)} such targets), so it is "
        "unchecked. If your data do not run it either, exclude it: θ_d would change it, trained by the other parts. If "
        "they do, give attach a batch: example=…",
        stacklevel=4,
    )


def made_up_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try, the fullest first: one sequence of a few tokens, one image, video, sound or series, or a sequence
    with images or sounds in it, as the model's `forward` takes them.
    """
    seen: list[dict[str, Any]] = []
    plain = list(_plain(model))
    for inputs in (*_with_media(model), *plain, *map(_longer, plain)):
        shapes = {key: getattr(value, "shape", value) for key, value in inputs.items()}
        if shapes not in seen:
            seen.append(shapes)
            yield {key: _like(model, value) for key, value in inputs.items()}


def _plain(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """All that is made of the config alone, in each layout that a class may have."""
    config, kind = model.config, type(model).__name__
    for layout in range(2):
        makers = {name: layouts[min(layout, len(layouts) - 1)] for name, layouts in MAKERS.items()}
        wanted = {}
        for name, make in makers.items():
            if _wants(model, name):
                with contextlib.suppress(Exception):  # a config of other fields: the model will say what it lacks
                    wanted[name] = make(config)
        if kind.endswith("MultipleChoice"):
            wanted = {name: _choices(value) for name, value in wanted.items()}
        yield wanted
        yield {name: value for name, value in wanted.items() if _needs(model, name) or name == "use_cache"}


def _longer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """More of the same tokens: some models pool them, or attend within blocks of them."""
    ids = inputs.get("input_ids")
    length = ids.shape[1] if isinstance(ids, Tensor) else None
    return {
        name: torch.cat([value] * LONGER, dim=1) if isinstance(value, Tensor) and value.shape[1] == length else value
        for name, value in inputs.items()
    }


def _wants(model: PreTrainedModel, name: str) -> bool:
    """Whether a model is given what its `forward` may take under a name."""
    if not _takes(model, name):
        return False
    if name == "encoder_hidden_states":  # of a decoder alone
        parts = {each.rpartition(".")[2] for each, _ in model.named_modules()}
        return not _takes(model, "decoder_input_ids") and bool(parts & CROSS_ATTENTION)
    if name == "decoder_input_ids":
        return model.config.is_encoder_decoder or hasattr(model.config, "vision_config")
    paired = name in PAIRED and hasattr(model.config, PAIRED[name]) and _media_token(model.config, PAIRED[name]) is None
    return paired or name in ALWAYS or _needs(model, name)


def _needs(model: PreTrainedModel, name: str) -> bool:
    """Whether it cannot do without."""
    parameter, main = inspect.signature(model.forward).parameters.get(name), model.main_input_name
    return parameter is not None and (parameter.default is inspect.Parameter.empty or name in (main, *main))


def _with_media(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Tokens and an image or a sound, or both, with as many tokens of its kind as it has features."""
    found = [list(_placed(model, medium)) for medium in MEDIA]
    for chosen in itertools.product(*(each or [{}] for each in found)):
        if any(chosen):
            ids = [each.pop("input_ids") for each in map(dict, chosen) if each]
            others = {name: value for each in chosen for name, value in each.items() if name != "input_ids"}
            tokens = torch.cat([_tokens(model.config), *ids], dim=1)
            extra = {"use_cache": False, "attention_mask": torch.ones_like(tokens)}
            extra |= {"mm_token_type_ids": _token_types(model.config, tokens)}
            extra = {name: value for name, value in extra.items() if _takes(model, name)}
            yield {"input_ids": tokens, **others, **extra}


def _placed(model: PreTrainedModel, medium: "Medium") -> Iterator[dict[str, Any]]:
    """What a medium is given as, and its tokens; nothing where the model has no such medium."""
    config, features = model.config, getattr(model, medium.features, None)
    token = _media_token(config, medium.config)
    if token is None or features is None or not isinstance(getattr(config, medium.config, None), PreTrainedConfig):
        return
    for make in medium.makers:
        with contextlib.suppress(Exception), untouched(model), torch.no_grad():  # whatever it raises on a wrong layout
            model.eval()
            given = {name: _like(model, value) for name, value in make(config, model).items()}
            count = _count(features(**given), config.get_text_config().hidden_size)
            if 0 < count <= MOST_FEATURES:
                yield {"input_ids": torch.full((1, count), token), **given}


def _count(features: Any, width: int) -> int:
    """How many tokens these features take the place of."""
    features = getattr(features, "pooler_output", features)
    return sum(leaf.numel() for leaf in tree_leaves(features) if isinstance(leaf, Tensor)) // width


def _media_token(config: Any, which: str) -> int | None:
    """The token that an image or a sound stands at."""
    word = {"vision_config": "image", "audio_config": "audio"}[which]
    for name in (f"{word}_token_id", f"{word}_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def _token_types(config: Any, tokens: Tensor) -> Tensor:
    """1 where an image is, as some models want it beside the tokens."""
    return (tokens == (_media_token(config, "vision_config") or -1)).long()


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _like(model: PreTrainedModel, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


# ---- what inputs are made of ---------------------------------------------------------------------------------------


def _tokens(config: Any) -> Tensor:
    """Different tokens of no special meaning, and the end token, which some heads look for."""
    text = config.get_text_config()
    ends = ("_token_id", "_token_index")
    named = [value for each in (config, text) for key, value in vars(each).items() if key.endswith(ends)]
    special = {token for value in named for token in (value if isinstance(value, list | tuple) else [value])}
    plain = [token for token in range(getattr(text, "vocab_size", None) or TOKENS) if token not in special]
    chosen = plain[1 : 1 + TOKENS] or [0]
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list | tuple) and end else end
    return torch.tensor([chosen + ([end] if config.is_encoder_decoder and isinstance(end, int) else [])])


def _ones(config: Any) -> Tensor:
    return torch.ones_like(_tokens(config))


def _boxes(config: Any) -> Tensor:
    """Where each token is on the page."""
    return torch.tensor([0, 0, 5, 5]).expand(1, _tokens(config).shape[1], 4)


def _states(config: Any) -> Tensor:
    """What an encoder would give."""
    return _noise(1, TOKENS, getattr(config, "cross_attention_hidden_size", None) or config.hidden_size)


def _choices(value: Any) -> Any:
    """The same for two choices."""
    return torch.stack([value, value], dim=1) if isinstance(value, Tensor) else value


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
    """Whether each patch of an image, or each tube of a video, is hidden: every second one."""
    size = math.prod(side // patch for side, patch in zip(_sides(config), _pair(config.patch_size), strict=True))
    count = size * (getattr(config, "num_frames", 1) // getattr(config, "tubelet_size", 1))
    return (torch.arange(count) % 2 == 0)[None]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sound(config: Any) -> Tensor:
    """(1, bins, time)"""
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
    """A second of sound, or the spectrogram that some models call by the same name."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _noise(1, config.max_length, config.num_mel_bins)
    return _noise(1, 16000)


def _wave_of_channels(_config: Any) -> Tensor:
    return _noise(1, 1, 16000)


def _series(config: Any) -> Tensor:
    """A series as long as the model looks back."""
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
    """An image of several tiles, as LLaVA-NeXT takes it."""
    tiles = _image(config)[None].expand(1, 5, -1, -1, -1)
    return {"pixel_values": tiles, "image_sizes": torch.tensor([_sides(config)])}


def _image_and_size(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": _image(config), "image_sizes": torch.tensor([_sides(config)])}


def _tiles(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    return {"pixel_values": _image(config)[None]}


def _patches(config: Any, _model: PreTrainedModel) -> dict[str, Any]:
    """The flat patches of an image and how they lie, as Qwen's models take them."""
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
    """What may stand among tokens.

    Attributes:
        config: the name of its part of the config.
        features: the model's method that makes features of it.
        makers: each gives the method's arguments in one layout.
    """

    config: str
    features: str
    makers: tuple[Callable[[Any, PreTrainedModel], dict[str, Any]], ...]


MEDIA = (
    Medium("vision_config", "get_image_features", (_plain_image, _image_and_size, _sized_image, _patches, _tiles)),
    Medium("audio_config", "get_audio_features", (_mel, _mel_by_time, _only_mel)),
)
MOST_FEATURES = 1024
"""More tokens than these are not tried: the run would take long, and much memory."""

CROSS_ATTENTION = {"encoder_attn", "crossattention", "EncDecAttention"}
"""What the attention to an encoder is called."""

PAIRED = {"pixel_values": "vision_config", "input_features": "audio_config"}
"""What is given beside tokens where the config has such a part."""

ALWAYS = {"use_cache", "bbox", "past_time_features", "past_observed_mask", "future_values"}
ALWAYS |= {"future_time_features", "bool_masked_pos"}
"""What is given wherever a model takes it."""

MAKERS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "input_ids": (_tokens,),
    "decoder_input_ids": (_tokens,),
    "qformer_input_ids": (_tokens,),
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
"""Each name under which a model may take inputs → what makes them of the config, in one layout or another."""
