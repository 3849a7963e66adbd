"""Adapter: what θ_d means for one tree of parameters. A pytree of its own; nothing is mutated."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from unilora_core import MismatchError, ProjectionSpec, TargetError, ValuesError, rates, save_adapter
from unilora_core.files import new_files
from unilora_core.header import write_targets
from unilora_core.lora import lora_config, lora_state
from unilora_jax.factors import Factors
from unilora_jax.lowrank import LowRank, evaluate
from unilora_jax.projection import check, explicit_sharding
from unilora_jax.targets import Target, check_leaf, factor_names, leaves_of, nearest

__all__ = ["Adapter"]


class _Leaf(NamedTuple):
    """An adapted leaf: its shape, the roles of its axes as in `LowRank`, how many outputs a layer has, its targets."""

    shape: tuple[int, ...]
    roles: str
    outputs: int
    targets: tuple[Target, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """How θ_d adapts a tree of parameters. Made by `plan` and `load`; holds neither θ_d nor the parameters.

    An adapter is a pytree whose leaves are a few arrays (1/√n_j, θ_d⁰, cached groups). Where they are large, pass it to
    the jitted step as an argument: arrays that a jitted function closes over become constants of its program.

    Attributes:
        targets: what is adapted.
        shapes: of the adapted leaves, by path.
    """

    targets: tuple[Target, ...] = field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata={"static": True})
    _factors: Factors

    @functools.cached_property
    def _leaves(self) -> dict[str, _Leaf]:
        """Path → adapted leaf."""
        targets: dict[str, list[Target]] = {path: [] for path, _ in self.shapes}
        for target in self.targets:
            targets[target.path].append(target)
        leaves = {}
        for path, shape in self.shapes:
            first = targets[path][0]
            roles = "".join("i" if axis in first.inputs else "o" for axis in range(first.stacked, len(shape)))
            roles = "l" * first.stacked + roles
            outputs = math.prod(size for size, role in zip(shape, roles, strict=True) if role == "o")
            leaves[path] = _Leaf(shape, roles, outputs, tuple(targets[path]))
        return leaves

    @property
    def spec(self) -> ProjectionSpec:
        """What fixes P."""
        return self._factors.spec

    def init(self) -> Array:
        """θ_d⁰: (d,) float32, where training starts."""
        return jnp.asarray(self.spec.init())

    def factors(self, theta_d: Array) -> dict[str, Array]:
        """Name → A (r, in) or B (out, r) of each target and layer, float32, differentiable in ``theta_d``."""
        stacks = self._stacks(self._checked(theta_d, "factors"))
        return {
            name: stack[i].T if name.endswith(".B") else stack[i]
            for names, stack in stacks.items()
            for i, name in enumerate(names)
        }

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The adapted model: ``function(params, …)`` becomes ``f(params, theta_d, …)``.

        Beside each product x·W of an adapted weight the low-rank path x·Aᵀ·Bᵀ is added; neither B·A nor a gradient of W
        is ever made. Composes with `jit`, `grad` (of ``theta_d``), `vmap` (over several θ_d, too), `scan`, `checkpoint`
        and sharding. Arrays among the arguments are traced, everything else is static.

        Raises (when the wrapped function is called):
            MismatchError: a leaf of ``params`` is missing or has another shape than the plan's.
            TargetError: the model never multiplies by an adapted weight, contracts other axes than the plan's inputs,
                or reads it in an operation that has no low-rank path.
            ValuesError: ``theta_d`` has another shape, or is no floating-point array of JAX or NumPy.
        """

        @functools.wraps(function)
        def adapted(params: Any, theta_d: Array, *args: Any, **kwargs: Any) -> Any:
            places, theta_d = self._places(params), self._checked(theta_d, "wrap")
            leaves, tree = jax.tree.flatten((params, args, kwargs))
            arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, np.generic))]
            output = None

            def flat(*values: Any) -> list[Any]:
                nonlocal output
                filled = list(leaves)
                for i, value in zip(arrays, values, strict=True):
                    filled[i] = value
                params, args, kwargs = jax.tree.unflatten(tree, filled)
                found, output = jax.tree.flatten(function(params, *args, **kwargs))
                return found

            closed = jax.make_jaxpr(flat)(*(leaves[i] for i in arrays))
            rest = [leaves[i] for i in arrays if i not in places]
            pairs = self._pairs(_varying_as(theta_d, rest), self._shardings(leaves, places, rest))
            values = [
                LowRank(
                    leaves[i],
                    *pairs[places[i]],
                    roles=self._leaves[places[i]].roles,
                    path=places[i],
                    shape=leaves[i].shape,
                )
                if i in places
                else leaves[i]
                for i in arrays
            ]
            reached: set[str] = set()
            results = evaluate(closed, values, reached)
            self._check_reached(reached)
            results = [result.weight if isinstance(result, LowRank) else result for result in results]
            return jax.tree.unflatten(output, results)

        return adapted

    def merge(self, params: Any, theta_d: Array) -> Any:
        """A new tree in which B·A is added to each adapted weight, in float32, rounded once to the weight's dtype.

        Best under `jax.jit`, as everything that computes factors: outside, each operation is compiled by itself. Inside
        no value can be looked at, so that numbers that are none pass there.

        Raises:
            MismatchError: a leaf of ``params`` is missing or has another shape than the plan's.
            ValuesError: ``theta_d`` does not fit, or holds NaN or infinity; or a weight's dtype cannot hold W + B·A
                where it holds W.
        """
        places = self._places(params)
        theta_d = self._checked(theta_d, "merge")
        _check_finite(theta_d, "merge: theta_d")
        pairs = self._pairs(theta_d)
        leaves, tree = jax.tree.flatten(params)
        for i, path in places.items():
            down, up = pairs[path]
            update = jnp.einsum("r...,r...->...", down, up)
            if (sharding := explicit_sharding(leaves[i])) is not None:
                update = jax.sharding.reshard(update, sharding)
            merged = (leaves[i].astype(jnp.float32) + update).astype(leaves[i].dtype)
            _check_merged(path, leaves[i], merged)
            leaves[i] = merged
        return jax.tree.unflatten(tree, leaves)

    def learning_rate(self, lora_rate: float) -> float:
        """The rate for θ_d that trains as LoRA would at ``lora_rate`` (see `unilora_core.rates`)."""
        return rates.theta_rate(self.spec, lora_rate)

    def summary(self) -> str:
        """One line: what trains, and how little of the model it is."""
        return (
            f"θ_d: {self.spec.d:,} numbers for D = {self.spec.D:,} LoRA parameters of "
            f"{sum(len(target.names) for target in self.targets)} targets"
        )

    # ---- files ----

    def save(
        self,
        path: str | os.PathLike,
        theta_d: Array,
        *,
        rename: Callable[[str], str] = str,
        tensors: Mapping[str, Array] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write θ_d, the spec and the targets as one file, atomically; `unilora_torch.load` reads it too.

        Args:
            rename: from a layer's name here (``layers_0.q_proj``) to the one by which others will look for it.
            tensors: what was trained beside θ_d, by name (``head.weight``, in PyTorch's shape if that is to read it).

        Raises:
            ValuesError: ``theta_d`` does not fit, or holds NaN or infinity; an old file at ``path`` is kept.
            OSError: the file cannot be written; it names the path.
        """
        theta_d = self._checked(theta_d, f"save: {path}")
        rows = [
            (name, rename(module), target.first_row, False)
            for target in self.targets
            for name, module in zip(target.names, target.modules, strict=True)
        ]
        modules_to_save = dict.fromkeys(name.rpartition(".")[0] for name in tensors or ())
        written = write_targets(rows, modules_to_save) | dict(metadata or {})
        save_adapter(path, self.spec, np.asarray(theta_d), tensors=tensors, metadata=written)

    def export_lora(
        self,
        folder: str | os.PathLike,
        theta_d: Array,
        *,
        base_model: str | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        """Write A and B, exactly, as a PEFT LoRA folder for the model of the same layers in PyTorch.

        Both files appear together; other files in the folder stay.

        Args:
            base_model: ``base_model_name_or_path``, the name or path of that model.
            rename: from a layer's name here (``layers.0.attn.q_proj``) to its name there.

        Raises:
            ValuesError: ``theta_d`` does not fit, or it or a factor holds NaN or infinity; old files are kept.
            OSError: a file cannot be written; it names the path.
        """
        theta_d = self._checked(theta_d, "export_lora")
        _check_finite(theta_d, "export_lora: theta_d")
        factors = {name: np.asarray(factor) for name, factor in self.factors(theta_d).items()}
        blocks: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {}
        heights: dict[str, int] = {}
        for name, factor in factors.items():
            _check_finite(factor, f"export_lora: {name}")
        for target in self.targets:
            for name, module in zip(target.names, target.modules, strict=True):
                block = factors[f"{name}.A"], factors[f"{name}.B"], target.first_row
                blocks.setdefault(rename(module), []).append(block)
                heights[rename(module)] = self._leaves[target.path].outputs
        state, rank = lora_state(blocks, heights)
        said = json.dumps(lora_config(blocks, rank, base_model=base_model), indent=2, sort_keys=True)
        folder = Path(folder)
        with new_files(folder / "adapter_model.safetensors", folder / "adapter_config.json") as (weights, config):
            save_file(state, weights, metadata={"format": "pt"})
            config.write_text(said + "\n", encoding="utf-8")

    # ---- internals ----

    def _places(self, params: Any) -> dict[int, str]:
        """Position among the leaves → path, of each adapted leaf; refuses a tree that is not the plan's."""
        leaves = leaves_of(params)
        position = {path: i for i, path in enumerate(leaves)}
        for path, shape in self.shapes:
            if path not in leaves:
                raise MismatchError(
                    f"{path}: expected a weight of shape {shape}, the tree has no such leaf; the nearest are "
                    f"{nearest(leaves, path)}."
                )
            check_leaf(path, leaves[path])
            if tuple(leaves[path].shape) != shape:
                raise MismatchError(
                    f"{path}: expected shape {shape}, got {tuple(leaves[path].shape)}; the adapter was planned for "
                    "another model."
                )
        return {position[path]: path for path, _ in self.shapes}

    def _checked(self, theta_d: Array, what: str) -> Array:
        """θ_d as an array of JAX, of the shape and the kind that fit."""
        if isinstance(theta_d, (np.ndarray, np.generic)):
            theta_d = jnp.asarray(theta_d)
        check(theta_d, (self.spec.d,), f"{what}: theta_d")
        return theta_d

    def _stacks(
        self, theta_d: Array, shardings: dict[str, NamedSharding] | None = None
    ) -> dict[tuple[str, ...], Array]:
        """Names → A (layers, r, in), and Bᵀ (layers, r, out), of each target."""
        if not shardings:
            return self._factors(theta_d)
        laid = []
        for target in self.targets:
            part = target.out_features < self._leaves[target.path].outputs
            laid += [_sharding(target, role, shardings.get(target.path), role == "o" and part) for role in "io"]
        return self._factors(theta_d, laid)

    def _shardings(self, leaves: list[Any], places: dict[int, str], inputs: list[Any]) -> dict[str, NamedSharding]:
        """Path → how the weight lies on an explicit mesh when it is used: whole along the axes that split the inputs
        (where weights are split there too, as in FSDP, they are gathered first; the factors need no gathering).
        """
        taken = {name for x in inputs if (s := explicit_sharding(x)) is not None for name in _mesh_axes(s.spec)}
        found = {}
        for i, path in places.items():
            if (sharding := explicit_sharding(leaves[i])) is not None:
                spec = [None if taken & _mesh_axes([axis]) else axis for axis in sharding.spec]
                found[path] = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return found

    def _pairs(
        self, theta_d: Array, shardings: dict[str, NamedSharding] | None = None
    ) -> dict[str, tuple[Array, Array]]:
        """Path → U (r, …) and V (r, …), with the axes of the leaf behind the rank; see `LowRank`."""
        stacks = self._stacks(theta_d, shardings)
        found: dict[str, tuple[Array, Array]] = {}
        for path, (shape, roles, _, parts) in self._leaves.items():
            down = _joined([stacks[factor_names(part, "A")] for part in parts])
            up = _joined([self._padded(part, stacks[factor_names(part, "B")]) for part in parts])
            in_sizes = [size if role != "o" else 1 for size, role in zip(shape, roles, strict=True)]
            out_sizes = [size if role != "i" else 1 for size, role in zip(shape, roles, strict=True)]
            found[path] = down.reshape(-1, *in_sizes), up.reshape(-1, *out_sizes)
        return found

    def _padded(self, target: Target, B: Array) -> Array:
        """Bᵀ (layers, r, out) with zeros for the outputs of the leaf that the target leaves alone."""
        after = self._leaves[target.path].outputs - target.first_row - target.out_features
        return jnp.pad(B, ((0, 0), (0, 0), (target.first_row, after))) if target.first_row or after else B

    def _check_reached(self, reached: set[str]) -> None:
        missing = [path for path, _ in self.shapes if path not in reached]
        if missing:
            raise TargetError(
                f"{missing[0]}: the model never multiplies by this weight ({len(missing)} such targets), so its update "
                "would do nothing. Exclude it, or choose other targets."
            )


def _sharding(target: Target, role: str, sharding: NamedSharding | None, whole: bool) -> NamedSharding | None:
    """Of A (layers, r, in) or Bᵀ (layers, r, out), for a weight that lies on a mesh as ``sharding`` says; ``whole``
    along the last axis where that belongs to a part of the outputs only.
    """
    if sharding is None:
        return None
    axes = dict(enumerate(sharding.spec))
    layers = axes.pop(0) if target.stacked else None
    mine = [axis for i, axis in axes.items() if (i in target.inputs) == (role == "i")]
    whole = whole or any(mine[1:])  # or where it is several axes taken as one
    return NamedSharding(sharding.mesh, PartitionSpec(layers, None, None if whole else mine[0]))


def _mesh_axes(spec: Iterable[Any]) -> set[str]:
    """The mesh axes in a PartitionSpec."""
    return {name for axis in spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))}


