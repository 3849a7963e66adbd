"""VB-LoRA: every factor is cut into sub-vectors, each a mixture of the top k of a learned codebook.

θ_d holds the codebook (vectors, length) and the logits (D / length, vectors). The mixture weights are learned, so the
map is not linear: it has no transpose, and no start at which its update is zero.

Source: VB-LoRA (arXiv 2405.15179);
defaults and starts as in PEFT 0.21.
"""

import functools
import math
import operator

import numpy as np

from unilora_core import draws
from unilora_core._namespace import Array, array_namespace
from unilora_core.errors import SpecError
from unilora_core.layout import Layout
from unilora_core.maps.mapping import Frozen, Instance, Map, Options
from unilora_core.schema import shown

__all__ = ["CODEBOOK"]

MOST = 2**31

ENTRIES = 2**20
"""The number of vector entries that are mixed at a time: a file may ask for as many vectors as it has logits."""

RATE = 2.5
"""The factor on LoRA's learning rate. VB-LoRA trains its codebook at 1e-3 and its logits at 1e-2 where LoRA has 4e-4
(arXiv 2405.15179, table 9): 2.5 and 25 times as much. θ_d has one rate, the codebook's; at 10 the loss rose again
within 60 steps."""


def _width(layout: Layout, options: Options) -> int:
    vectors, length = int(options["vectors"]), int(options["length"])
    return vectors * length + layout.size // length * vectors


def _check(of: Instance) -> None:
    vectors, length, topk = (int(of.chosen[name]) for name in ("vectors", "length", "topk"))
    widths = {shape[-1]: name for name, shape in of.layout.factors}
    for width, name in widths.items():
        if width % length:
            common = math.gcd(*widths)
            near = math.gcd(length, common)
            raise SpecError(
                f"ProjectionSpec: the codebook's length = {length} does not divide the {width} columns of {name!r}; "
                f"take one that divides every width of the layers, such as {near if near > 1 else common}."
            )
    if topk > vectors:
        raise SpecError(f"ProjectionSpec: expected topk ≤ vectors = {vectors}, got {topk}.")
    if of.d != (expected := _width(of.layout, of.chosen)):
        raise SpecError(f"ProjectionSpec: with this codebook d is {expected}, got {shown(of.d)}.")
    if of.d > MOST:
        raise SpecError(f"ProjectionSpec: with this codebook d is {of.d}, more than 2^31; take fewer vectors.")


def _project(of: Instance, theta: Array, _: Frozen, start: int, stop: int) -> Array:
    vectors, length, topk = (int(of.chosen[name]) for name in ("vectors", "length", "topk"))
    xp, size = array_namespace(theta), vectors * length
    first, last = start // length, -(-stop // length)
    codebook = xp.reshape(theta[:size], (vectors, length))
    logits = xp.reshape(theta[size + first * vectors : size + last * vectors], (last - first, vectors))
    chosen = xp.argsort(logits, axis=1, descending=True, stable=True)[:, :topk]
    best = xp.take_along_axis(logits, chosen, axis=1)
    weights = xp.exp(best - best[:, :1])
    weights = weights / xp.sum(weights, axis=1, keepdims=True)
    return xp.reshape(_mixed(codebook, chosen, weights), (-1,))[start - first * length : stop - first * length]


def _mixed(codebook: Array, chosen: Array, weights: Array) -> Array:
    """Compute the mixtures (n, length) of codebook vectors, ``chosen`` and weighed (n, k); some of k at a time."""
    xp = array_namespace(codebook)
    n, topk = chosen.shape
    length = codebook.shape[1]
    some = max(1, ENTRIES // max(1, n * length))

    def part(first: int) -> Array:
        last = min(first + some, topk)
        found = xp.take(codebook, xp.reshape(chosen[:, first:last], (-1,)), axis=0)
        return xp.sum(xp.reshape(found, (n, last - first, length)) * weights[:, first:last, None], axis=1)

    return functools.reduce(operator.add, map(part, range(0, topk, some)))


def _start(of: Instance) -> np.ndarray:
    """Draw θ_d⁰: the codebook from U(-0.02, 0.02), the logits from N(0, 0.01)."""
    size = int(of.chosen["vectors"] * of.chosen["length"])
    text = f"unilora/codebook/1 seed={of.seed} d={of.d}"
    codebook = draws.uniform(f"{text} codebook", (size,), 0.02)
    return np.concatenate([codebook, draws.normal(f"{text} logits", (of.d - size,)) * np.float32(0.1)])


CODEBOOK = Map(
    version=1,
    width=_width,
    check=_check,
    frozen=lambda *_: (),
    project=_project,
    transpose=None,
    rate=lambda _of: RATE,
    source="VB-LoRA (arXiv 2405.15179)",
    fixed=True,
    start=_start,
    options={"vectors": 256, "length": 256, "topk": 2},
)
