"""Structure: a check in each pass that the hooked modules still have their names, so that none is replaced silently.

Hooks go with a module. Where another one takes its name after they were put on (a layer that is fused, resized or
replaced, a block that is taken out of a list), the adapter would do nothing there, and would be merged into the other.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from unilora_core import TargetError

__all__ = ["Structure", "StructureHook"]

LISTS = (nn.ModuleList, nn.ModuleDict)
"""The modules that are never called."""

Level = tuple[nn.Module, dict[str, nn.Module | None]]
"""A module above hooked ones, and its children as they were."""


class Watched(Protocol):
    """A protocol: an object that hooks modules, and notes which of them have run."""

    def acts(self) -> bool:
        """Say whether it adapts anything here and now."""

    def again(self, modules: Iterable[str]) -> None:
        """Wait once more for these modules to run."""


class Structure:
    """The hooked modules of a model, and all modules above them, as they were when they were hooked.

    A wrapper that comes later (of activation checkpointing, `torch.compile` or FSDP) is no replacement: it still
    contains the hooked module.

    Attributes:
        modules: the name of each hooked module → the module.
        levels: the name of each module that is called above them → the module and the lists below it.
        hooks: the name, the module, and the number of each forward hook that has to be on it.
    """

    def __init__(self, watched: Watched, model: nn.Module, names: Iterable[str]):
        self.watched, self.model = watched, model
        self.modules: dict[str, nn.Module] = {}
        self.levels: dict[str, list[Level]] = {}
        self.hooks: list[tuple[str, nn.Module, int]] = []
        self._known: dict[str, nn.Module] = {}
        self.take(names)

    def take(self, names: Iterable[str]) -> None:
        """Watch the modules of these names, and no others; modules that are watched already stay the same."""
        self.modules = {name: self.modules.get(name) or self.model.get_submodule(name) for name in names}
        paths = (path for name in self.modules for path in _paths(name))
        self._known = {path: self._known.get(path) or self.model.get_submodule(path) for path in paths}
        self.look("attach")

    def check(self, what: str) -> None:
        """Refuse a model of which a hooked module was replaced.

        Raises:
            TargetError: one was replaced; the error names ``what``, the name, and what has it now.
        """
        if self.changed():
            self.look(what)

    def changed(self, caller: str | None = None) -> bool:
        """Say whether a module above the hooked ones (those of one caller) has other children than it had."""
        for levels in self.levels.values() if caller is None else (self.levels.get(caller, ()),):
            for module, children in levels:
                if module._modules != children:
                    return True
        return False

    def bare(self) -> list[str]:
        """Return the names of the hooked modules whose hook somebody took off."""
        return [name for name, module, number in self.hooks if number not in module._forward_hooks]

    def look(self, what: str) -> None:
        """Follow the names again, and take the children as they are now.

        A caller that has new modules beside the hooked ones may bypass these, as a fused q, k and v does. So it is
        found out once more whether they run.

        Raises:
            TargetError: see `check`.
        """
        levels: dict[str, list[Level]] = {}
        callers: dict[str, str] = {}
        seen, gone = set(), {}
        for name, module in self.modules.items():
            above, there = self._follow(name)
            if there is not module:
                gone[name] = there
                continue
            callers[name] = above[-1][0] if above else ""
            for caller, each in above:
                if id(each) not in seen:
                    seen.add(id(each))
                    levels.setdefault(caller, []).append((each, dict(each._modules)))
        if gone:
            raise TargetError(_gone(what, gone))
        before, self.levels = self.levels, levels
        self.watched.again(name for name, caller in callers.items() if levels.get(caller) != before.get(caller))

    def _follow(self, name: str) -> tuple[list[tuple[str, nn.Module]], nn.Module | None]:
        """Return the modules above one, each with the name of the module that calls it or is it; and what has the name,
        or None.
        """
        above, here, caller = [], self.model, ""
        for path in _paths(name):
            above.append((caller, here))
            there, known = here._modules.get(path.rpartition(".")[2]), self._known[path]
            if there is None:
                return above, None
            for wrapper in _wrappers(there, known):
                above.append((caller, wrapper))
                there = known
            here = there
            caller = caller if isinstance(here, LISTS) else path
        return above, here


class StructureHook:
    """The forward pre-hook of a model, or of a module in it that can be called alone.

    ``caller``: the name of the module whose children are compared; None: all modules of the model.
    """

    def __init__(self, structure: Structure, caller: str | None = None):
        self.structure, self.caller = structure, caller

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Refuse a model of which a hooked module was replaced."""
        self._check()

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _check(self) -> None:
        structure = self.structure
        if structure.changed(self.caller) and structure.watched.acts():
            structure.look("the model was called")
        if self.caller is None and (bare := structure.bare()) and structure.watched.acts():
            raise TargetError(
                f"{bare[0]}: the adapter's hook was taken off this module ({len(bare)} such), where it would do "
                "nothing; save, detach and load the adapter, and remove the hooks of others by their handles."
            )


def _paths(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    keys = name.split(".") if name else []
    return (".".join(keys[: i + 1]) for i in range(len(keys)))


def _wrappers(there: nn.Module, known: nn.Module) -> list[nn.Module]:
    """Return the modules around the known one in what has its name now; none where this is it, or is another one."""
    path = "" if there is known else next((path for path, module in there.named_modules() if module is known), "")
    return [there.get_submodule(above) for above in ("", *_paths(path))][:-1]


def _gone(what: str, gone: dict[str, nn.Module | None]) -> str:
    name, there = next(iter(gone.items()))
    kind = type(there)
    now = (
        "no module has this name"
        if there is None
        else f"another one has this name, a {kind.__module__}.{kind.__name__}"
    )
    return (
        f"{what}: {name}: the module that was adapted is gone: {now} ({len(gone)} such), where the adapter would do "
        "nothing. Before layers are replaced (fused, resized, reparameterised, quantised) or taken out, merge for good "
        "by detach(merge=True), or save and detach, and attach or load afterwards. The former one can be put back: it "
        "is among the adapter's structure.modules."
    )
