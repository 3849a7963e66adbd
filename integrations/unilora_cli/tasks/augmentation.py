"""What is done to images before a model of timm sees them: timm's own transforms, mixup and CutMix."""

from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn
from torch.utils.data import default_collate

from unilora_cli.console import CommandError
from unilora_cli.options.finetune import Augmentation, Vit
from unilora_cli.tasks.models import readable_errors

__all__ = ["Mixing", "Transforms", "mixing", "transforms"]

PRESETS: dict[str, dict[str, Any]] = {"crop": {"scale": (0.6, 1.0), "color_jitter": 0.0}, "timm": {}}
"""What ``--augment`` means in terms of timm's `create_transform`, beside none, the transform for reading."""

OPTIONS = {
    "scale": "scale",
    "hflip": "hflip",
    "vflip": "vflip",
    "color_jitter": "color_jitter",
    "aa": "auto_augment",
    "reprob": "re_prob",
}
"""Options that refine a preset → their names in `create_transform`."""


@dataclass(frozen=True)
class Transforms:
    """From a PIL image to what the model takes.

    Attributes:
        mode: the mode of image that they take: RGB, or L for models of one channel.
        mean, std: per channel, what was taken away and divided by.
    """

    training: Any
    reading: Any
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def shown(self, x: Tensor) -> Tensor:
        """(channels, height, width) as the model takes it → (height, width, channels) of 0 to 1, to be looked at."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1).permute(1, 2, 0)


def transforms(model: nn.Module, options: Vit) -> Transforms:
    """The transforms for a model, of the size and normalisation that its config has.

    Raises:
        CommandError: an option that timm does not take, or one that ``--augment none`` leaves without effect.
    """
    wanted = {key: value for key, value in options.model_arg if key in ("img_size", "in_chans")}
    wanted |= {key: getattr(options, key) for key in ("crop_pct", "interpolation")}
    if isinstance(wanted.get("img_size"), (tuple, list)):
        wanted["input_size"] = (wanted.get("in_chans", 3), *wanted.pop("img_size"))
    config = timm.data.resolve_data_config(wanted, model=model)
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    reading = timm.data.create_transform(**config)
    if options.augment == "none" and (given := _given(options)):
        option = next(option for option, key in OPTIONS.items() if key in given)
        raise CommandError(f"--{option.replace('_', '-')} has no effect with --augment none; leave one out.")
    return Transforms(
        training=reading if options.augment == "none" else _for_training(config, options),
        reading=reading,
        mode="L" if channels == 1 else "RGB",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _for_training(config: dict[str, Any], options: Augmentation) -> Any:
    given = _given(options)
    if "color_jitter" in given and "auto_augment" in given:
        raise CommandError("--color-jitter has no effect beside --aa, which changes the colours itself; leave one out.")
    noise = {"re_mode": "pixel"} if "re_prob" in given else {}  # and not grey
    with readable_errors("cannot make the transforms for training (--aa, --scale, …)"):
        return timm.data.create_transform(**config | PRESETS[options.augment] | given | noise, is_training=True)


def _given(options: Augmentation) -> dict[str, Any]:
    values = {key: getattr(options, option) for option, key in OPTIONS.items()}
    return {key: value for key, value in values.items() if value is not None}


class Mixing:
    """From examples to a batch whose images are mixed in pairs, and whose labels are (batch, classes) probabilities.

    timm's `Mixup` draws from NumPy's global generator and mixes the i-th image with the i-th from the end; the last
    image of an odd batch stays as it is.
    """

    def __init__(self, classes: int, smoothing: float = 0.0, mixup: Mixup | None = None):
        self.classes, self.smoothing, self.mixup = classes, smoothing, mixup

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """(images, labels) of integers → (images, labels) of probabilities."""
        batch = default_collate(examples)
        labels = mixup_target(batch["labels"], self.classes, smoothing=self.smoothing)
        even = len(labels) // 2 * 2
        if self.mixup is not None and even:
            batch["x"][:even], labels[:even] = self.mixup(batch["x"][:even], batch["labels"][:even])
        return {"x": batch["x"], "labels": labels}


def mixing(classes: int, options: Augmentation) -> Mixing | None:
    """How the batches for training are made; None for plain ones."""
    mixup = None
    if options.mixup or options.cutmix:
        mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            label_smoothing=options.smoothing,
            num_classes=classes,
        )
    return Mixing(classes, options.smoothing, mixup) if mixup or options.smoothing else None
