"""Bank: many adapters on one frozen base; each row of a batch names its own.

Row i of a layer's inputs leaves it as W x_i + Σ_k w_ik B_k A_k x_i, where (A_k, B_k) = P θ_k. A stored adapter is its
θ_d; adapters of one spec share P. When a layer runs, A and B of the batch's adapters are gathered for this layer only.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from unilora_core import AdapterFile, TargetError, ValuesError
from unilora_torch import base
from unilora_torch.batches import Row, read_rows
from unilora_torch.calls import Handle
from unilora_torch.heads import check_modules
from unilora_torch.hooked import Hooked
from unilora_torch.opened import open_file
from unilora_torch.stored import Entry, Family, OnDisk, Store, combined, family_of, named, values_of
from unilora_torch.tenants import Tenants
from unilora_torch.vector import attached

__all__ = ["Bank"]


class Bank:
    """Many adapters on one frozen base, for inference; `trainable` trains them.

    ::

        bank = unilora_torch.Bank(model)
        bank.add("fr", "fr.safetensors")
        with bank.rows(["fr", None, "de"]):
            output = model(**batch)

    Outside ``with bank.rows(…)`` the model is the base. The model's weights, names and `state_dict` stay as they are;
    each adapted layer has one forward hook, whatever the number of adapters. Move the model to its device first. Many
    threads can share a bank, each with rows of its own, also while others add, replace or remove adapters.

    Args:
        model: the base.
        memory: the most bytes of θ_d and heads that are kept of adapters which were added by the path of a file. Those
            that were used last stay, the others are read again when a row names them. None keeps all.

    Attributes:
        model: the base.
        entries: name → what is stored.
        live: what its hooks look at.
        structure: the hooked modules.
    """

    def __init__(self, model: nn.Module, *, memory: int | None = None):
        self.model = model
        self.store, self.hooked = Store(model, memory), Hooked(model)
        self.entries, self.live, self.structure = self.store.entries, self.hooked.live, self.hooked.structure
        self._adding = threading.Lock()
        self._identity = base.Identities(model)

    def __repr__(self) -> str:
        return f"Bank(adapters: {len(self.entries):,}, specs: {len(self.families):,}, bytes: {self.nbytes:,})"

    # ---- what is stored -----------------------------------------------------------------------------------------

    @property
    def families(self) -> tuple[Family, ...]:
        """What adapters share that have one spec, the same targets, and the same frozen arrays."""
        with self.store.lock:
            return tuple(self.store.families)

    @property
    def handles(self) -> list[Handle]:
        """The handles of its hooks."""
        return self.hooked.handles

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self.entries)

    @property
    def nbytes(self) -> int:
        """The bytes that the bank holds: 4·d for each adapter, its heads, and for each spec the tables of P."""
        return sum(family.nbytes for family in self.families) + self.store.nbytes

    def add(
        self,
        name: str,
        file: str | os.PathLike | AdapterFile,
        *,
        replace: bool = False,
        check_base: bool = True,
        any_rank: bool = False,
    ) -> None:
        """Store an adapter in the bank.

        Args:
            name: the name by which the rows call it.
            file: the path of an adapter file, or its contents.
            replace: whether to put it in the place of the adapter that has this name.
            check_base: whether to refuse a file that was made for a base with other values; see `unilora_torch.load`.
            any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.

        Raises:
            AdapterFileError: the file is damaged or of an unknown version.
            MismatchError: the file belongs to another model.
            TargetError: a layer cannot be adapted by row, or was replaced, or the model has an adapter attached.
            ValuesError: the name is taken, or θ_d holds NaN. In each case nothing has changed.
        """
        _check_bare(self.model)
        self.structure.check("Bank.add")
        _check_name(name, "add")
        if name in self.entries and not replace:  # before the work; `put` is what counts
            raise ValuesError(f"Bank.add: {name!r} is taken; give replace=True to put another adapter in its place.")
        given = file if isinstance(file, AdapterFile) else None
        disk = None if isinstance(file, AdapterFile) else OnDisk.of(file)
        where = f"adapter {name!r}" if disk is None else str(file)
        with self._adding, torch.inference_mode(False):  # what is kept may train later
            families = self.families
            known = {(family.spec, family.targets) for family in families}
            found = open_file(where, self.model, file=given, any_rank=any_rank, known=known)
            check_modules(self.model, found.heads, where)
            if check_base:
                base.check_base(where, found.header.base, self._identity(found.header.modules_to_save, found.fresh))
            family = next((each for each in families if each.takes(found)), None) or family_of(where, self.model, found)
            values = values_of(self.model, family, found)
            if disk is not None:
                disk.check(name)  # what was read is what will be read again
            self.store.put(name, Entry(family, tuple(found.heads), found.fresh, disk, values), replace)
        self._tidy()

    def remove(self, name: str) -> None:
        """Forget an adapter; what only it needed is freed.

        Raises:
            ValuesError: no adapter has this name.
        """
        with self.store.lock:
            named(self.entries, name, "remove")
            self.store.drop(name)
        self._tidy()

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ValuesError: no adapter has this name, or the new one is taken.
        """
        with self.store.lock:
            named(self.entries, name, "rename")
            if new in self.entries or not isinstance(new, str) or not new:
                raise ValuesError(f"Bank.rename: {new!r} is taken or no name; {name!r} keeps its own.")
            self.store.rename(name, new)

    def combine(self, name: str, weights: Mapping[str, float], *, replace: bool = False) -> None:
        """Store θ_d⁰ + Σ w_k (θ_k - θ_d⁰) of adapters of one spec as one more adapter; heads are averaged.

        See `unilora_core.combine_files`. A mapping as a row of `rows` gives the sum of the updates w_k B_k A_k instead,
        which is another adapter, and also takes those of different specs.

        Raises:
            MismatchError: the adapters differ in spec, targets or heads.
            SpecError, ValuesError: a name is unknown or taken, the weights are no finite numbers, or there are heads
                and the weights do not add up to 1. In each case nothing has changed.
        """
        _check_name(name, "combine")
        self.store.put(name, combined(self.store, weights), replace)
        self._tidy()

    def close(self) -> None:
        """Forget all adapters: the model has no hook of the bank any more."""
        with self.store.lock:
            for name in self.names:
                self.store.drop(name)
        self._tidy()

    # ---- a batch ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rows(self, names: Iterable[Row], copies: int = 1) -> Iterator[None]:
        """Adapt row i of each batch by ``names[i]`` inside the ``with``, in this thread or asyncio task only.

        Args:
            names: for each row the name of an adapter, None for the base, or a mapping name → weight for the weighted
                sum of the updates of several adapters.
            copies: how often `generate` repeats each row, side by side: ``num_beams``, or ``num_return_sequences`` of a
                sampled output. Inputs may then have either the named rows or the repeated ones.

        Raises:
            ValuesError: a name is unknown, there is no row, a weight is no finite number, or an adapter in a mixture
                saves modules (a weighted sum of updates says nothing of them). The model's forward pass raises it for
                inputs whose first axis is not the named rows.
            AdapterFileError: values that had made room for others cannot be read again: the file is gone, or has
                changed. Other adapters are served as before.
            TargetError: the model has an adapter attached, or a layer or head was replaced. The forward pass raises it
                where one is never called.
        """
        _check_bare(self.model)
        self.structure.check("Bank.rows")
        with self.hooked.serving(self.store, read_rows(self.store.find, names, copies)):
            yield

    def trainable(self, names: Iterable[str]) -> Tenants:
        """Make these adapters train, each by its own rows of a batch; the base is frozen.

        Their numbers change in place: `rows` serves what is trained so far, and their files are read no more.

        Raises:
            ValuesError: a name is unknown, or occurs twice, or there is none.
            TargetError: the model has an adapter attached, or a layer was replaced.
        """
        _check_bare(self.model)
        self.structure.check("Bank.trainable")
        return Tenants(self.store, self.hooked, names)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        self.hooked.follow(self.store)


def _check_bare(model: nn.Module) -> None:
    if attached(model):
        raise TargetError("Bank: the model has an adapter attached, whose update would be added; detach it first.")


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValuesError(f"Bank.{what}: expected a name, got {name!r}.")
