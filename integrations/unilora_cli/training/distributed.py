"""One run in several processes, as torchrun starts them: each has its part of every batch, all take the same steps.

The gradient of a step is d numbers and those of the head. So the processes add it up once, after the backward pass, and
the model needs no wrapper.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unilora_cli.console import CommandError, one_line
from unilora_cli.loading import device_of

__all__ = ["average", "from_first", "gathered", "only_first", "processes", "rank", "started"]

T = TypeVar("T")


def processes() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; the first writes all files and prints."""
    return dist.get_rank() if processes() > 1 else 0


@contextlib.contextmanager
def started(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, where it did; the device of this one.

    After an error the group is left as it is: the others may wait in a sum that never comes, until torchrun ends them.

    Raises:
        CommandError: no such device, or the processes do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield device_of(device)
        return
    own = _device_of_process(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        why = one_line(error, 200)
        raise CommandError(f"WORLD_SIZE is {count}, but there is no such group ({why}); use torchrun.") from error
    with contextlib.ExitStack() as stack:
        if rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield own
    dist.destroy_process_group()


def _device_of_process(name: str) -> torch.device:
    """GPU number LOCAL_RANK, where the run is on GPUs."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise CommandError(f"--device {name}: with torchrun this is auto, cuda (each process has its own GPU) or cpu.")
    own = device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    torch.cuda.set_device(own)
    return own


def average(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in the place of each tensor; they travel as one vector."""
    sums = torch.cat([tensor.flatten() for tensor in tensors])
    with _others():
        dist.all_reduce(sums)
    for tensor, part in zip(tensors, (sums / processes()).split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order, in each of them."""
    values: list[Any] = [value] * processes()
    if processes() > 1:
        with _others():
            dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    values: list[Any] = [make() if rank() == 0 else None]
    if processes() > 1:
        with _others():
            dist.broadcast_object_list(values)
    return values[0]


def only_first(write: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing but in the first process."""

    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> None:
        if rank() == 0:
            write(*args, **kwargs)

    return written


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """Say that another process is gone; what it died of it has said itself."""
    try:
        yield
    except RuntimeError as error:
        raise CommandError(f"another process of this run is gone; see its message ({one_line(error, 120)})") from error
