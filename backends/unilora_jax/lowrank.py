"""The low-rank path in any JAX function: x·W becomes x·W + (x·U)·V wherever an adapted weight is contracted.

The function is traced to a jaxpr, which is evaluated with a `LowRank` in the place of each adapted weight. Operations
that only rearrange a weight (casts, transposes, slices, splits, reshapes) rearrange the pair too, those of
`unilora_jax.products` use it, loops and branches pass it on; any other operation that reads an adapted weight is an
error, as the update would be lost there.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import TargetError
from unilora_jax.products import PRODUCTS, LowRank, bind

__all__ = ["evaluate"]

Shape = tuple[int, ...]
Move = Callable[[Array], Array]
"""A function that rearranges U or V, without the rank."""


def evaluate(closed: ClosedJaxpr, args: Sequence[Any], reached: set[str]) -> list[Any]:
    """Compute the outputs of a jaxpr, some of whose arguments are `LowRank`.

    Args:
        reached: a set that gets the path of every adapted weight that is multiplied.

    Raises:
        TargetError: an adapted weight is read by an operation that has no low-rank path.
    """
    return _run(closed.jaxpr, closed.consts, args, reached)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], reached: set[str]) -> list[Any]:
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
            if any(isinstance(value, LowRank) for value in values):
                results = _adapted(eqn, values, reached)
            else:
                results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        many = eqn.primitive.multiple_results
        known |= zip(eqn.outvars, results if many else [results], strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _adapted(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> Any:
    """Evaluate one equation with a `LowRank` among its operands."""
    name, weight = eqn.primitive.name, next(value for value in values if isinstance(value, LowRank))
    if name in PRODUCTS:
        reached.add(weight.path)
        return PRODUCTS[name](eqn, *values)
    if name in CONTROL:
        return CONTROL[name](eqn, values, reached)
    if name in ("split", "unstack"):
        return _parts(eqn, *values)
    if name in REARRANGE and not any(isinstance(value, LowRank) for value in values[1:]):
        return _rearranged(eqn, *values)
    raise TargetError(
        f"{weight.path}: the model reads this weight in `{name}`, through which there is no "
        "low-rank path. Exclude it, or use merge, which adds B·A to the weight itself."
    )


# ---- what only rearranges -------------------------------------------------------------------------------------------


def _rearranged(eqn: JaxprEqn, w: LowRank, *rest: Any) -> Any:
    """Apply the same operation to W, U and V."""
    many, weight = eqn.primitive.multiple_results, bind(eqn, w.weight, *rest)
    weight = weight[0] if many else weight
    roles, move = REARRANGE[eqn.primitive.name](w, eqn.params, weight.shape, rest)
    moved = replace(w, weight=weight, down=jax.vmap(move)(w.down), up=jax.vmap(move)(w.up), roles=roles)
    return [moved] if many else moved


def _parts(eqn: JaxprEqn, w: LowRank) -> list[LowRank]:
    """Return what `split` or `unstack` makes of W, each part with its own of U and V."""
    axis, weights = eqn.params["axis"], bind(eqn, w.weight)
    stacked = eqn.primitive.name == "unstack"
    sizes = (1,) * len(weights) if stacked else eqn.params["sizes"]
    roles = w.roles[:axis] + w.roles[axis + 1 :] if stacked else w.roles

    def cut(factor: Array) -> list[Array]:
        whole = factor.shape[1 + axis] == w.weight.shape[axis]
        parts = lax.split(factor, sizes, 1 + axis) if whole else [factor] * len(sizes)
        return [lax.squeeze(part, [1 + axis]) if stacked else part for part in parts]

    each = zip(weights, cut(w.down), cut(w.up), strict=True)
    return [replace(w, weight=weight, down=down, up=up, roles=roles) for weight, down, up in each]


def _same(w: LowRank, *_: Any) -> tuple[str, Move]:
    """Keep U and V for casts and marks: they stay float32 until they are used."""
    return w.roles, lambda factor: factor


def _transpose(w: LowRank, params: dict, *_: Any) -> tuple[str, Move]:
    order = params["permutation"]
    return "".join(w.roles[axis] for axis in order), lambda factor: factor.transpose(order)


def _squeeze(w: LowRank, params: dict, *_: Any) -> tuple[str, Move]:
    gone = params["dimensions"]
    return "".join(role for i, role in enumerate(w.roles) if i not in gone), lambda factor: lax.squeeze(factor, gone)


def _expand(w: LowRank, params: dict, shape: Shape, _: Any) -> tuple[str, Move]:
    """Add new axes of size 1 (other broadcasts repeat a weight)."""
    if math.prod(shape) != math.prod(w.weight.shape):
        raise TargetError(f"{w.path}: the model repeats this weight along a new axis, which has no low-rank path here.")
    places = params["broadcast_dimensions"]
    roles = dict(zip(places, w.roles, strict=True))
    new = [axis for axis in range(len(shape)) if axis not in places]
    return "".join(roles.get(axis, "1") for axis in range(len(shape))), lambda factor: lax.expand_dims(factor, new)


def _reshape(w: LowRank, _: dict, shape: Shape, __: Any) -> tuple[str, Move]:
    """Split or join axes, which must have one role."""
    roles, groups = "", _axis_groups(w.weight.shape, shape)
    for old, new in groups:
        played = {w.roles[axis] for axis in old if w.weight.shape[axis] > 1} or {"1"}
        if len(played) > 1:
            raise TargetError(
                f"{w.path}: the model reshapes this weight {w.weight.shape} to {shape}, which mixes its inputs and its "
                "outputs; there is no low-rank path through that. Exclude it."
            )
        roles += played.pop() * len(new)

    def move(factor: Array) -> Array:
        sizes: list[int] = []
        for old, new in groups:
            whole = all(factor.shape[axis] == w.weight.shape[axis] for axis in old)
            sizes += [shape[axis] if whole else 1 for axis in new]
        return factor.reshape(sizes)

    return roles, move


def _axis_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes of two shapes whose sizes multiply to the same."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        before = after = 1
        while not (left or right) or before != after:
            if j == len(new) or (i < len(old) and before <= after):
                left.append(i)
                before *= old[i]
                i += 1
            else:
                right.append(j)
                after *= new[j]
                j += 1
        groups.append((left, right))
    return groups


def _rev(w: LowRank, params: dict, *_: Any) -> tuple[str, Move]:
    return w.roles, lambda factor: lax.rev(factor, params["dimensions"])


def _slice(w: LowRank, params: dict, *_: Any) -> tuple[str, Move]:
    starts, limits, strides = (params[name] for name in ("start_indices", "limit_indices", "strides"))

    def move(factor: Array) -> Array:
        for axis in _shared(factor, w):
            factor = lax.slice_in_dim(factor, starts[axis], limits[axis], strides[axis] if strides else 1, axis)
        return factor

    return w.roles, move


def _dynamic_slice(w: LowRank, _: dict, shape: Shape, starts: Sequence[Any]) -> tuple[str, Move]:
    def move(factor: Array) -> Array:
        for axis in _shared(factor, w):
            factor = lax.dynamic_slice_in_dim(factor, starts[axis], shape[axis], axis)
        return factor

    return w.roles, move


def _reshard(w: LowRank, params: dict, *_: Any) -> tuple[str, Move]:
    """Shard the axes that U and V share with W as W's; XLA lays the rest out."""
    wanted = params["dst_sharding"]
    spec = [*wanted.spec, *[None] * (w.weight.ndim - len(wanted.spec))]

    def move(factor: Array) -> Array:
        shared = _shared(factor, w)
        axes = (spec[axis] if axis in shared else None for axis in range(factor.ndim))
        return jax.sharding.reshard(factor, NamedSharding(wanted.mesh, PartitionSpec(*axes)))

    return w.roles, move


