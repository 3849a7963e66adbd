"""Five classes of CIFAR-10 that the base has not seen."""

from quality.tasks import Data, _small_vit, split


def read() -> Data:
    """Training images to draw from and choose on, test images to judge on."""
    pool, validation, _ = split(_small_vit.cifar("train", 1), 1000)
    return Data(pool, validation, _small_vit.cifar("test", 1))


TASK = _small_vit.task("CIFAR-10, small ViT", read, classes=5, augmented=True, examples=2000, epochs=5, batch=32)
