"""What a bank stores: θ_d and heads by name, those that came from files as far as a bound in bytes allows."""

import difflib
import itertools
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import AdapterFileError, MismatchError, ProjectionSpec, TargetError, ValuesError, combine
from unilora_core.arithmetic import averages, checked_weights, weighted
from unilora_torch.chains import Chains
from unilora_torch.frozen import frozen_of
from unilora_torch.opened import Opened, open_file
from unilora_torch.projection import Projection
from unilora_torch.targets import Target, is_conv
from unilora_torch.vector import device_of, projection_of

__all__ = ["Entry", "Family", "Heads", "OnDisk", "Store", "Values", "combined", "family_of", "named", "values_of"]

Heads = Mapping[str, Mapping[str, Tensor]]
"""The state of each module that an adapter saves, in the dtypes of the model's own."""

NUMBERS = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Family:
    """The state that all adapters of one spec and the same targets share: P, and what their chains have frozen.

    Attributes:
        number: what its blocks and batches know it by.
        device: the device of its tensors and of its adapters' θ_d.
    """

    number: int
    spec: ProjectionSpec
    targets: tuple[Target, ...]
    projection: Projection
    chains: Chains
    device: torch.device

    @property
    def nbytes(self) -> int:
        """The bytes of what is shared; targets of one size may share what is frozen."""
        frozen = {id(array): array for arrays in self.chains.frozen.values() for array in arrays.values()}
        return sum(tensor.nbytes for tensor in (*self.projection.tensors, *frozen.values()))

    def takes(self, found: Opened) -> bool:
        """Say whether a file's adapter is one of these: an SVD that it keeps may be another machine's."""
        if (self.spec, self.targets) != (found.spec, found.targets):
            return False
        kept = found.frozen or {}
        return all(
            torch.equal(array, self.chains.frozen[target][name].to(array.device))
            for target, arrays in kept.items()
            for name, array in arrays.items()
        )


@dataclass(frozen=True, eq=False)
class Values:
    """The numbers of one adapter: θ_d (d,) float32, and its heads."""

    theta_d: Tensor
    heads: Heads

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return self.theta_d.nbytes + sum(t.nbytes for state in self.heads.values() for t in state.values())


@dataclass(frozen=True)
class OnDisk:
    """A file that was read, checked and found good, to be read again as long as it is the same.

    Attributes:
        path: where it lies, absolute.
        seen: its inode, size and time of change.
    """

    path: str
    seen: tuple[int, int, int]

    @classmethod
    def of(cls, path: str | os.PathLike) -> "OnDisk":
        """Look at a file.

        Raises:
            FileNotFoundError: there is none.
        """
        path = os.path.abspath(path)
        found = os.stat(path)
        return cls(path, (found.st_ino, found.st_size, found.st_mtime_ns))

    def check(self, name: str) -> None:
        """Refuse a file that is gone, or another than it was.

        Raises:
            AdapterFileError: it is; the error names the adapter and the file.
        """
        try:
            now = OnDisk.of(self.path)
        except OSError as error:
            raise AdapterFileError(
                f"adapter {name!r}: {self.path}: its file cannot be read any more ({error.strerror}), and its values "
                "had made room for others; put the file back, or remove the adapter."
            ) from error
        if now != self:
            raise AdapterFileError(
                f"adapter {name!r}: {self.path} has changed since it was added; bank.add(…, replace=True) takes the "
                "new one."
            )

    def read(self, name: str, model: nn.Module, family: Family) -> Values:
        """Read the values again.

        Raises:
            AdapterFileError: the file is gone, or has changed.
        """
        self.check(name)
        found = open_file(self.path, model, any_rank=True, known={(family.spec, family.targets)})
        self.check(name)  # it may have been replaced meanwhile
        return values_of(model, family, found)


@dataclass(eq=False)
class Entry:
    """One adapter of a bank.

    Attributes:
        heads: the names of the modules that it saves.
        file: where its values are read again; None keeps them in memory.
        fresh: the weights that come from no checkpoint and are in no file, which a file identifies.
        values: None while they are on disk only.
    """

    family: Family
    heads: tuple[str, ...]
    fresh: tuple[str, ...]
    file: OnDisk | None
    values: Values | None


