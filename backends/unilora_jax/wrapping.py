"""The adapted model: the function of the base, traced, with U and V beside each adapted weight."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from unilora_core import TargetError, ValuesError
from unilora_jax.chains import Chains, Leaf
from unilora_jax.checks import checked_theta, places_of
from unilora_jax.lowrank import evaluate
from unilora_jax.products import LowRank
from unilora_jax.projection import explicit_sharding, varying_as

__all__ = ["wrapped", "wrapped_sum"]

Pairs = dict[str, tuple[Array, Array]]
"""U and V by path; see `LowRank`."""


def wrapped(chains: Chains, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``f(params, theta_d, …)`` of ``function(params, …)``; see `Adapter.wrap`."""

    def adapted(params: Any, theta_d: Array, *args: Any, **kwargs: Any) -> Any:
        return _run(function, (chains,), (theta_d,), None, params, args, kwargs)

    return _presented(adapted, function)


def wrapped_sum(
    parts: Sequence[Chains], function: Callable[..., Any], weights: Sequence[Any] | None
) -> Callable[..., Any]:
    """Make ``f(params, thetas, …)`` of ``function(params, …)``; see `unilora_jax.wrap`."""

    def adapted(params: Any, thetas: Sequence[Array], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(thetas, (list, tuple)) or len(thetas) != len(parts):
            found = f"{len(thetas)}" if isinstance(thetas, (list, tuple)) else f"a {type(thetas).__name__}"
            raise ValuesError(
                f"wrap: thetas: expected a list of one theta_d for each of {len(parts)} adapters, got {found}."
            )
        return _run(function, parts, thetas, weights, params, args, kwargs)

    return _presented(adapted, function)


def _presented(adapted: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``adapted`` the function's name, and a signature of its own, by which `jax.jit` finds arguments: the
    function's, with one more after the first.
    """
    own = inspect.signature(adapted)
    functools.update_wrapper(adapted, function)
    del adapted.__wrapped__  # type: ignore[attr-defined]  # the function's signature is another
    params, theta, *_ = own.parameters.values()
    try:
        first, *others = inspect.signature(function).parameters.values()
        theirs = [first, *others] if first.kind is inspect.Parameter.VAR_POSITIONAL else others
        signature = own.replace(parameters=[params, theta, *theirs])
    except (TypeError, ValueError):  # positions are right without a signature, too
        signature = own
    adapted.__signature__ = signature  # type: ignore[attr-defined]
    return adapted


def _run(
    function: Callable[..., Any],
    parts: Sequence[Chains],
    thetas: Sequence[Any],
    weights: Sequence[Any] | None,
    params: Any,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Return what the function returns for the adapted ``params``."""
    adapted = _adapted(parts)
    places = places_of(params, {path: leaf.shape for path, leaf in adapted.items()})
    thetas = [checked_theta(chains, theta_d, "wrap") for chains, theta_d in zip(parts, thetas, strict=True)]
    leaves, tree = jax.tree.flatten((params, args, kwargs))
    leaves = [jnp.asarray(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf for leaf in leaves]
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    closed, output = _traced(function, leaves, tree, arrays)
    rest = [leaves[i] for i in arrays if i not in places]
    shardings = _shardings(leaves, places, rest)
    pairs = [c.pairs(varying_as(theta_d, rest), shardings) for c, theta_d in zip(parts, thetas, strict=True)]
    summed, reached = _summed(pairs, weights), set[str]()
    for i, path in places.items():
        leaf = adapted[path]
        leaves[i] = LowRank(leaves[i], *summed[path], leaf.roles, path, leaf.shape, leaf.targets[0].table)
    results = evaluate(closed, [leaves[i] for i in arrays], reached)
    _check_reached(adapted, reached)
    return jax.tree.unflatten(output, [r.weight if isinstance(r, LowRank) else r for r in results])


def _adapted(parts: Sequence[Chains]) -> dict[str, Leaf]:
    """Return the leaves that any of the adapters adapts, by path.

    Raises:
        TargetError: two of them give one leaf different shapes or inputs.
    """
    found: dict[str, Leaf] = {}
    for path, leaf in ((path, leaf) for chains in parts for path, leaf in chains.leaves.items()):
        first = found.setdefault(path, leaf)
        if (first.shape, first.roles) != (leaf.shape, leaf.roles):
            raise TargetError(
                f"wrap: {path}: the adapters were planned for different weights: {first.shape} and {leaf.shape}, or "
                "other axes of them as inputs; plan them on one tree."
            )
    return found


def _summed(pairs: Sequence[Pairs], weights: Sequence[Any] | None) -> Pairs:
    """Join the weighted pairs: Σ_k w_k U_k·V_k is one pair, whose rank is the sum of theirs."""
    if weights is not None:
        pairs = [
            {path: (down, up * jnp.asarray(w, up.dtype)) for path, (down, up) in each.items()}
            for w, each in zip(weights, pairs, strict=True)
        ]
    if len(pairs) == 1:
        return pairs[0]
    found: dict[str, list[tuple[Array, Array]]] = {}
    for each in pairs:
        for path, pair in each.items():
            found.setdefault(path, []).append(pair)
    return {path: tuple(map(jnp.concatenate, zip(*mine, strict=True))) for path, mine in found.items()}  # type: ignore[misc]


def _traced(
    function: Callable[..., Any], leaves: list[Any], tree: PyTreeDef, arrays: list[int]
) -> tuple[ClosedJaxpr, PyTreeDef]:
    """Return the function's program, whose arguments are the arrays among the leaves, and the structure of what it
    returns.
    """
    output = None

    def flat(*values: Any) -> list[Any]:
        nonlocal output
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        params, args, kwargs = jax.tree.unflatten(tree, filled)
        returned = function(params, *args, **kwargs)
        _check_output(returned)
        found, output = jax.tree.flatten(returned)
        return found

    closed = jax.make_jaxpr(flat)(*(leaves[i] for i in arrays))
    assert output is not None  # the function has run
    return closed, output


def _check_output(found: Any) -> None:
    """Refuse what `jax.jit` cannot return either.

    Raises:
        ValuesError: a leaf is no array and no number; the error says where it is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        try:
            jax.typeof(leaf)
        except (TypeError, ValueError) as error:
            kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
            kind += f" of {leaf.dtype}" if isinstance(leaf, (np.ndarray, np.generic)) else ""
            raise ValuesError(
                f"wrap: the function: expected arrays and numbers, got a {kind} in its output"
                f"{jax.tree_util.keystr(path)}. Return arrays and numbers alone, in containers that JAX knows; a class "
                "of your own becomes one by jax.tree_util.register_dataclass."
            ) from error


def _shardings(leaves: list[Any], places: dict[int, str], inputs: list[Any]) -> dict[str, NamedSharding]:
    """Return the shardings of the weights on an explicit mesh when they are used, by path: whole along the axes that
    split the inputs (where weights are split there too, as in FSDP, they are gathered first; the factors need no
    gathering).
    """
    taken = {name for x in inputs if (s := explicit_sharding(x)) is not None for name in _mesh_axes(s.spec)}
    found = {}
    for i, path in places.items():
        if (sharding := explicit_sharding(leaves[i])) is not None:
            spec = [None if taken & _mesh_axes([axis]) else axis for axis in sharding.spec]
            found[path] = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return found


def _mesh_axes(spec: Iterable[Any]) -> set[str]:
    """Return the mesh axes in a PartitionSpec."""
    return {name for axis in spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))}


def _check_reached(paths: Iterable[str], reached: set[str]) -> None:
    missing = [path for path in paths if path not in reached]
    if missing:
        raise TargetError(
            f"{missing[0]}: the model never multiplies by this weight ({len(missing)} such targets), so its update "
            "would do nothing. Exclude it, or choose other targets."
        )
