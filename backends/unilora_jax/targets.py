"""Choice of the adapted leaves of a tree of parameters: a pattern goes in, a checked tuple of `Target` comes out.

A leaf is known by its path, the keys joined by "/": ``layers/0/attn/q_proj/kernel``. A factor is known by the layer it
belongs to, in the dotted names of other frameworks: ``layers.0.attn.q_proj.A``.
"""

import contextlib
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from unilora_core import TargetError
from unilora_core.frames import Sizes
from unilora_core.selecting import given, matches

__all__ = [
    "ALL_LINEAR",
    "TABLE",
    "WEIGHTS",
    "Target",
    "conv_target",
    "embedding_target",
    "find_targets",
    "leaves_of",
    "linear_target",
    "readings_of",
]

ALL_LINEAR = "all-linear"

WEIGHTS = ("kernel", "weight")
"""The names by which a layer calls its matrix or its kernel."""

TABLE = "embedding"
"""The name by which Flax's Embed calls its table."""

NOT_LINEAR = r".*(embed|norm).*|ln(_.*|\d+)?|w[tp]e|(.*_)?head|classifier|score|logits(_dense)?"
"""The names of layers that ``"all-linear"`` leaves out: embeddings, norms, output heads."""

OTHER_CLASSES = r"(equinox|flax)\..*\.(.*Embed.*|.*Norm|.*Conv.*)"
"""The classes of modules that it leaves out, whatever their names are, where the tree has modules."""

DEQUANTISE = "dequantise inside the jitted function: adapter.wrap(f)(dequantised(params), theta_d, …)"

STACKED = r"(.*/)?(layers|blocks|h|stack(ed)?)"
"""The subtrees whose leaves carry a leading layer axis, unless a layer's number comes next in the path."""

FLAX_INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2}
"""The number of input axes of Flax's MultiHeadAttention, which keeps its heads as an axis: kernels (in, heads,
head_dim), and (heads, head_dim, out)."""


@dataclass(frozen=True)
class Target:
    """One low-rank update: B·A beside a weight, or beside a block of its outputs.

    Attributes:
        path: the path of the leaf.
        names: the prefixes of the factors (``name.A`` and ``name.B`` of a pair): one, or one for each layer of a
            stacked leaf.
        modules: the names of the layers, one for each of ``names``; the same, except for blocks of a fused layer.
        in_features: the product of the sizes of the axes that the model contracts; for an embedding, its vocabulary.
        out_features: how many of the leaf's outputs are adapted.
        inputs: the axes of the leaf that the model contracts, in the order in which the columns of A count them.
        stacked: whether axis 0 of the leaf counts layers.
        first_row: where the adapted outputs start; not 0 for the k and v blocks of a fused qkv.
        table: whether the model looks rows up in the leaf, and may also multiply by them, as a tied head does.
    """

    path: str
    names: tuple[str, ...]
    modules: tuple[str, ...]
    in_features: int
    out_features: int
    inputs: tuple[int, ...]
    stacked: bool = False
    first_row: int = 0
    table: bool = False

    @property
    def sizes(self) -> Sizes:
        """The inputs and outputs of one layer."""
        return Sizes(self.in_features, self.out_features)


