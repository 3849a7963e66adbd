"""Handwritten digits, by a base that knows photographs."""

from torch.nn.functional import pad

from quality.tasks import Data, _mnist, _small_vit, split


def read() -> Data:
    """With a border of 2 pixels and three equal channels; 1,000 to choose on, 2,000 to judge on."""
    images = [(pad(pixels, (2, 2, 2, 2)).expand(3, 32, 32), label) for pixels, label in _mnist.digits()]
    return Data(*split(images, 1000, 2000))


TASK = _small_vit.task("MNIST, small ViT", read, classes=10, augmented=False, examples=2000, epochs=5, batch=32)
