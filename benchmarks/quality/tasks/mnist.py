"""Handwritten digits, by a base that knows photographs."""

import gzip

import numpy as np
import torch

from quality.tasks import Data, _small_vit, data_folder, split


def read() -> Data:
    """10,000 digits with a border of 2 pixels and three equal channels, 2,000 of them to judge on."""
    folder = data_folder("mnist_t10k")
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).tolist()
    pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, axis=1)
    return Data(*split(list(zip(torch.from_numpy(pixels), labels, strict=True)), 1000, 2000))


TASK = _small_vit.task("MNIST, small ViT", read, classes=10, augmented=False, examples=2000, epochs=5, batch=32)
