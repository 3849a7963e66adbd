"""The task of `unilora finetune vit`: an image classifier of timm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import unilora_timm
from unilora_cli.console import say
from unilora_cli.data.images import Images, ImageSet, Part, load_images
from unilora_cli.options.finetune import Vit
from unilora_cli.tasks import augmentation, pictures
from unilora_cli.tasks.adapting import adapter_options, check_classes, loader
from unilora_cli.tasks.models import Base, build, readable_errors
from unilora_cli.tasks.task import Batch, Scores, Task
from unilora_cli.training.metrics import CLASSES, TOP_5

__all__ = ["score", "task"]

GUESSES = 5


def task(options: Vit) -> Task:
    """Images, model and adapter, as the options say."""
    images = load_images(options)
    check_classes(options, len(images.classes))
    base = Base(
        "vit",
        options.model,
        labels=images.classes,
        arguments=_model_options(options),
        pretrained=not options.no_pretrained,
        checkpoint=options.checkpoint,
        seed=options.seed,
    )
    model, _ = build(base)
    transforms = augmentation.transforms(model, options)

    def read(part: Part) -> ImageSet:
        return ImageSet(part, transforms.reading, transforms.mode)

    with readable_errors("cannot make an input of the first image (--crop-pct, --model-arg img_size=…)"):
        example = read(images.train)[0]["x"].unsqueeze(0)
    with readable_errors(f"cannot adapt {options.model!r}"):
        adapter = unilora_timm.attach(model, example=example, **adapter_options(options))
    trained = ImageSet(images.train, transforms.training, transforms.mode)
    shown = read(images.held_out if images.test is None else images.test)
    return Task(
        base=base,
        model=model,
        adapter=adapter,
        train=loader(trained, options, augmentation.mixing(len(images.classes), options), shuffle=True),
        held_out=loader(read(images.held_out), options),
        score=score,
        metrics=(CLASSES["accuracy"], *([TOP_5] if len(images.classes) > GUESSES else [])),
        notes=_notes(images, example),
        facts={"skipped_images": [{"file": name, "why": why} for name, why in images.skipped]},
        test=None if images.test is None else loader(read(images.test), options),
        look=_looking(shown, options, transforms),
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy over a batch of images; of mixed ones, with the probabilities that are their labels."""
    logits = model(batch["x"]).float()
    guesses = logits.topk(min(GUESSES, logits.shape[1])).indices
    return Scores(F.cross_entropy(logits, batch["labels"]), len(logits), guesses)


def _model_options(options: Vit) -> dict[str, Any]:
    """What timm's `create_model` is given."""
    rates = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
    return dict(options.model_arg) | {name: value for name, value in rates.items() if value is not None}


def _notes(images: Images, example: Tensor) -> list[tuple[str, Any]]:
    notes: list[tuple[str, Any]] = [("classes", len(images.classes))]
    notes.append(("image size", "x".join(map(str, example.shape[1:]))))
    notes += images.notes
    if images.test is not None:
        notes.append(("test", f"{len(images.test.indices):,} examples, scored once at the end"))
    if images.skipped:
        notes.append(("skipped", f"{len(images.skipped):,} images that do not decode, named in metrics.json"))
    return notes


def _looking(
    images: ImageSet, options: Vit, transforms: augmentation.Transforms
) -> Callable[[Callable[[Tensor], Tensor], Path], list[str]]:
    """See `Task.look`: predictions and confusions as tables and pictures."""

    def look(logits: Callable[[Tensor], Tensor], folder: Path) -> list[str]:
        found = pictures.predict(logits, images, options.batch_size, options.workers)
        pictures.write_predictions(folder / "predictions.csv", found)
        pictures.write_confusion(folder / "confusion.csv", found)
        pictures.draw_confusion(folder / "confusion.png", found)
        written = ["predictions.csv", "confusion.csv", "confusion.png"]
        if pictures.draw_mistakes(folder / "mistakes.png", found, lambda i: transforms.shown(images[i]["x"])):
            return [*written, "mistakes.png"]
        say(f"  no mistake among {len(found.labels):,} images, so there is no mistakes.png")
        return written

    return look
