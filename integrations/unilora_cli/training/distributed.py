"""One run in several processes, as torchrun starts them: each has its part of every batch, all take the same steps."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from unilora_cli.console import CommandError, one_line
from unilora_cli.tasks.loading import device_of

__all__ = ["from_first", "gathered", "gone", "only_first", "processes", "rank", "shard", "started"]

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
        CommandError: no such device, the processes do not find each other, or another one is gone.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield device_of(device)
        return
    if device not in ("auto", "cuda", "cpu"):
        raise CommandError(
            f"--device {device}: with torchrun this is auto, cuda (each process has its own GPU) or cpu."
        )
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    try:
        own = torch.device("cpu") if on_cpu else device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        PartialState(cpu=on_cpu)
    except (RuntimeError, ValueError) as error:
        why = one_line(error, 200)
        raise CommandError(f"WORLD_SIZE is {count}, but there is no such group ({why}); use torchrun.") from error
    with contextlib.redirect_stdout(open(os.devnull, "w")) if rank() else contextlib.nullcontext(), gone():
        yield own
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # or another run of this process would find no group


@contextlib.contextmanager
def gone() -> Iterator[None]:
    """Say that another process is gone, where that is why there is no sum; what it died of it has said itself."""
    try:
        yield
    except RuntimeError as error:
        if processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            why = one_line(error, 120)
            raise CommandError(f"another process of this run is gone; see its message ({why})") from error
        raise


def shard(model: nn.Module, device: torch.device, trained: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Give each process a part of the base's weights (FSDP2), which are gathered layer by layer in every pass.

    Args:
        trained: what stays whole in each process: a step adds up its gradients as ever.

    Returns:
        The numbers of the base, and those of them that this process holds.

    Raises:
        CommandError: there is one process only.
    """
    if processes() == 1:
        raise CommandError("--shard parts the base between processes, and this is one; start it with torchrun.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = set(trained)
    how: dict[str, Any] = {"mesh": init_device_mesh(device.type, (processes(),)), "ignored_params": whole}
    for layer in _layers(model):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    parts: list[Any] = [parameter for parameter in model.parameters() if parameter not in whole]
    return sum(part.numel() for part in parts), sum(part.to_local().numel() for part in parts)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that a model has in lists; not what these have in lists of their own."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order, in each of them."""
    return gather_object([value]) if processes() > 1 else [value]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    values = [make() if rank() == 0 else None]
    return (broadcast_object_list(values) if processes() > 1 else values)[0]  # type: ignore[return-value]


def only_first(write: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing but in the first process."""

    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> None:
        if rank() == 0:
            write(*args, **kwargs)

    return written
