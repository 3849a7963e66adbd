"""Chains: what θ_d adds to each leaf. Pieces are cut out of θ_D, the frame makes a chain of them, and the chain gives A
and B.

ΔW = F_k ⋯ F_1 is of low rank: A = F_1, and B = F_k ⋯ F_2. How a piece's factors are called stands here, by the core's
rule, and nowhere else.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import ProjectionSpec
from unilora_core.frames import Frame, piece_names
from unilora_jax.gather import Gathered, Names, gathered
from unilora_jax.generic import Mapped, mapped
from unilora_jax.projection import explicit_sharding
from unilora_jax.targets import Target

__all__ = ["Chains", "Leaf", "numbers_of"]

Shardings = Mapping[str, NamedSharding]
"""The sharding of each weight when it is used, by its path."""

OUTPUTS_FIRST = frozenset({"B"})
"""The pieces (out, r) that the low-rank path takes as (r, out)."""


class Leaf(NamedTuple):
    """An adapted leaf: its shape, the roles of its axes as in `LowRank`, how many outputs a layer has, its targets."""

    shape: tuple[int, ...]
    roles: str
    outputs: int
    targets: tuple[Target, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Chains:
    """A function from θ_d to the update of every adapted leaf. It is a pytree: the arrays are its leaves, the rest is
    static.

    Attributes:
        targets: the adapted leaves, or blocks of them.
        shapes: the shapes of the adapted leaves, by path.
        numbers: the function θ_d → every factor.
        frozen: the arrays that the frame keeps beside the pieces of each target.
    """

    targets: tuple[Target, ...] = field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata={"static": True})
    numbers: Gathered | Mapped
    frozen: tuple[dict[str, Array], ...]

    @property
    def spec(self) -> ProjectionSpec:
        """The spec, which fixes P and what its numbers build."""
        return self.numbers.spec

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        """The adapted leaves by path."""
        targets: dict[str, list[Target]] = {path: [] for path, _ in self.shapes}
        for target in self.targets:
            targets[target.path].append(target)
        return {path: _leaf(shape, targets[path]) for path, shape in self.shapes}

    def factors(self, theta_d: Array) -> dict[str, Array]:
        """Compute the factors by name, in the order of the layout."""
        found = {name: stack[i] for names, stack in self.numbers(theta_d).items() for i, name in enumerate(names)}
        return {name: found[name] for name in self.spec.layout.shapes}

    def low_rank(self, theta_d: Array, shardings: Shardings | None = None) -> list[tuple[Array, Array]]:
        """Compute A (layers, r, in) and Bᵀ (layers, r, out) of each target."""
        laid = [_laid(target, self.leaves[target.path], (shardings or {}).get(target.path)) for target in self.targets]
        factors = self.numbers(theta_d, self._of_pieces(laid))
        return [
            self._pair(target, frozen, factors, *wanted)
            for target, frozen, wanted in zip(self.targets, self.frozen, laid, strict=True)
        ]

    def pairs(self, theta_d: Array, shardings: Shardings | None = None) -> dict[str, tuple[Array, Array]]:
        """Compute for each path U (r, …) and V (r, …), with the axes of the leaf after the rank; see `LowRank`."""
        low_rank = dict(zip(self.targets, self.low_rank(theta_d, shardings), strict=True))
        found: dict[str, tuple[Array, Array]] = {}
        for path, (shape, roles, outputs, parts) in self.leaves.items():
            down = _joined([low_rank[part][0] for part in parts])
            up = _joined([_padded(part, outputs, low_rank[part][1]) for part in parts])
            out_sizes = [size if role != "i" else 1 for size, role in zip(shape, roles, strict=True)]
            found[path] = _spread(down, shape, parts[0]), up.reshape(-1, *out_sizes)
        return found

    def _pair(
        self,
        target: Target,
        frozen: Mapping[str, Array],
        factors: Mapping[Names, Array],
        of_down: NamedSharding | None,
        of_up: NamedSharding | None,
    ) -> tuple[Array, Array]:
        pieces = {piece: factors[names] for piece, names in _stacks(self.spec.form, target).items()}
        with jax.numpy_rank_promotion("allow"):  # the core broadcasts, which the user may have forbidden
            down, up, *rest = self.spec.form.chain(pieces, frozen, self.spec.chosen)
            for factor in rest:  # small products need no rounding for a GPU's matrix units
                up = jnp.matmul(factor, up, precision=lax.Precision.HIGHEST)
        down, up = (_of_layers(factor, len(target.names)) for factor in (down, up))
        return _reshard(down, of_down), _reshard(up.swapaxes(1, 2), of_up)

    def _of_pieces(self, laid: list[tuple[Any, Any]]) -> dict[Names, NamedSharding]:
        """Return the shardings of the pieces on an explicit mesh: a pair's as A and Bᵀ, others whole."""
        found: dict[Names, NamedSharding] = {}
        for target, (of_down, of_up) in zip(self.targets, laid, strict=True):
            if of_down is not None:
                whole = NamedSharding(of_down.mesh, PartitionSpec(None, None, None))
                mine = (of_down, of_up) if self.spec.frame == "pair" else (whole,) * len(self.spec.form.names)
                found |= zip(_stacks(self.spec.form, target).values(), mine, strict=True)
        return found


