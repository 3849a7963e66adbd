"""Never silently dead: a target that the forward pass bypasses is found out in the first pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unilora_core import TargetError
from unilora_torch.calls import Handle
from unilora_torch.live import Live
from unilora_torch.targets import Target

__all__ = ["add_checks", "by_caller"]


def add_checks(live: Live, model: nn.Module, targets: tuple[Target, ...], handles: list[Handle]) -> None:
    """A hook on each module that calls targets, its handle in the list; it raises where a target was left out."""
    for caller, modules in by_caller(model, dict.fromkeys(target.module for target in targets)).items():
        handles.append(model.get_submodule(caller).register_forward_hook(_Reach(live, modules)))


class _Reach:
    """The forward hook of a module that calls targets: it ran, so they must have run.

    A layer that a model skips now and then (a dropped layer, an expert without a token) is skipped with the module that
    calls it, and is no error.
    """

    def __init__(self, live: Live, modules: tuple[str, ...]):
        self.live, self.modules = live, modules

    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Check until each target has run once."""
        if self.live.acts():
            self._check()

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _check(self) -> None:
        missed = [module for module in self.modules if module in self.live.unreached]
        self.live.unreached.difference_update(missed)
        if missed:
            raise TargetError(
                f"{missed[0]}: the model's forward pass never calls this module ({len(missed)} such targets), so its "
                "update would do nothing; some models use a layer's weight directly. Exclude it, or choose other "
                "targets."
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