class Store:
    """Adapters by name.

    Attributes:
        model: the base, which files are checked against.
        memory: the most bytes of values that files hold, too; None: no bound. Those that were used last stay.
        entries: name → adapter.
        families, heads: how many adapters have each family, and save each module.
        used: the entries whose values are in memory and in a file → bytes, the latest used last.
        pinned: the bytes of values that no file holds.
    """

    def __init__(self, model: nn.Module, memory: int | None):
        if memory is not None and memory < 0:
            raise ValuesError(f"Bank: memory: expected a number of bytes or None, got {memory!r}.")
        self.model, self.memory = model, memory
        self.entries: dict[str, Entry] = {}
        self.families: Counter[Family] = Counter()
        self.heads: Counter[str] = Counter()
        self.used: OrderedDict[Entry, int] = OrderedDict()
        self.pinned = self.evictable = 0
        self.lock = threading.RLock()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a bank, and what trains in it, is neither copied nor pickled: the hooks of its model serve this one. Copy "
            "the model, make a bank on it, and add the files; a state_dict holds what trains."
        )

    @property
    def nbytes(self) -> int:
        """The bytes of all values in memory."""
        return self.pinned + self.evictable

    def put(self, name: str, entry: Entry, replace: bool = True) -> None:
        """Store an adapter, in the place of the one of this name if ``replace`` allows.

        Raises:
            ValuesError: the name is taken.
        """
        with self.lock:
            if name in self.entries and not replace:
                raise ValuesError(f"Bank.add: {name!r} is taken; give replace=True to put another in its place.")
            before = self.entries.get(name)
            self.entries[name] = entry  # at once: readers take no lock, and must not miss the name
            if before is not None:
                self._forget(before)
            self.families[entry.family] += 1
            self.heads.update(entry.heads)
            if entry.values is not None:
                self._count(entry, entry.values)

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        with self.lock:
            self._forget(self.entries.pop(name))

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name."""
        with self.lock:
            self.entries[new] = self.entries[name]
            del self.entries[name]

    def values(self, name: str, entry: Entry) -> Values:
        """Return the values of an adapter, read from its file again if they had to make room.

        Raises:
            AdapterFileError: the file is gone, or has changed.
        """
        file, values = entry.file, entry.values  # in this order: what loses its file has values before
        if values is None:
            assert file is not None
            with torch.inference_mode(False):  # what is kept may train later
                values = file.read(name, self.model, entry.family)
        with self.lock:
            if entry.file is not None and self.entries.get(name) is entry:
                self._uncount(entry)  # it is the latest used now
                self._count(entry, values)
        return values

    def find(self, row: int, name: str) -> tuple[Entry, Values]:
        """Return the adapter that a row names, for `batches.read_rows`."""
        entry = named(self.entries, name, f"rows: row {row}")
        return entry, self.values(name, entry)

    def pin(self, name: str) -> Values:
        """Return the values of an adapter, which stay in memory from now on: they are about to change."""
        with self.lock:
            entry = self.entries[name]
            values = self.values(name, entry)
            self._uncount(entry)
            entry.values = values
            entry.file = None
            self._count(entry, values)
        return values

    def _forget(self, entry: Entry) -> None:
        self._uncount(entry)
        self.families -= Counter([entry.family])
        self.heads -= Counter(entry.heads)

    def _count(self, entry: Entry, values: Values) -> None:
        """Take values into memory, and out of it those that have not been used for longest."""
        entry.values = values
        if entry.file is None:
            self.pinned += values.nbytes
            return
        self.used[entry] = values.nbytes
        self.evictable += values.nbytes
        while self.memory is not None and self.evictable > self.memory:
            oldest = next(iter(self.used))
            self._uncount(oldest)
            oldest.values = None

    def _uncount(self, entry: Entry) -> None:
        if entry.file is not None:
            self.evictable -= self.used.pop(entry, 0)
        elif entry.values is not None:
            self.pinned -= entry.values.nbytes


def values_of(model: nn.Module, family: Family, found: Opened) -> Values:
    """Return the values of a file, on the device of its family and in the dtypes of the model."""
    return Values(found.theta_d.to(family.device), _like(model, found.heads))


def named(entries: Mapping[str, Entry], name: Any, what: str) -> Entry:
    """Return the adapter of a name.

    Raises:
        ValuesError: none has it; the error lists the nearest names.
    """
    if (entry := entries.get(name)) is not None:
        return entry
    there = list(entries)  # at once: other threads add and remove meanwhile
    near = difflib.get_close_matches(str(name), there, 3, 0.4) or there[:3]
    raise ValuesError(f"Bank.{what}: no adapter is named {name!r}; the nearest of {len(there)} names are {near}.")


def combined(store: Store, weights: Mapping[str, float]) -> Entry:
    """Return the combination of stored adapters; see `Bank.combine`."""
    names, entries = list(weights), [named(store.entries, name, "combine") for name in weights]
    shares = checked_weights(len(names), weights.values(), "Bank.combine")
    family, parts = entries[0].family, [store.values(*each) for each in zip(names, entries, strict=True)]
    for name, entry, part in zip(names, entries, parts, strict=True):
        same = entry.family is family
        if not same or _shapes(part.heads) != _shapes(parts[0].heads):
            raise MismatchError(
                f"Bank.combine: {names[0]!r} and {name!r} have different {'heads' if same else 'specs or targets'}, so "
                "their θ_d do not add up; name them in one row of `rows` instead, whose updates add up whatever they "
                "are."
            )
    if parts[0].heads:
        averages(shares, "Bank.combine: an adapter", list(parts[0].heads))
    theta_d = combine(family.spec, [part.theta_d.double() for part in parts], shares).float()
    heads = {
        module: {key: _mean([part.heads[module][key] for part in parts], shares) for key in state}
        for module, state in parts[0].heads.items()
    }
    return Entry(family, entries[0].heads, entries[0].fresh, None, Values(theta_d, heads))


def _shapes(heads: Heads) -> dict[str, dict[str, torch.Size]]:
    return {module: {key: tensor.shape for key, tensor in state.items()} for module, state in heads.items()}


def _mean(tensors: list[Tensor], weights: Iterable[float]) -> Tensor:
    """Return the weighted mean; of whole numbers the first, such as the batches that a norm has counted."""
    first = tensors[0]
    return weighted([x.double() for x in tensors], weights).to(first) if first.is_floating_point() else first.clone()


def family_of(where: str, model: nn.Module, found: Opened) -> Family:
    """Make what the adapters of this spec and these targets share.

    Raises:
        TargetError: a layer cannot be adapted by row.
    """
    if found.spec.frame == "dense":
        raise TargetError(
            f"{where}: with the frame 'dense' θ_D is as large as the layers' weights, and a batch would need one for "
            "each adapter; attach such an adapter alone."
        )
    for target in found.targets:
        _check_by_row(where, model, target)
    frozen = frozen_of(model, found.spec, found.targets) if found.frozen is None else found.frozen
    device = device_of(model, found.targets)
    projection, chains = projection_of(found.spec).to(device), Chains.of(found.spec, found.targets, frozen).to(device)
    return Family(next(NUMBERS), found.spec, found.targets, projection, chains, device)


def _like(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the saved state of each module, in the dtypes of the model's own."""
    own = {name: model.get_submodule(name).state_dict() for name in states}
    return {
        name: {key: state[key].to(like, copy=True) for key, like in own[name].items()} for name, state in states.items()
    }


def _check_by_row(where: str, model: nn.Module, target: Target) -> None:
    """Refuse a target that does not see the rows of the batch one by one."""
    if target.parameter is not None:
        raise TargetError(
            f"{where}: {target.name} is added to a weight, which all rows of a batch share; attach such an adapter "
            "alone."
        )
    if re.search(r"(^|\.)experts?(\.|$)", target.module):
        raise TargetError(
            f"{where}: {target.module} is an expert, which gets the tokens that are routed to it, not the rows of "
            "the batch; attach such an adapter alone."
        )
    layer = model.get_submodule(target.module)
    if isinstance(layer, nn.Embedding) or is_conv(layer):
        kind = "a convolution" if is_conv(layer) else "an embedding"
        raise TargetError(
            f"{where}: {target.module} is {kind}, which a bank cannot adapt by row; attach such an adapter alone."
        )
