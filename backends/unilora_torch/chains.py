"""What is built of a target's numbers: its pieces, by name, and the chain that its frame makes of them.

A chain is (F_1, …, F_k) in the order in which x meets them: the update of a layer is F_k·…·F_1, and beside it runs
``for F in chain: x = linear(x, F)``. The frames are the core's (`unilora_core.frames`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_core.frames import FRAMES, Frame, Sizes, piece_names
from unilora_core.maps import Options
from unilora_torch.targets import Target

__all__ = ["Chains", "Frozen", "joined", "product", "sizes_of"]

Pieces = Mapping[str, Tensor]

Frozen = Mapping[str, Pieces]
"""Name of a target → name → array that stands in its chain and is not trained."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chains:
    """From the pieces of all targets to the chain of each.

    Attributes:
        frame: its name among the core's.
        options: of the frame.
        names: name of a target → the names of its pieces in the layout, in the order of the frame's.
        frozen: what else the chains need; targets of one size may share it.
    """

    frame: str
    options: Options
    names: Mapping[str, tuple[str, ...]]
    frozen: Frozen

    @classmethod
    def of(cls, spec: ProjectionSpec, targets: Iterable[Target], frozen: Frozen) -> "Chains":
        """Those of a spec's frame."""
        names = {t.name: tuple(piece_names(spec.form, t.name, sizes_of(t)).values()) for t in targets}
        return cls(spec.frame, spec.chosen, names, frozen)

    def __call__(self, factors: Mapping[str, Tensor], target: Target) -> tuple[Tensor, ...]:
        """The chain of one target, of the pieces by their names in the layout."""
        form, names = FRAMES[self.frame], self.names[target.name]
        if self.frame == "pair":  # as its chain says, without a detour in every layer of every step
            return factors[names[0]], factors[names[1]]
        pieces = {piece: factors[name] for piece, name in zip(form.names, names, strict=True)}
        make = _made if self.frame in TRACED else _untraced
        return make(form, pieces, self.frozen.get(target.name, {}), self.options)

    def to(self, device: torch.device) -> "Chains":
        """The same with what is frozen on another device; what is shared stays shared."""
        if not self.frozen:
            return self
        moved: dict[int, Tensor] = {}
        frozen = {
            name: {key: moved.setdefault(id(array), array.to(device)) for key, array in arrays.items()}
            for name, arrays in self.frozen.items()
        }
        return dataclasses.replace(self, frozen=frozen)

    def clones(self) -> Frozen:
        """A copy of what is frozen."""
        return {name: {key: array.clone() for key, array in arrays.items()} for name, arrays in self.frozen.items()}

    def copy_(self, frozen: Frozen) -> None:
        """Take other values of the same shapes, in place."""
        for name, arrays in self.frozen.items():
            for key, array in arrays.items():
                array.copy_(frozen[name][key])


TRACED = ("pair", "scaled", "tied", "core", "dense")
"""The frames whose chains torch.compile traces; others ask for the namespace of an array."""


def _made(form: Frame, pieces: Pieces, frozen: Pieces, options: Options) -> tuple[Tensor, ...]:
    return form.chain(pieces, frozen, options)


_untraced = torch.compiler.disable(_made)


def sizes_of(target: Target) -> Sizes:
    """The sizes of a target, as the core's frames take them."""
    return Sizes(target.in_features, target.out_features, target.experts)


def product(chain: Sequence[Tensor]) -> Tensor:
    """F_k·…·F_1, (…, out, in)."""
    update = chain[0]
    for factor in chain[1:]:
        update = factor @ update
    return update


def joined(chains: Sequence[Sequence[Tensor]], rows: Sequence[int], height: int) -> tuple[Tensor, ...]:
    """One chain for the blocks of one layer, (height, in) as a product, which is zero outside of the blocks.

    The first factors stand one below the other, the others on a diagonal, the last ones in their rows.

    Args:
        chains: of the blocks, all of one length, in the order of their rows.
        rows: where each block starts.
        height: the layer's outputs, at least where the last block ends.
    """
    last = [chain[-1] for chain in chains]
    width = last[0].shape[1] if len(chains[0]) == 1 else 0  # of what fills the rows between: a lone factor takes x
    spread, row = [], 0
    for factor, first_row in zip(last, rows, strict=True):
        spread += [factor.new_zeros(first_row - row, width), factor]
        row = first_row + factor.shape[0]
    spread.append(last[0].new_zeros(height - row, width))
    if len(chains[0]) == 1:
        return (torch.cat(spread),)
    first, *middle = zip(*[chain[:-1] for chain in chains], strict=True)
    return torch.cat(first), *[torch.block_diag(*factors) for factors in middle], torch.block_diag(*spread)