def _shared(factor: Array, w: LowRank) -> list[int]:
    """Return the axes of W that U or V, without the rank, has in full."""
    return [axis for axis, size in enumerate(w.weight.shape) if factor.shape[axis] == size]


REARRANGE = {
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
    "pvary": _same,
    "reshard": _reshard,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


# ---- what contains other jaxprs -------------------------------------------------------------------------------------


def _call(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> list[Any]:
    """Evaluate a nested `jit` inline."""
    return evaluate(eqn.params["jaxpr"], values, reached)


def _remat(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> list[Any]:
    def inner(*args: Any) -> list[Any]:
        return _run(eqn.params["jaxpr"], (), args, reached)

    return jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)


def _scan(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> list[Any]:
    """Evaluate a scan, whose weights may come as constants, or stacked, a layer for each step."""
    closed, (split, stop) = eqn.params["jaxpr"], _scan_bounds(eqn.params)
    consts, carry = values[:split], values[split:stop]
    stacks = [_layers_first(value) for value in values[stop:]]
    _no_weights(carry, "the carry of a scan")

    def body(carry: Any, step: Any) -> tuple[list[Any], list[Any]]:
        outputs = evaluate(closed, [*consts, *carry, *map(_one_layer, step)], reached)
        _no_weights(outputs, "the outputs of a scan")
        return outputs[: len(carry)], outputs[len(carry) :]

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, list(carry), stacks, **how)
    return [*carry, *outputs]


def _scan_bounds(params: dict[str, Any]) -> tuple[int, int]:
    """Return where the carry of a scan begins and ends among its operands; JAX 0.11 says so in a tree."""
    if "ft_in" not in params:
        return params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, _ = (len(part) for part in params["ft_in"].unpack())
    return consts, consts + carry


def _layers_first(value: Any) -> Any:
    if not isinstance(value, LowRank):
        return value
    if value.roles[0] != "l":
        raise TargetError(
            f"{value.path}: the model scans over axis 0 of this weight {value.weight.shape}, which the plan takes "
            "for a part of the matrix; name the subtree of stacked layers: plan(…, stacked=…)."
        )
    return replace(value, down=jnp.moveaxis(value.down, 1, 0), up=jnp.moveaxis(value.up, 1, 0))


def _one_layer(value: Any) -> Any:
    return replace(value, roles=value.roles[1:]) if isinstance(value, LowRank) else value


def _while(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> list[Any]:
    at, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = values[:at], values[at : at + body], values[at + body :]
    _no_weights(carry, "the carry of a while loop")
    return lax.while_loop(
        lambda carry: evaluate(eqn.params["cond_jaxpr"], [*cond_consts, *carry], reached)[0],
        lambda carry: evaluate(eqn.params["body_jaxpr"], [*body_consts, *carry], reached),
        list(carry),
    )


def _cond(eqn: JaxprEqn, values: list[Any], reached: set[str]) -> list[Any]:
    def branch(closed: ClosedJaxpr) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            outputs = evaluate(closed, values[1:], reached)
            _no_weights(outputs, "the outputs of a branch")
            return outputs

        return run

    return lax.switch(values[0], [branch(closed) for closed in eqn.params["branches"]])


def _no_weights(values: Sequence[Any], where: str) -> None:
    for value in values:
        if isinstance(value, LowRank):
            raise TargetError(f"{value.path}: this weight is in {where}, which would lose its update; exclude it.")


CONTROL = {
    "jit": _call,
    "pjit": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
