"""What a classifier of images predicts, as tables and pictures: each prediction, the confusions, the worst mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unilora_cli.data.images import ImageSet
from unilora_cli.outputs import blank_figure, write_csv, write_png
from unilora_core.errors import printable

__all__ = ["Predictions", "draw_confusion", "draw_mistakes", "predict", "write_confusion", "write_predictions"]

NAMED = 40
"""Beyond this number of classes a picture shows their numbers only."""

WRITTEN = 12
"""Up to this number of classes the cells of the confusion matrix have figures."""

COLUMNS, ROWS = 6, 4


@dataclass(frozen=True)
class Predictions:
    """What a model makes of n images.

    Attributes:
        classes: the names of the classes.
        names: (n,), what the images are called.
        labels, predicted: (n,), classes.
        probability, of_label: (n,), the model's for the predicted class, and for the true one.
    """

    classes: tuple[str, ...]
    names: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    of_label: np.ndarray

    def confusion(self) -> np.ndarray:
        """(classes, classes), counts: row is the true class, column the predicted one."""
        counts = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def mistakes(self) -> np.ndarray:
        """Indices of the images that are taken for another class, the most confident first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")]


def predict(
    logits: Callable[[Tensor], Tensor], images: ImageSet, batch_size: int = 32, workers: int = 0
) -> Predictions:
    """What a model makes of the images of a set.

    Args:
        logits: (batch, channels, height, width) → (batch, classes).
    """
    found: list[tuple[Tensor, ...]] = []
    for batch in DataLoader(images, batch_size, num_workers=workers):
        probabilities = logits(batch["x"]).softmax(-1)
        best = probabilities.max(-1)
        true = probabilities.gather(1, batch["labels"][:, None])[:, 0]
        found.append((batch["labels"], best.indices, best.values, true))
    columns = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
    part = images.part
    return Predictions(part.source.classes, [part.source.name(i) for i in part.indices], *columns)


def write_predictions(path: Path, found: Predictions) -> None:
    """A row per image: its name, the true and the predicted class, and the model's probability of either."""
    rows = [["file", "true", "predicted", "probability", "probability_of_true"]]
    columns = (found.names, found.labels, found.predicted, found.probability, found.of_label)
    for name, label, guess, probability, of_label in zip(*columns, strict=True):
        classes = (found.classes[label], found.classes[guess])
        rows.append([name, *classes, f"{probability:.4f}", f"{of_label:.4f}"])
    write_csv(path, rows)


def write_confusion(path: Path, found: Predictions) -> None:
    """A row per true class, a column per predicted class: counts."""
    counts = zip(found.classes, found.confusion().tolist(), strict=True)
    write_csv(path, [["true", *found.classes], *([name, *row] for name, row in counts)])


def draw_confusion(path: Path, found: Predictions) -> None:
    """The confusion matrix, as parts of each true class; a class without an image is an empty row."""
    counts, n = found.confusion(), len(found.classes)
    totals = counts.sum(1, keepdims=True)
    parts = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    side = min(12.0, max(4.5, 2.5 + 0.28 * n))
    figure = blank_figure(side + 0.8, side)
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    image = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.7, label="part of the true class")
    if n <= NAMED:
        names = [_short(name, 18) for name in found.classes]
        axes.set_xticks(range(n), names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        axes.tick_params(labelsize=8)
    if n <= WRITTEN:
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = parts[row, column] > 0.5
            text = f"{100 * parts[row, column]:.0f} %"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    right = int(counts.trace())
    axes.set_title(f"{right:,} of {counts.sum():,} right", fontsize=10)
    write_png(figure, path)


def draw_mistakes(path: Path, found: Predictions, image: Callable[[int], Tensor]) -> bool:
    """A sheet of the most confident mistakes; False, and no picture, where there is none.

    Args:
        image: index → (height, width, channels) of 0 to 1, as the model saw it.
    """
    path.unlink(missing_ok=True)  # one of an earlier run
    mistakes = found.mistakes()
    shown = mistakes[: COLUMNS * ROWS]
    if not len(shown):
        return False
    columns = min(COLUMNS, len(shown))
    width, height = 2.2 * max(columns, 3), 2.8 * -(-len(shown) // columns) + 0.4
    figure = blank_figure(width, height, layout=None)
    figure.suptitle(f"the {len(shown)} most confident of {len(mistakes):,} mistakes: true → predicted", fontsize=10)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches: one for each image would take seconds
    axes.set_axis_off()
    for place, index in enumerate(shown):
        row, column = divmod(place, columns)
        left, bottom = 0.1 + 2.2 * column, height - 0.3 - 2.8 * (row + 1)
        pixels = image(int(index)).numpy()
        grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if pixels.shape[-1] == 1 else {}
        axes.imshow(pixels, extent=(left, left + 2, bottom, bottom + 2), aspect="auto", **grey)
        true, guess = (_short(found.classes[c[index]], 22) for c in (found.labels, found.predicted))
        text = f"{true}\n→ {guess}, {100 * found.probability[index]:.0f} %\n{_short(Path(found.names[index]).name, 26)}"
        axes.text(left + 1, bottom + 2.05, text, ha="center", fontsize=7, parse_math=False)
    axes.set(xlim=(0, width), ylim=(0, height))
    write_png(figure, path)
    return True


def _short(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