def numbers_of(spec: ProjectionSpec, targets: tuple[Target, ...], *, cached: bool) -> Gathered | Mapped:
    """Make the function from θ_d to the factors of these targets; ``cached`` is as in `gathered`."""
    stacks = {
        names: piece in OUTPUTS_FIRST for target in targets for piece, names in _stacks(spec.form, target).items()
    }
    return mapped(spec, stacks) if spec.map.groups is None else gathered(spec, stacks.items(), cached=cached)


def _stacks(frame: Frame, target: Target) -> dict[str, Names]:
    """Return for each piece the names of its factors: one for each layer, or a single one that all targets of a size
    share.
    """
    each = [piece_names(frame, name, target.sizes) for name in target.names]
    return {piece: tuple(dict.fromkeys(names[piece] for names in each)) for piece in frame.names}


def _leaf(shape: tuple[int, ...], targets: list[Target]) -> Leaf:
    first = targets[0]
    roles = "".join("i" if axis in first.inputs else "o" for axis in range(first.stacked, len(shape)))
    roles = "l" * first.stacked + roles
    outputs = math.prod(size for size, role in zip(shape, roles, strict=True) if role == "o")
    return Leaf(shape, roles, outputs, tuple(targets))


def _of_layers(factor: Array, layers: int) -> Array:
    """Return a factor for each layer, also where all layers share one."""
    shape = (layers, *factor.shape[-2:])
    return factor if factor.shape == shape else jnp.broadcast_to(factor, shape)


def _joined(parts: list[Array]) -> Array:
    """Join the parts: (layers, r, n) of each → (Σr, layers, n)."""
    return jnp.moveaxis(jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0], 1, 0)


def _spread(down: Array, shape: tuple[int, ...], target: Target) -> Array:
    """Return A (r, layers, in) with the axes of the leaf after the rank, of size 1 where it has outputs."""
    layers = shape[: target.stacked]
    sizes = down.reshape(-1, *layers, *(shape[axis] for axis in target.inputs))
    of_axis = {axis: 1 + len(layers) + i for i, axis in enumerate(target.inputs)}
    ordered = sizes.transpose(*range(1 + len(layers)), *(of_axis[axis] for axis in sorted(target.inputs)))
    outputs = [1 + axis for axis in range(len(layers), len(shape)) if axis not in of_axis]
    return jnp.expand_dims(ordered, outputs)


def _padded(target: Target, outputs: int, up: Array) -> Array:
    """Return Bᵀ (layers, r, out) with zeros for the outputs of the leaf that the target leaves alone."""
    after = outputs - target.first_row - target.out_features
    return jnp.pad(up, ((0, 0), (0, 0), (target.first_row, after))) if target.first_row or after else up


# ---- on a mesh with explicit axes -----------------------------------------------------------------------------------


def _laid(target: Target, leaf: Leaf, of_weight: NamedSharding | None) -> tuple[Any, Any]:
    """Return the shardings of A (layers, r, in) and Bᵀ (layers, r, out) beside a sharded weight. They are whole along
    the last axis where that belongs to a part of the outputs only, or where it is several axes taken as one.
    """
    if of_weight is None:
        return None, None
    axes = dict(enumerate(of_weight.spec))
    layers = axes.pop(0) if target.stacked else None
    ours = [axes[i] for i in target.inputs]
    theirs = [axis for i, axis in axes.items() if i not in target.inputs]
    part = target.out_features < leaf.outputs
    last = None if any(ours[1:]) else ours[0], None if part or any(theirs[1:]) else theirs[0]
    of_down, of_up = (NamedSharding(of_weight.mesh, PartitionSpec(layers, None, axis)) for axis in last)
    return of_down, of_up


def _reshard(array: Array, wanted: NamedSharding | None) -> Array:
    return array if wanted is None or explicit_sharding(array) == wanted else jax.sharding.reshard(array, wanted)
