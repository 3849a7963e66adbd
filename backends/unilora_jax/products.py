"""The operations that use an adapted weight: a product, a convolution, a lookup of rows.

Each is linear in the weight, so the update U·V goes beside it: first the operation with U, which leaves r numbers in
the place of the outputs, then the product with V.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import TargetError
from unilora_jax.projection import explicit_sharding

__all__ = ["PRODUCTS", "LowRank", "bind"]

Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A weight and its update, W + Σ_k U_k·V_k.

    Attributes:
        weight: W, as the model holds it.
        down: U, with the rank first, then the axes of W, of size 1 where W has an output.
        up: V, with the rank first, then the axes of W, of size 1 where W has an input.
        roles: the role of each axis of W: "i" is contracted with the input, "o" is an output, "l" counts layers, "1" is
            new.
        path, shape: the leaf's, for messages.
        table: whether rows of it are looked up, and may also be multiplied by, as in a tied head.
    """

    weight: Array
    down: Array
    up: Array
    roles: str = field(metadata={"static": True})
    path: str = field(metadata={"static": True})
    shape: Shape = field(metadata={"static": True})
    table: bool = field(default=False, metadata={"static": True})


def _dot_general(eqn: JaxprEqn, left: Any, right: Any) -> Array:
    """Compute x·W + (x·U)·V; W may stand on either side."""
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        raise TargetError(f"{left.path} and {right.path} are multiplied with each other; adapt one of them only.")
    first = isinstance(left, LowRank)
    w, x = (left, right) if first else (right, left)
    w = _turned(w, eqn.params["dimension_numbers"][0][0 if first else 1])
    axes = _axes(w, x.ndim, eqn.params["dimension_numbers"], first)
    precision, dtype = eqn.params["precision"], jnp.promote_types(x.dtype, w.weight.dtype)
    down, up = (
        lax.squeeze(factor.astype(dtype), [1 + axis for axis in range(w.weight.ndim) if axis not in kept])
        for factor, kept in ((w.down, axes.down), (w.up, axes.up))
    )
    lies = _hidden_sharding(x, axes)
    hidden = jnp.einsum(x, axes.x, down, axes.down, axes.hidden, precision=precision, out_sharding=lies)
    pair = (up, axes.up, hidden, axes.hidden) if first else (hidden, axes.hidden, up, axes.up)
    how = {name: eqn.params[name] for name in ("precision", "preferred_element_type", "out_sharding")}
    update = jnp.einsum(*pair, axes.output, **how)
    base = bind(eqn, *((w.weight, x) if first else (x, w.weight)))
    return base + update.astype(base.dtype)


class _Axes(NamedTuple):
    """The axes of each array of a product, by number, as `jnp.einsum` takes them."""

    x: list[int]
    down: list[int]
    up: list[int]
    hidden: list[int]
    output: list[int]


def _axes(w: LowRank, ndim: int, numbers: Any, first: bool) -> _Axes:
    """Number every axis: those of W, those of x (of ``ndim`` axes) that it does not share with W, and the rank."""
    contract, batch = numbers
    (w_in, x_in), (w_batch, x_batch) = (contract, batch) if first else (contract[::-1], batch[::-1])
    _check_roles(w, w_in, "contracts")
    of_w = list(range(w.weight.ndim))
    of_x = [len(of_w) + axis for axis in range(ndim)]
    for mine, its in [*zip(x_in, w_in, strict=True), *zip(x_batch, w_batch, strict=True)]:
        of_x[mine] = its
    rank = len(of_w) + ndim
    layers = [axis for axis in of_w if w.roles[axis] == "l"]
    x_free = [axis for axis in of_x if axis >= len(of_w)]
    w_free = [axis for axis in of_w if axis not in w_in and axis not in w_batch]
    return _Axes(
        x=of_x,
        down=[rank, *(axis for axis in of_w if axis in w_in or axis in layers)],
        up=[rank, *(axis for axis in of_w if axis not in w_in)],
        hidden=[*w_batch, *x_free, *(axis for axis in layers if axis not in w_batch), rank],
        output=[*w_batch, *(w_free + x_free if first else x_free + w_free)],
    )


def _turned(w: LowRank, contracted: Sequence[int]) -> LowRank:
    """Return a table the other way round where the model contracts its width, as a tied head does."""
    if not (w.table and all(w.roles[axis] in "o1" for axis in contracted)):
        return w
    return replace(w, down=w.up, up=w.down, roles=w.roles.translate(str.maketrans("io", "oi")))