def _joined(parts: list[Array]) -> Array:
    """(layers, r, n) of each part → (Σr, layers, n)."""
    return jnp.moveaxis(jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0], 1, 0)


def _varying_as(theta_d: Array, arrays: list[Any]) -> Array:
    """Inside `shard_map`, θ_d marked as different on each device: then its gradient is summed once, over d numbers."""
    axes = (
        frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
        - jax.typeof(theta_d).manual_axis_type.varying
    )
    return jax.lax.pcast(theta_d, tuple(sorted(axes)), to="varying") if axes else theta_d


def _check_finite(values: Any, what: str) -> None:
    if not isinstance(values, jax.core.Tracer) and not np.isfinite(np.asarray(values)).all():
        raise ValuesError(
            f"{what} holds NaN or infinity; training diverged (a lower learning rate, or gradient clipping). "
            "Nothing was written or changed."
        )


def _check_merged(path: str, weight: Any, merged: Array) -> None:
    """Refuse W + B·A that is NaN or infinite where W is finite."""
    bad = jnp.isfinite(weight) & ~jnp.isfinite(merged)
    if not isinstance(bad, jax.core.Tracer) and (count := int(bad.sum())):
        raise ValuesError(
            f"merge: {path}: {count} of {merged.size} values of W + B·A are no numbers that {merged.dtype} holds; "
            "training diverged, or the weight needs a wider dtype. Nothing was changed."
        )
