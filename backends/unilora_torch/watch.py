"""Watch: it finds out at once if a module that must have run, because its caller ran, has not, so that none is silently
dead.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from unilora_core import TargetError

__all__ = ["CallerHook", "Reach", "Watched", "by_caller", "looked_up"]


class Watched(Protocol):
    """A protocol: an object that adapts modules, and notes which of them have run."""

    remedy: ClassVar[str]

    def acts(self) -> bool:
        """Say whether it adapts anything here and now."""

    def missed(self, modules: tuple[str, ...]) -> list[str]:
        """Return the modules that it adapts and that have not run."""

    def bypassed(self, modules: tuple[str, ...], compiling: bool) -> tuple[str, list[str]]:
        """Return the mode of this pass, and the modules that have run in another one, but whose weight this one uses by
        itself.
        """


class CallerHook:
    """The forward hook of a module that calls adapted ones: it ran, so they must have run.

    A layer that a model skips at times (a dropped layer, an expert without a token) is skipped with the module that
    calls it, and is no error.
    """

    def __init__(self, watched: Watched, module: str, knows: tuple[str, ...]):
        self.watched, self.module, self.knows = watched, module, knows

    def __call__(self, _module: nn.Module, *_: Any) -> None:
        """Check the modules that it calls."""
        if self.watched.acts():
            self._check(torch.compiler.is_compiling())

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _check(self, compiling: bool) -> None:
        if missed := self.watched.missed(self.knows):
            raise TargetError(
                f"{missed[0]}: the model's forward pass never calls this module ({len(missed)} such), so an adapter "
                f"would do nothing there; some models use a layer's weight directly. {self.watched.remedy}"
            )
        mode, bypassed = self.watched.bypassed(self.knows, compiling)
        if bypassed:
            raise TargetError(
                f"{bypassed[0]}: {mode} the model's forward pass does not call this module, but uses its weight "
                f"directly ({len(bypassed)} such), so an adapter would do nothing there. {self.watched.remedy}"
            )


class Reach:
    """A record of which modules have run, in each mode of the model.

    A module that has run in no mode is missed as soon as what calls it has run. One that has run in another mode may be
    skipped in this one (by stochastic depth, or for a batch without images); then its weight is not looked up. So the
    first pass in a new mode watches the weights of the modules that have not run in it, and later passes watch the
    weights of the modules that were skipped.

    Attributes:
        never: the modules that have run in no mode.
        missing: the modules that have not run in the mode of the latest pass.
        skipped: the modules without which their caller has run.
        ended: the modes in which a pass has ended.
    """

    def __init__(self, modules: Iterable[str]):
        self.modules = frozenset(modules)
        self.never, self.missing, self.skipped = set(self.modules), set(self.modules), set[str]()
        self.mode, self.modes, self.ended = "", dict[str, set[str]](), set[str]()

    def begin(self, mode: str) -> set[str]:
        """Begin a pass, and return the modules whose weights are to be watched in it."""
        if mode != self.mode:
            self.mode, self.missing = mode, self.modes.setdefault(mode, set(self.modules))
        return self.skipped & self.missing if mode in self.ended else self.missing - self.never

    def again(self, modules: Iterable[str]) -> None:
        """Wait once more for these modules to run."""
        again = set(modules)
        for waiting in (self.never, self.missing, *self.modes.values()):
            waiting |= again

    def note(self, module: str) -> None:
        """Note that a module has run."""
        self.never.discard(module)
        self.missing.discard(module)

    def missed(self, modules: Iterable[str]) -> list[str]:
        """Return the modules that have run in no mode; each is returned once."""
        missed = [module for module in modules if module in self.never]
        self.never.difference_update(missed)
        self.missing.difference_update(missed)
        return missed

    def bypassed(self, modules: Iterable[str], used: Callable[[str], bool]) -> list[str]:
        """Return the modules that have not run in this mode though their weight is ``used``; each is returned once."""
        missing = [module for module in modules if module in self.missing]
        self.skipped.update(missing)
        bypassed = [module for module in missing if used(module)]
        self.missing.difference_update(bypassed)
        return bypassed


class _Watched(dict):
    """The parameters of a module, and the threads that have looked one up."""

    def __init__(self, own: Mapping[str, Any]):
        super().__init__(own)
        self.threads: set[int] = set()

    def __getitem__(self, name: str) -> Any:
        self.threads.add(threading.get_ident())
        return super().__getitem__(name)


@contextlib.contextmanager
def looked_up(modules: Mapping[str, nn.Module], names: Iterable[str]) -> Iterator[Callable[[str], bool]]:
    """Yield a function that says, inside the ``with``, whether this thread has looked up a parameter of a module."""
    mine, watched = threading.get_ident(), dict[str, _Watched]()
    try:
        for name in names:
            held = vars(modules[name])
            if not isinstance(held["_parameters"], _Watched):  # another thread may have done so
                held["_parameters"] = _Watched(held["_parameters"])
            watched[name] = held["_parameters"]
        yield lambda name: name in watched and mine in watched[name].threads
    finally:
        for name in watched:
            held = vars(modules[name])
            held["_parameters"] = dict(held["_parameters"])


def by_caller(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each module that calls some of these their names."""
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(_caller_of(model, name), []).append(name)
    return {caller: tuple(called) for caller, called in inside.items()}


def _caller_of(model: nn.Module, name: str) -> str:
    """Return the name of the module that calls this one: the nearest above it that is no mere list."""
    above = name.rpartition(".")[0]
    while above and isinstance(model.get_submodule(above), (nn.ModuleList, nn.ModuleDict)):
        above = above.rpartition(".")[0]
    return above
