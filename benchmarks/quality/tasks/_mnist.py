"""10,000 handwritten digits."""

import gzip

import numpy as np
import torch
from torch import Tensor

from quality.tasks import data_folder


def digits() -> list[tuple[Tensor, int]]:
    """Pixels (28, 28) uint8 and labels, in the order of the file."""
    folder = data_folder("mnist_t10k")
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).tolist()
    return list(zip(torch.from_numpy(pixels.copy()), labels, strict=True))