def _check_roles(w: LowRank, contracted: Collection[int], how: str) -> None:
    """Refuse a product over other axes than the plan's inputs, or A and B would change places unseen."""
    inputs = {axis for axis, role in enumerate(w.roles) if role == "i"}
    if inputs - set(contracted) or any(w.roles[axis] in "ol" for axis in contracted):
        moved = "" if w.weight.shape == w.shape else f", which the model made of the leaf {w.shape},"
        raise TargetError(
            f"{w.path}: the plan takes the axes {sorted(inputs)} of this weight {w.weight.shape}{moved} for its "
            f"inputs, but the model {how} {sorted(contracted)}. Give the target as "
            "unilora_jax.linear_target(path, leaf, inputs=(…,)), with the axes of the leaf that are inputs, or as "
            "conv_target(path, leaf) or embedding_target(path, leaf)."
        )


def _hidden_sharding(x: Array, axes: _Axes) -> NamedSharding | None:
    """Return the sharding of x·U on an explicit mesh: that of x, whole along the rank."""
    if (sharding := explicit_sharding(x)) is None:
        return None
    lies = dict(zip(axes.x, sharding.spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(lies.get(axis) for axis in axes.hidden)))


# ---- a convolution --------------------------------------------------------------------------------------------------


def _convolution(eqn: JaxprEqn, x: Any, w: Any) -> Array:
    """Compute conv(x, W) + conv(conv(x, U), V): U is a kernel of r outputs, V one of 1 × 1.

    Of a convolution with groups every group has the same U, and rows of V of its own.
    """
    if isinstance(x, LowRank):
        raise TargetError(f"{x.path}: the model convolves this weight with a kernel; exclude it, or use merge.")
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    out, *inputs = numbers.rhs_spec
    _check_roles(w, inputs, "contracts")
    if params["batch_group_count"] > 1:
        raise TargetError(f"{w.path}: the model groups the batch in its convolution by this weight; exclude it.")
    groups, precision = params["feature_group_count"], params["precision"]
    base, dtype = bind(eqn, x, w.weight), jnp.promote_types(x.dtype, w.weight.dtype)
    down = _with_rank(w.down.astype(dtype), out)
    hidden = lax.conv_general_dilated_p.bind(
        x, jnp.concatenate([down] * groups, out), **eqn.primitive.get_bind_params(params)
    )
    ones, pads = (1,) * (x.ndim - 2), ((0, 0),) * (x.ndim - 2)
    update = lax.conv_general_dilated(
        hidden.astype(dtype),
        _with_rank(w.up.astype(dtype), inputs[0]),
        ones,
        pads,
        dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=params["preferred_element_type"],
    )
    return base + update.astype(base.dtype)


def _with_rank(factor: Array, axis: int) -> Array:
    """Return a factor with the rank in the place of an axis of size 1."""
    return jnp.moveaxis(lax.squeeze(factor, [1 + axis]), 0, axis)


# ---- a lookup -------------------------------------------------------------------------------------------------------


def _lookup(eqn: JaxprEqn, w: Any, places: Any) -> Array:
    """Compute W[i] + U[i]·V."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows = {axis for axis, role in enumerate(w.roles) if role == "i"}
    parts = {axis for axis, size in enumerate(w.weight.shape) if sizes[axis] < size}
    _check_roles(w, parts | (rows & set(numbers.start_index_map)), "looks up")
    if any(sizes[axis] > 1 for axis in rows) or numbers.operand_batching_dims:
        raise TargetError(
            f"{w.path}: the model looks up blocks of this weight, not rows, through which there is no low-rank path. "
            "Exclude it, or use merge, which adds B·A to the weight itself."
        )
    base = bind(eqn, w.weight, places)
    kept = [axis for axis in range(w.weight.ndim) if axis not in numbers.collapsed_slice_dims]
    outputs = [at for at, axis in zip(numbers.offset_dims, kept, strict=True) if axis not in rows]
    rest = [at for at in range(base.ndim) if at not in outputs]
    hidden = lax.squeeze(_rows(eqn, w.down.astype(base.dtype), places), [1 + at for at in outputs])
    up, rank = lax.squeeze(w.up.astype(base.dtype), [1 + axis for axis in rows]), base.ndim
    return base + jnp.einsum(hidden, [rank, *rest], up, [rank, *outputs], list(range(base.ndim)))


def _rows(eqn: JaxprEqn, down: Array, places: Any) -> Array:
    """Look up rows of U, with the rank first: r numbers each, and zeros where the model fills."""
    params, numbers = eqn.primitive.get_bind_params(eqn.params), eqn.params["dimension_numbers"]
    behind = {
        name: tuple(1 + axis for axis in getattr(numbers, name))
        for name in ("offset_dims", "collapsed_slice_dims", "start_index_map")
    }
    behind["offset_dims"] = (0, *behind["offset_dims"])
    sizes = len(down), *map(min, params["slice_sizes"], down.shape[1:])
    how = {"dimension_numbers": numbers._replace(**behind), "slice_sizes": sizes, "fill_value": 0}
    return lax.gather_p.bind(down, places, **(params | how))


def bind(eqn: JaxprEqn, *values: Any) -> Any:
    """Evaluate an equation for other values."""
    return eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))


PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution, "gather": _lookup}
"""The operations that use an adapted weight, by the name of their primitive."""
