"""The task of `unilora finetune vit`: an image classifier of timm."""

import argparse
from typing import Any

import timm.data
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import unilora_timm
from unilora_cli.adapting import adapter_options, loader
from unilora_cli.data_images import ImageSet, load_images
from unilora_cli.data_records import draw, split_off
from unilora_cli.metrics import CLASSES
from unilora_cli.models import Base, build
from unilora_cli.task import Batch, Scores, Task

__all__ = ["score", "task"]


def task(arguments: argparse.Namespace) -> Task:
    """Images, model and adapter, as the arguments say."""
    train, held_out = load_images(arguments)
    base = Base(
        "vit",
        arguments.model,
        labels=train.classes,
        arguments=dict(arguments.model_arg),
        pretrained=not arguments.no_pretrained,
        checkpoint=arguments.checkpoint,
        seed=arguments.seed,
    )
    model, _ = build(base)
    for_training, for_reading, mode = _transforms(model, arguments)
    if held_out is None:
        kept, apart = split_off(len(train.labels), arguments.holdout, arguments.seed)
        tested: Dataset = ImageSet(train, apart, for_reading, mode)
    else:
        kept = list(range(len(train.labels)))
        tested = ImageSet(held_out, range(len(held_out.labels)), for_reading, mode)
    kept = [kept[i] for i in draw(len(kept), arguments.limit, arguments.seed)]
    example = ImageSet(train, kept[:1], for_reading, mode)[0]["x"].unsqueeze(0)
    trained = ImageSet(train, kept, for_training, mode)
    return Task(
        base=base,
        model=model,
        adapter=unilora_timm.attach(model, example=example, **adapter_options(arguments)),
        train=loader(trained, arguments, shuffle=True),
        held_out=loader(tested, arguments),
        score=score,
        metrics=(CLASSES["accuracy"],),
        notes=[("classes", len(train.classes)), ("image size", "x".join(map(str, example.shape[1:])))],
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy over a batch of images."""
    logits = model(batch["x"]).float()
    return Scores(F.cross_entropy(logits, batch["labels"]), len(logits), logits.argmax(-1))


def _transforms(model: nn.Module, arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """From an image to what the model takes, for training and for reading; and the image mode that fits."""
    wanted = {key: value for key, value in arguments.model_arg if key in ("img_size", "in_chans")}
    if isinstance(wanted.get("img_size"), (tuple, list)):
        wanted["input_size"] = (wanted.get("in_chans", 3), *wanted.pop("img_size"))
    config = timm.data.resolve_data_config(wanted, model=model)
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    reading = timm.data.create_transform(**config)
    training = {
        "none": lambda: reading,
        "crop": lambda: timm.data.create_transform(
            **config, is_training=True, scale=(0.6, 1.0), color_jitter=0.0, hflip=arguments.hflip
        ),
        "timm": lambda: timm.data.create_transform(**config, is_training=True, hflip=arguments.hflip),
    }[arguments.augment]()
    return training, reading, "L" if channels == 1 else "RGB"
