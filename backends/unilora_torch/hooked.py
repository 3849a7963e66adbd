"""The hooks of a bank on its model: one for each adapted layer, whatever the number of adapters."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from unilora_core import TargetError
from unilora_torch.calls import Handle
from unilora_torch.gather import Gather
from unilora_torch.rows import Batch, Block, HeadHook, LayerHook, OutputHook, Rows
from unilora_torch.stored import Family, Store
from unilora_torch.structure import Structure
from unilora_torch.targets import Target
from unilora_torch.watch import CallerHook, by_caller

__all__ = ["Hooked"]

Hook = LayerHook | HeadHook | OutputHook | CallerHook


class Hooked:
    """The hooks that what is stored needs.

    Attributes:
        model: the base.
        live: what they look at.
        structure: the hooked modules.
        families, heads: what they serve at the moment.
        training: how many `Tenants` train.
        frozen: the base's parameters that train again when none does.
    """

    def __init__(self, model: nn.Module):
        self.model, self.live = model, Rows()
        self.structure = Structure(self.live, model, ())
        self.families: set[Family] = set()
        self.heads: set[str] = set()
        self.frozen: list[nn.Parameter] = []
        self.training = 0
        self._lock = threading.RLock()
        self._hooks: dict[tuple[type[Hook], str], tuple[Hook, Handle]] = {}

    @property
    def handles(self) -> list[Handle]:
        """The handles of the hooks."""
        return [handle for _, handle in self._hooks.values()]

    @contextlib.contextmanager
    def serving(self, store: Store, batch: Batch) -> Iterator[None]:
        """Serve these rows inside the ``with``, in this thread or asyncio task."""
        with self.live.scope.holds(batch), _still(self.model, batch.heads):
            if not (batch.families <= self.families and batch.heads.keys() <= self.heads):
                self.follow(store)  # another thread's `add` or `remove` is under way
            yield

    def follow(self, store: Store) -> None:
        """Keep hooks only for what is stored or still named by rows.

        Hooks that stay are not touched, so no thread that is calling the model meanwhile misses one.
        """
        with self._lock:
            with store.lock:
                families, heads = set(store.families), set(store.heads)
            before = self.families, self.heads
            self.families, self.heads = families & before[0], heads & before[1]  # rows that begin now see what may go
            for entered in list(self.live.scope.open):
                if (batch := entered.value) is not None:
                    families |= batch.families
                    heads |= batch.heads.keys()
            if (families, heads) != before:
                self._set(sorted(families, key=lambda each: each.number), heads)
            self.families, self.heads = families, heads

    def _set(self, families: Iterable[Family], heads: Iterable[str]) -> None:
        wanted = _wanted(self.model, families, heads)
        for key in self._hooks.keys() - wanted.keys():
            self._hooks.pop(key)[1].remove()
        for (kind, module), knows in wanted.items():
            if (kind, module) in self._hooks:
                self._hooks[kind, module][0].knows = knows
            else:
                self._hooks[kind, module] = _registered(self.model, kind(self.live, module, knows))
        with contextlib.suppress(TargetError):  # of what was replaced: `rows` and `add` tell
            self.structure.take(name for kind, name in wanted if kind in (LayerHook, HeadHook))


@contextlib.contextmanager
def _still(model: nn.Module, heads: Iterable[str]) -> Iterator[None]:
    """Keep the statistics of the base's own heads, which run on all rows, though each row has a head of its own."""
    inside = [m for head in heads for m in model.get_submodule(head).modules() if m.training and m._buffers]
    before = [dict(module._buffers) for module in inside]
    for module, buffers in zip(inside, before, strict=True):
        module._buffers.update({name: each if each is None else each.clone() for name, each in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in zip(inside, before, strict=True):
            module._buffers.update(buffers)


def _registered(model: nn.Module, hook: Any) -> tuple[Any, Handle]:
    """Register a hook on its module; a hook that only looks comes last, another one first, so that foreign hooks see
    what a merge gives.
    """
    first = isinstance(hook, LayerHook | HeadHook)
    layer = model.get_submodule(hook.module)
    return hook, layer.register_forward_hook(hook, with_kwargs=True, prepend=first)


def _wanted(
    model: nn.Module, families: Iterable[Family], heads: Iterable[str]
) -> dict[tuple[type[Hook], str], tuple[Any, ...]]:
    """Return what each hook must know, by its kind and module: the blocks of a layer, or what a caller calls."""
    blocks: dict[str, list[Block]] = {}
    for family in families:
        for target in family.targets:
            blocks.setdefault(target.module, []).append(_block(family, target))
    wanted: dict[tuple[type[Hook], str], tuple[Any, ...]] = {
        (LayerHook, module): tuple(mine) for module, mine in blocks.items()
    }
    wanted |= {(HeadHook, module): () for module in sorted(heads)}
    inside = by_caller(model, [module for _, module in wanted])
    wanted |= {(CallerHook, caller): modules for caller, modules in inside.items()}
    return wanted | ({(OutputHook, ""): ()} if wanted else {})


def _block(family: Family, target: Target) -> Block:
    """Make the block of a target in its layer; its groups are a view of the family's, unless a file holds another
    order.
    """
    layout, names, projection = family.spec.layout, family.chains.names[target.name], family.projection
    spans = (layout.slices[name] for name in names)
    groups = projection.groups_at(spans) if isinstance(projection, Gather) else None
    return Block(family.number, target, {name: layout.shapes[name] for name in names}, groups, family.chains)
