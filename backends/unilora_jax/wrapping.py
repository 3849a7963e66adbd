"""The adapted model: the function of the base, traced, with U and V beside each adapted weight."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from unilora_core import TargetError
from unilora_jax.chains import Chains
from unilora_jax.checks import checked_theta, places_of
from unilora_jax.lowrank import LowRank, evaluate
from unilora_jax.projection import explicit_sharding, varying_as

__all__ = ["wrapped"]


def wrapped(chains: Chains, function: Callable[..., Any]) -> Callable[..., Any]:
    """``f(params, theta_d, …)`` of ``function(params, …)``; see `Adapter.wrap`."""

    @functools.wraps(function)
    def adapted(params: Any, theta_d: Array, *args: Any, **kwargs: Any) -> Any:
        places, theta_d = places_of(params, dict(chains.shapes)), checked_theta(theta_d, chains.spec.d, "wrap")
        leaves, tree = jax.tree.flatten((params, args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, np.generic))]
        closed, output = _traced(function, leaves, tree, arrays)
        weights = _weights(chains, theta_d, leaves, places, [i for i in arrays if i not in places])
        reached: set[str] = set()
        results = evaluate(closed, [weights.get(i, leaves[i]) for i in arrays], reached)
        _check_reached(chains, reached)
        return jax.tree.unflatten(output, [r.weight if isinstance(r, LowRank) else r for r in results])

    return adapted


def _traced(
    function: Callable[..., Any], leaves: list[Any], tree: PyTreeDef, arrays: list[int]
) -> tuple[ClosedJaxpr, PyTreeDef]:
    """The function's program, whose arguments are the arrays among the leaves, and the structure of what it returns."""
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
    assert output is not None  # the function has run
    return closed, output


def _weights(
    chains: Chains, theta_d: Array, leaves: list[Any], places: dict[int, str], others: list[int]
) -> dict[int, LowRank]:
    """Position → adapted weight; ``others``: the positions of the other arrays."""
    rest = [leaves[i] for i in others]
    pairs = chains.pairs(varying_as(theta_d, rest), _shardings(leaves, places, rest))
    return {
        i: LowRank(leaves[i], *pairs[path], roles=chains.leaves[path].roles, path=path, shape=leaves[i].shape)
        for i, path in places.items()
    }


def _shardings(leaves: list[Any], places: dict[int, str], inputs: list[Any]) -> dict[str, NamedSharding]:
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


def _mesh_axes(spec: Iterable[Any]) -> set[str]:
    """The mesh axes in a PartitionSpec."""
    return {name for axis in spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))}


def _check_reached(chains: Chains, reached: set[str]) -> None:
    missing = [path for path, _ in chains.shapes if path not in reached]
    if missing:
        raise TargetError(
            f"{missing[0]}: the model never multiplies by this weight ({len(missing)} such targets), so its update "
            "would do nothing. Exclude it, or choose other targets."
        )