def leaves_of(params: Any) -> dict[str, Any]:
    """Return the leaves by path, in the order of `jax.tree.leaves`.

    Raises:
        TargetError: two leaves have one path, as those of ``{"a/b": …, "a": {"b": …}}``.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    whole = {_joined(path) for path, _ in flat}
    siblings = Counter(_joined(path[:-1]) for path, _ in flat)
    found: dict[str, Any] = {}
    for path, leaf in flat:
        name, parent = _joined(path), _joined(path[:-1])
        boxed = path and path[-1] == GetAttrKey("value") and siblings[parent] == 1 and parent not in whole
        name = parent if boxed else name  # Flax keeps an array in a box, as its only leaf
        if name in found:
            raise TargetError(f"{name}: two leaves of the tree have this path; rename one of them.")
        found[name] = leaf
    return found


def find_targets(
    params: Any,
    targets: str | Iterable[str | Target],
    *,
    exclude: str | Iterable[str] = (),
    stacked: str = STACKED,
) -> tuple[Target, ...]:
    """Return the leaves that ``targets`` selects, in the order of the tree.

    Args:
        targets: ``"all-linear"``: each leaf called ``kernel`` or ``weight`` that is a matrix, a stack of matrices or
            Flax's attention, except in layers whose own name or class says embedding, norm or output head
            (`NOT_LINEAR`, `OTHER_CLASSES`); or a regular expression that the whole path of a leaf must match; or a list
            of names, each of which selects the weights of the layers that it equals or that end in it (``"q_proj"``,
            ``"attn/q_proj"``); or a list of `Target`, taken as it is. What else is selected is read as a convolution
            or an embedding where its class says so, in trees of modules; or where it has four axes or more, or is
            called ``embedding``.
        exclude: a regular expression or a list of names, likewise, to remove from the selection.
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.

    Raises:
        TargetError: nothing is selected (the error lists the nearest paths), or a selected leaf is no matrix, kernel
            or table, or is quantised.
    """
    if not isinstance(targets, str):
        targets = tuple(targets)
        if made := given(targets, Target):
            return made
    leaves, exclude = leaves_of(params), exclude if isinstance(exclude, str) else tuple(exclude)
    _refuse_quantised(leaves, targets, exclude)
    linear = targets == ALL_LINEAR
    chosen = _all_linear(params, leaves, stacked) if linear else [path for path in leaves if _matches(path, targets)]
    kept = [path for path in chosen if not _matches(path, exclude)]
    if not kept:
        raise TargetError(_no_match(targets, exclude, chosen, list(leaves)))
    classes = _classes(params)
    return tuple(_reading(path, leaves[path], classes, stacked) for path in kept)


def linear_target(
    path: str, leaf: Any, *, inputs: int | tuple[int, ...] | None = None, stacked: str = STACKED
) -> Target:
    """Make the `Target` of a weight.

    A leaf called ``weight`` is read as (out, in), as in Equinox; any other as (in, out), as in Flax. Three axes mean a
    stacked matrix, (layers, in, out), or Flax's attention, (in, heads, head_dim). What the model really contracts is
    checked when it is traced.

    Args:
        inputs: the axes that the model contracts, or how many, where that does not follow from the above.
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.

    Raises:
        TargetError: the leaf is no floating-point array of JAX or NumPy, or has another number of axes.
    """
    check_leaf(path, leaf)
    _, last = _split(path)
    prefix, heads = _stacked_prefix(path, stacked), _heads(path)
    axes = list(range(leaf.ndim))
    is_stacked = leaf.ndim > 2 and (prefix is not None or (heads is None and inputs is None))
    if is_stacked:
        axes.pop(0)
    if isinstance(inputs, tuple):
        chosen = inputs
    else:
        count = max(inputs or {2: 1, 3: heads}.get(len(axes)) or 0, 0)
        chosen = tuple(axes[len(axes) - count :] if last == "weight" else axes[:count])
    if not chosen or not set(chosen) < set(axes):
        raise TargetError(
            f"{path}: expected a matrix, or a stack of matrices with the layers in front, got shape {leaf.shape}; "
            "exclude it, or say what it is: unilora_jax.linear_target(path, leaf, inputs=…) with the axes that the "
            "model contracts, conv_target(path, leaf) or embedding_target(path, leaf)."
        )
    return _target(path, leaf, chosen, is_stacked, prefix)


def conv_target(path: str, leaf: Any, *, stacked: str = STACKED) -> Target:
    """Make the `Target` of a convolution: B·A as its kernel has the shape (out, in / groups, *kernel).

    A leaf called ``weight`` is read as (out, in / groups, *kernel), as in Equinox; any other as (*kernel, in / groups,
    out), as in Flax. The columns of A count (in / groups, *kernel) in both, as in PyTorch.

    Args:
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.

    Raises:
        TargetError: the leaf is no floating-point array of JAX or NumPy, or has less than one axis beside the two.
    """
    check_leaf(path, leaf)
    prefix = _stacked_prefix(path, stacked)
    axes = list(range(prefix is not None, leaf.ndim))
    if len(axes) < 3:
        raise TargetError(
            f"{path}: expected the kernel of a convolution, (*kernel, in, out), or (out, in, *kernel) of a leaf called "
            f"weight{', after the axis of the layers' if prefix is not None else ''}; got shape {leaf.shape}."
        )
    inputs = axes[1:] if _split(path)[1] == "weight" else [axes[-2], *axes[:-2]]
    return _target(path, leaf, tuple(inputs), prefix is not None, prefix)


def embedding_target(path: str, leaf: Any, *, stacked: str = STACKED) -> Target:
    """Make the `Target` of an embedding: A (r, vocabulary), B (width, r) for a table (vocabulary, width).

    Args:
        stacked: a regular expression for the paths of subtrees whose leaves carry a leading layer axis.

    Raises:
        TargetError: the leaf is no floating-point array of JAX or NumPy, or has other than two axes.
    """
    check_leaf(path, leaf)
    prefix = _stacked_prefix(path, stacked) if leaf.ndim > 2 else None
    first = int(prefix is not None)
    if leaf.ndim - first != 2:
        raise TargetError(f"{path}: expected the table of an embedding, (vocabulary, width), got shape {leaf.shape}.")
    return replace(_target(path, leaf, (first,), prefix is not None, prefix), table=True)


def readings_of(params: Any, leaves: Mapping[str, Any], stacked: str) -> Iterator[Target]:
    """Yield every target that each leaf can be, first what `find_targets` makes of it; nothing for other leaves.

    Args:
        leaves: the leaves of ``params`` by path.
    """
    classes = _classes(params)
    for path, leaf in leaves.items():
        found = []
        for read in (functools.partial(_reading, classes=classes), linear_target, embedding_target, conv_target):
            with contextlib.suppress(TargetError):
                found.append(read(path, leaf, stacked=stacked))
        yield from dict.fromkeys(found)


def _reading(path: str, leaf: Any, classes: Mapping[str, str], stacked: str) -> Target:
    """Make the target that a leaf most likely is."""
    layer, last = _split(path)
    kind, axes = classes.get(layer, ""), getattr(leaf, "ndim", 0) - (_stacked_prefix(path, stacked) is not None)
    if "Embed" in kind or (last == TABLE and axes == 2):
        return embedding_target(path, leaf, stacked=stacked)
    if ("Conv" in kind and axes > 2) or (axes > 3 and _heads(path) is None):
        return conv_target(path, leaf, stacked=stacked)
    return linear_target(path, leaf, stacked=stacked)


def _target(path: str, leaf: Any, inputs: tuple[int, ...], is_stacked: bool, prefix: str | None) -> Target:
    width = math.prod(leaf.shape[axis] for axis in inputs)
    height = math.prod(leaf.shape[is_stacked:]) // width
    names = _names(_split(path)[0], prefix, leaf.shape[0] if is_stacked else None)
    return Target(path, names, names, width, height, inputs, is_stacked)


def check_leaf(path: str, leaf: Any) -> None:
    """Refuse a leaf that is no floating-point array.

    Raises:
        TargetError: it is none; the error has the path and what was found.
    """
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise TargetError(
            f"{path}: expected an array of JAX or NumPy, got {type(leaf).__module__}.{type(leaf).__name__}; "
            "convert the parameters first, or exclude it."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TargetError(
            f"{path}: expected a floating-point weight, got {leaf.dtype}; a quantised or integer leaf cannot be read "
            f"as a matrix. Exclude it, or {DEQUANTISE}."
        )


def nearest(paths: Iterable[str], name: str) -> list[str]:
    """Return the paths that look most like ``name``, or the first ones where none does; only the beginning of a very
    long name counts.
    """
    paths = list(paths)
    return _close(paths, name) or paths[:8]


def _close(paths: list[str], name: str) -> list[str]:
    return difflib.get_close_matches(name[:256], paths, 3, 0.4)


def _all_linear(params: Any, leaves: dict[str, Any], stacked: str) -> list[str]:
    """Return the paths that ``"all-linear"`` means."""
    others, found = _classes(params), []
    for path, leaf in leaves.items():
        layer, last = _split(path)
        most = 2 + (_stacked_prefix(path, stacked) is not None) + (_heads(path) is not None)
        named = last in WEIGHTS and not re.fullmatch(NOT_LINEAR, layer.rsplit("/", 1)[-1], re.IGNORECASE)
        if named and layer not in others and 2 <= getattr(leaf, "ndim", 0) <= most:
            found.append(path)
    return found


def _classes(params: Any) -> dict[str, str]:
    """Return the class names of the modules that are no linear layers, by path, where the tree has modules."""
    modules = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_other)
    return {_joined(path): type(node).__name__ for path, node in modules if _is_other(node)}


def _is_other(node: Any) -> bool:
    return re.fullmatch(OTHER_CLASSES, f"{type(node).__module__}.{type(node).__name__}") is not None


def _refuse_quantised(leaves: Mapping[str, Any], targets: str | Iterable[str | Target], exclude: Any) -> None:
    """Refuse a selected weight that is several leaves.

    Raises:
        TargetError: there is such a weight; the error has its path, what it holds, and the remedy.
    """
    held: dict[str, list[str]] = {}
    for *keys, last in (path.split("/") for path in leaves):
        ends = [i for i, key in enumerate(keys, 1) if key in WEIGHTS]
        if ends and last not in WEIGHTS and (path := "/".join(keys[: ends[0]])) not in leaves:
            held.setdefault(path, []).append("/".join([*keys[ends[0] :], last]))
    for path, parts in held.items():
        if (targets == ALL_LINEAR or _matches(path, targets)) and not _matches(path, exclude):
            raise TargetError(
                f"{path}: expected an array, this weight holds {', '.join(parts)}, as a quantised one does (qwix's "
                f"QArray). Plan on the shapes of the dequantised tree, and {DEQUANTISE}; or exclude it."
            )


def _split(path: str) -> tuple[str, str]:
    """Return the layer that a leaf belongs to, and the leaf's own name."""
    layer, _, last = path.rpartition("/")
    return (layer, last) if layer and last in (*WEIGHTS, TABLE) else (path, last)


