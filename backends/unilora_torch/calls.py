"""Code around the call of a module: what a call leaves behind is removed when it ends, whatever ends it.

A forward hook cannot do that: PyTorch runs none after a KeyboardInterrupt, a SystemExit or a GeneratorExit. So the
module gets a ``_call_impl`` of its own, an attribute that `nn.Module.__call__` finds before the class's; its class,
its ``forward`` and its place in the `state_dict` stay. torch.compile takes the class's: a graph leaves no state behind.
"""

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Around", "Call", "CallHandle", "Handle", "runs_elsewhere", "surround"]


class Around(Protocol):
    """A protocol: an object that stands around the call of a module."""

    def around(self, run: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        """Return the result of ``run(module)``, or of a module in its place."""


class Handle(Protocol):
    """A protocol: an object that takes a hook off again."""

    def remove(self) -> None:
        """Leave the module as it was; more than once does no harm."""


class Call:
    """The ``_call_impl`` of one module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.arounds: tuple[Around, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own ``_call_impl`` inside of what stands around it."""

        def run(module: nn.Module) -> Any:
            return type(module)._call_impl(module, *args, **kwargs)

        if not torch.compiler.is_compiling():
            for each in self.arounds:
                run = functools.partial(each.around, run)
        return run(self.module)


@dataclass(frozen=True)
class CallHandle:
    """A handle that takes off what `surround` put around a call, as the handle of a hook does."""

    call: Call
    around: Around

    def remove(self) -> None:
        """Leave the module as it was; more than once does no harm."""
        self.call.arounds = tuple(each for each in self.call.arounds if each is not self.around)
        if not self.call.arounds and vars(self.call.module).get("_call_impl") is self.call:
            del self.call.module._call_impl


def surround(module: nn.Module, around: Around) -> CallHandle:
    """Put something around every call of a module, outside of its hooks."""
    call = vars(module).get("_call_impl")
    if not isinstance(call, Call):
        call = vars(module)["_call_impl"] = Call(module)
    call.arounds += (around,)
    return CallHandle(call, around)


def runs_elsewhere(model: nn.Module) -> bool:
    """Say whether another thread is inside a call of the model or of a module in it. The stacks of the threads tell it,
    so no call has to count.
    """
    modules, mine = {id(module) for module in model.modules()}, threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame = None if thread == mine else top
        while frame is not None:
            if frame.f_code.co_name in CALLS and id(frame.f_locals.get("self")) in modules:
                return True
            frame = frame.f_back
    return False


CALLS = ("_wrapped_call_impl", "_call_impl")
"""The methods of `nn.Module` that run when a module is called."""
