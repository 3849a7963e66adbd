"""Never silently dead: a module that must have run, because what calls it ran, and has not is found out at once."""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from unilora_core import TargetError

__all__ = ["CallerHook", "Watched", "by_caller"]


class Watched(Protocol):
    """What adapts modules, and notes which of them have run."""

    remedy: ClassVar[str]

    def acts(self) -> bool:
        """Whether it adapts anything here and now."""

    def missed(self, modules: tuple[str, ...]) -> list[str]:
        """Those of the modules that it adapts and that have not run."""


class CallerHook:
    """The forward hook of a module that calls adapted ones: it ran, so they must have run.

    A layer that a model skips now and then (a dropped layer, an expert without a token) is skipped with the module that
    calls it, and is no error.
    """

    def __init__(self, watched: Watched, module: str, knows: tuple[str, ...]):
        self.watched, self.module, self.knows = watched, module, knows

    def __call__(self, _module: nn.Module, *_: Any) -> None:
        """Check those that it calls."""
        if self.watched.acts():
            self._check()

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _check(self) -> None:
        if missed := self.watched.missed(self.knows):
            raise TargetError(
                f"{missed[0]}: the model's forward pass never calls this module ({len(missed)} such), so an adapter "
                f"would do nothing there; some models use a layer's weight directly. {self.watched.remedy}"
            )


def by_caller(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The name of each module that calls some of these → their names."""
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(_caller_of(model, name), []).append(name)
    return {caller: tuple(called) for caller, called in inside.items()}


def _caller_of(model: nn.Module, name: str) -> str:
    """The module that calls this one: the nearest above it that is no mere list."""
    above = name.rpartition(".")[0]
    while above and isinstance(model.get_submodule(above), (nn.ModuleList, nn.ModuleDict)):
        above = above.rpartition(".")[0]
    return above