def _heads(path: str) -> int | None:
    """Return how many axes Flax's attention contracts, if the path may be a kernel of it."""
    layer, last = _split(path)
    return FLAX_INPUTS.get(layer.rsplit("/", 1)[-1]) if last == "kernel" else None


def _names(layer: str, prefix: str | None, layers: int | None) -> tuple[str, ...]:
    if layers is None:
        return (layer.replace("/", "."),)
    before, after = (prefix, layer[len(prefix) :]) if prefix is not None else (layer, "")
    return tuple(f"{before}/{i}{after}".replace("/", ".") for i in range(layers))


def _stacked_prefix(path: str, stacked: str) -> str | None:
    """Return the part of a leaf's path after which the number of the layer belongs."""
    parts = _split(path)[0].split("/")
    for end in range(1, len(parts) + 1):
        prefix = "/".join(parts[:end])
        if re.fullmatch(stacked, prefix) and not (end < len(parts) and parts[end].isdigit()):
            return prefix
    return None


def _joined(path: tuple) -> str:
    """Join the keys of a path, whatever container they belong to."""
    return "/".join(
        str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))) for key in path
    )


def _matches(path: str, pattern: str | Iterable[str | Target]) -> bool:
    return matches(dict.fromkeys([path, _split(path)[0]]), pattern, "/")


def _no_match(targets: str | Iterable[str | Target], exclude: object, chosen: list[str], paths: list[str]) -> str:
    if chosen:
        return f"all {len(chosen)} leaves selected by {targets!r} are excluded by {exclude!r}."
    if not paths:
        return f"no leaf matches {targets!r}: the tree of parameters is empty."
    words = [targets] if isinstance(targets, str) else [str(target) for target in targets]
    near = [match for word in words for match in _close(paths, word)]
    return (
        f"no leaf matches {targets!r}; the nearest paths are {list(dict.fromkeys(near)) or paths[:8]}. "
        "A list holds names or endings, a string is a regular expression of the whole path."
    )
