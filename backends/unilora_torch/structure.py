"""Never silently replaced: the modules that are hooked still have their names, compared by identity in each pass.

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
"""What is never called."""

Level = tuple[nn.Module, dict[str, nn.Module | None]]
"""A module above hooked ones, and its children as they were."""


class Watched(Protocol):
    """What hooks modules, and notes which of them have run."""

    def acts(self) -> bool:
        """Whether it adapts anything here and now."""

    def again(self, modules: Iterable[str]) -> None:
        """Wait once more for these modules to run."""


class Structure:
    """A model's hooked modules, and all modules above them, as they were when they were hooked.

    A wrapper that comes later (of activation checkpointing, `torch.compile` or FSDP) is no other module: what has the
    name still contains the hooked one.

    Attributes:
        modules: the name of each hooked module → the module.
        levels: the name of each module that is called above them → itself and the lists below it.
        hooks: names, modules, and the numbers of forward hooks that have to be on them.
    """

    def __init__(self, watched: Watched, model: nn.Module, names: Iterable[str]):
        self.watched, self.model = watched, model
        self.modules: dict[str, nn.Module] = {}
        self.levels: dict[str, list[Level]] = {}
        self.hooks: list[tuple[str, nn.Module, int]] = []
        self._known: dict[str, nn.Module] = {}
        self.take(names)

    def take(self, names: Iterable[str]) -> None:
        """Watch the modules of these names, and no others; those that are watched already stay who they are."""
        self.modules = {name: self.modules.get(name) or self.model.get_submodule(name) for name in names}
        paths = (path for name in self.modules for path in _paths(name))
        self._known = {path: self._known.get(path) or self.model.get_submodule(path) for path in paths}
        self.look("attach")

    def check(self, what: str) -> None:
        """Refuse a model of which a hooked module was replaced.

        Raises:
            TargetError: with ``what`` was to be done, the name, and what has it now.
        """
        if self.changed():
            self.look(what)

    def changed(self, caller: str | None = None) -> bool:
        """Whether a module above the hooked ones (those of one caller) has other children than it had."""
        for levels in self.levels.values() if caller is None else (self.levels.get(caller, ()),):
            for module, children in levels:
                if module._modules != children:
                    return True
        return False

    def bare(self) -> list[str]:
        """The hooked modules that somebody took the hook off."""
        return [name for name, module, number in self.hooks if number not in module._forward_hooks]

    def look(self, what: str) -> None:
        """Follow the names again, and take the children as they are now.

        What calls hooked modules and has others beside them now may pass these by, as a fused q, k and v does: so
        whether they run is found out once more.

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
        """The modules above one, each with the name of what calls it or is it; and what has the name, or None."""
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

    ``caller``: the name of the module, whose children are compared; None: of the whole model.
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
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    keys = name.split(".") if name else []
    return (".".join(keys[: i + 1]) for i in range(len(keys)))


def _wrappers(there: nn.Module, known: nn.Module) -> list[nn.Module]:
    """The modules around the known one in what has its name now; none where this is it, or is another one."""
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
