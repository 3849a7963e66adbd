"""Chains: what is built of a target's numbers, that is its pieces, by name, and what its frame makes of them.

A chain is (F_1, …, F_k) in the order in which x meets them: the update of a layer is F_k·…·F_1, and beside it runs
``for F in chain: x = linear(x, F)``. The frames are the core's (`unilora_core.frames`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_core._namespace import array_namespace, standard
from unilora_core.frames import FRAMES, Sizes, piece_names
from unilora_core.maps import Options
from unilora_torch.targets import Target

TORCH = standard(torch)

torch.compiler.substitute_in_graph(array_namespace)(lambda *_: TORCH)  # how it is found is not to be traced

__all__ = ["Chains", "Frozen", "joined", "product", "sizes_of"]

Pieces = Mapping[str, Tensor]

Frozen = Mapping[str, Pieces]
"""The arrays in the chains that are not trained: name of a target → name → array."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chains:
    """A function from the pieces of all targets to the chain of each.

    Attributes:
        frame: the name of the frame in the core.
        options: the options of the frame.
        names: name of a target → the names of its pieces in the layout, in the order of the frame's.
        frozen: the arrays that the chains need besides; targets of one size may share them.
    """

    frame: str
    options: Options
    names: Mapping[str, tuple[str, ...]]
    frozen: Frozen

    @classmethod
    def of(cls, spec: ProjectionSpec, targets: Iterable[Target], frozen: Frozen) -> "Chains":
        """Make the chains of a spec's frame."""
        names = {t.name: tuple(piece_names(spec.form, t.name, sizes_of(t)).values()) for t in targets}
        return cls(spec.frame, spec.chosen, names, frozen)

    def __call__(self, factors: Mapping[str, Tensor], target: Target) -> tuple[Tensor, ...]:
        """Compute the chain of one target from the pieces by their names in the layout."""
        form, names = FRAMES[self.frame], self.names[target.name]
        if self.frame == "pair":  # a short cut, as this runs in every layer of every step
            return factors[names[0]], factors[names[1]]
        pieces = {piece: factors[name] for piece, name in zip(form.names, names, strict=True)}
        return form.chain(pieces, self.frozen.get(target.name, {}), self.options)

    def to(self, device: torch.device) -> "Chains":
        """Return the same chains with what is frozen on another device; what is shared stays shared."""
        if not self.frozen:
            return self
        moved: dict[int, Tensor] = {}
        frozen = {
            name: {key: moved.setdefault(id(array), array.to(device)) for key, array in arrays.items()}
            for name, arrays in self.frozen.items()
        }
        return dataclasses.replace(self, frozen=frozen)

    def clones(self) -> Frozen:
        """Return a copy of what is frozen."""
        return {name: {key: array.clone() for key, array in arrays.items()} for name, arrays in self.frozen.items()}

    def copy_(self, frozen: Frozen) -> None:
        """Take other values of the same shapes, in place."""
        for name, arrays in self.frozen.items():
            for key, array in arrays.items():
                array.copy_(frozen[name][key])


def sizes_of(target: Target) -> Sizes:
    """Return the sizes of a target, as the core's frames take them."""
    return Sizes(target.in_features, target.out_features, target.experts)


def product(chain: Sequence[Tensor]) -> Tensor:
    """Compute F_k·…·F_1, (…, out, in)."""
    update = chain[0]
    for factor in chain[1:]:
        update = factor @ update
    return update


def joined(chains: Sequence[Sequence[Tensor]], rows: Sequence[int], height: int) -> tuple[Tensor, ...]:
    """Join the chains of the blocks of one layer to one; its product is (height, in), and zero outside of the blocks.

    The first factors stand one below the other, the others on a diagonal, the last ones in their rows.

    Args:
        chains: the chains of the blocks, all of one length, in the order of their rows.
        rows: where each block starts.
        height: the number of the layer's outputs, at least where the last block ends.
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
