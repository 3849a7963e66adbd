"""A backend in NumPy, written from docs/format.md with 64-bit integers, np.take and np.add.at: nothing of the core.

Each step is a method, so that a broken backend is one method that differs. Maps whose rows have many entries, and the
codebook, are the suite's own definitions.
"""

import functools
import hashlib
import itertools
import math

import numpy as np

from unilora_core import SpecError, ValuesError
from unilora_core.testing import Backend, definitions

WORD = np.uint64(2**32 - 1)
DENSE = ("fastfood", "gaussian", "codebook")


class Toy:
    """The whole backend; `backend` is what the suite is told of it."""

    dtypes = ("float16", "float32", "float64")

    def backend(self):
        return Backend(
            name=type(self).__name__,
            xp=np,
            groups=self.groups,
            init=self.init,
            project=functools.partial(Projection, self),
            project_transpose=lambda spec: functools.partial(self.transpose, spec),
            pullback=lambda function, x, y: function.gradient(x, y),
            compile=self.compile,
            dtypes=self.dtypes,
        )

    # ---- integers ----

    def positions(self, start, stop):
        return np.arange(start, stop, dtype=np.uint64)

    def seed(self, spec):
        return spec.seed

    def groups(self, spec, start, stop):
        if not 0 <= start <= stop <= spec.D:
            raise SpecError(f"groups: expected 0 ≤ start ≤ stop ≤ D = {spec.D}, got start = {start}, stop = {stop}.")
        if spec.grouping == "numpy-shuffle":
            return shuffled(spec.D, spec.d, spec.seed)[start:stop]
        if spec.grouping == "identity":
            return np.arange(start, stop, dtype=np.int32)
        if spec.grouping in ("local", "by-factor"):
            return self.in_classes(spec, self.positions(start, stop)).astype(np.int32)
        if spec.grouping == "iid":
            return iid(self.positions(start, stop), spec.D, spec.d, self.seed(spec)).astype(np.int32)
        first_d = spec.chosen.get("first_d")
        return balanced(self.positions(start, stop), spec.D, spec.d, self.seed(spec), first_d).astype(np.int32)

    def in_classes(self, spec, i):
        found = np.zeros_like(i)
        for k, (slices, first, end) in enumerate(self.classes(spec)):
            digest = hashlib.sha256(f"unilora/class/1 seed={self.seed(spec)} class={k}".encode()).digest()
            done, size = 0, sum(at.stop - at.start for at in slices)
            for at in slices:
                here = (i >= at.start) & (i < at.stop)
                p = i[here] - np.uint64(at.start) + np.uint64(done)
                columns = balanced(p, size, end - first, int.from_bytes(digest[:8], "little"))
                found[here] = columns + np.uint64(first)
                done += at.stop - at.start
        return found

    def classes(self, spec):
        """(slices, first column, end) of each target, or of each kind of factor: these get 1, 2, … parts of d."""
        by_target, classes = spec.grouping == "local", {}
        for name, at in spec.layout.slices.items():
            classes.setdefault(name.rpartition(".")[0 if by_target else 2], []).append(at)
        sizes = [sum(at.stop - at.start for at in slices) for slices in classes.values()]
        ends = np.cumsum(sizes if by_target else range(1, len(sizes) + 1)).tolist()
        ends = [0] + [round(spec.d * end / ends[-1]) for end in ends]
        return list(zip(classes.values(), ends, ends[1:], strict=False))

    def of_whole(self, spec):
        return self.groups(spec, 0, spec.D)

    def counts(self, spec):
        return np.bincount(self.of_whole(spec), minlength=spec.d)

    # ---- floats ----

    def init(self, spec):
        if spec.grouping == "codebook":
            text = f"unilora/codebook/1 seed={self.seed(spec)} d={spec.d}"
            size = spec.chosen["vectors"] * spec.chosen["length"]
            vectors = definitions.uniform(f"{text} codebook", size, 0.02)
            logits = np.array(definitions.normals(f"{text} logits", spec.d - size)).astype(np.float32)
            return np.concatenate([vectors, logits * np.float32(0.1)])
        first_d = spec.chosen.get("first_d", spec.d)
        k0, k1 = words("init", spec.D, first_d, self.seed(spec))[:2]
        x0, _ = threefry(k0, k1, np.zeros(first_d, np.uint64), np.arange(first_d, dtype=np.uint64))
        first = ((((x0 >> np.uint64(8)).astype(np.float64) + 0.5) / 2**23 - 1) * spec.bound).astype(np.float32)
        return first if first_d == spec.d else self.resized(spec, first, first_d)

    def resized(self, spec, first, first_d):
        """Pᵀ of the first P's own θ_D."""
        before = balanced(self.positions(0, spec.D), spec.D, first_d, self.seed(spec)).astype(np.int64)
        theta_D = first.astype(np.float64)[before] / np.sqrt(np.bincount(before, minlength=first_d))[before]
        groups = self.of_whole(spec)
        return (np.bincount(groups, theta_D) / np.sqrt(np.bincount(groups))).astype(np.float32)

    def wide(self, x):
        return np.promote_types(x.dtype, np.float32)

    def scale(self, spec, dtype):
        if spec.grouping == "unnormalised":
            return np.ones(spec.d, dtype)
        return (1 / np.sqrt(np.maximum(self.counts(spec), 1))).astype(dtype)

    def project(self, spec, theta_d):
        self.check(theta_d, (spec.d,), "project: theta_d")
        if spec.grouping in DENSE:
            return self.dense(spec, theta_d)
        theta, scale = theta_d.astype(self.wide(theta_d)), self.scale(spec, self.wide(theta_d))
        groups = self.of_whole(spec)
        parts = {name: self.factor(spec, name, theta, scale, groups[at]) for name, at in spec.layout.slices.items()}
        return self.join(spec, parts).astype(theta_d.dtype)

    def factor(self, spec, name, theta, scale, groups):
        from_zero = spec.start == "identity" and name.endswith(".B")
        return self.gather((theta - self.init(spec) if from_zero else theta) * scale, groups)

    def gather(self, table, groups):
        return np.take(table, groups)

    def join(self, spec, parts):
        return np.concatenate(list(parts.values()))

    def dense(self, spec, theta_d):
        return definitions.theta_D(spec, theta_d).astype(theta_d.dtype)

    def transpose(self, spec, y):
        self.check(y, (spec.D,), "project_transpose: y")
        if spec.grouping == "codebook":
            raise SpecError("project_transpose: the grouping 'codebook' is not linear; differentiate project.")
        if spec.grouping in DENSE:
            return self.dense_transpose(spec, y)
        summed = self.scatter_add(spec, y.astype(self.wide(y)))
        return (summed * self.scale(spec, self.wide(y))).astype(y.dtype)

    def scatter_add(self, spec, y):
        summed = np.zeros(spec.d, np.float64)
        np.add.at(summed, self.of_whole(spec), y)
        return summed.astype(y.dtype)

    def dense_transpose(self, spec, y):
        return (definitions.matrix(spec).T @ y).astype(y.dtype)

    def gradient(self, spec, x, y):
        if spec.grouping == "codebook":
            return definitions.codebook_pullback(spec, x, y).astype(x.dtype)
        return self.transpose(spec, y)

    def compile(self, function):
        return function

    def check(self, x, shape, what):
        if x.shape != shape or not np.issubdtype(x.dtype, np.floating):
            raise ValuesError(f"{what}: expected shape {shape} and a floating-point dtype, got {x.shape} {x.dtype}.")


class Projection:
    """A function that knows its gradient, since NumPy does not."""

    def __init__(self, toy, spec):
        self.toy, self.spec = toy, spec

    def __call__(self, theta_d):
        return self.toy.project(self.spec, theta_d)

    def gradient(self, x, y):
        return self.toy.gradient(self.spec, x, y)


# ---- the groupings, in unsigned 64-bit integers ----


def words(name, D, d, seed, segment=0):
    text = f"unilora/{name}/1 seed={seed} D={D} d={d} segment={segment}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), "<u4").astype(np.uint64)


def balanced(i, D, d, seed, first_d=None):
    keyed = first_d or d
    length = min(D, 2**31 // keyed * keyed)
    segments = i // np.uint64(length)
    parts = [
        permuted(i[segments == s] - s * np.uint64(length), D, keyed, seed, int(s), min(length, D - int(s) * length))
        for s in np.unique(segments)
    ]
    return np.concatenate([np.zeros(0, np.uint64), *parts]) % np.uint64(d)


def permuted(p, D, d, seed, segment, size):
    a, b = (np.uint64(side) for side in sides(size))
    keys = words("balanced", D, d, seed, segment)
    y = network(p, a, b, keys)
    while (over := y >= size).any():
        y[over] = network(y[over], a, b, keys)
    return y


@functools.cache
def sides(size):
    root = math.isqrt(size - 1) + 1
    return min(((a, -(-size // a)) for a in range(root, min(2 * root, root + 65536))), key=math.prod)


def network(p, a, b, keys):
    left, right = p // b, p % b
    for key, (m, _) in zip(keys, itertools.cycle(((a, b), (b, a))), strict=False):
        x = right ^ key
        x = (x ^ x >> np.uint64(16)) * np.uint64(0x7FEB352D) & WORD
        x = (x ^ x >> np.uint64(15)) * np.uint64(0x846CA68B) & WORD
        x = x ^ x >> np.uint64(16)
        left, right = right, (left + x % np.uint64(2**30)) % m
    return left * b + right


def iid(i, D, d, seed):
    k0, k1 = words("iid", D, d, seed)[:2]
    high, low = threefry(k0, k1, i >> np.uint64(31), i & np.uint64(2**31 - 1))
    return (high * np.uint64(d) + (low * np.uint64(d) >> np.uint64(32))) >> np.uint64(32)


def threefry(k0, k1, x0, x1):
    keys = [k0, k1, k0 ^ k1 ^ np.uint64(0x1BD11BDA)]
    x0, x1 = x0 + k0 & WORD, x1 + k1 & WORD
    for i in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1 & WORD
            x1 = (x1 << np.uint64(r) | x1 >> np.uint64(32 - r)) & WORD ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3] & WORD, x1 + keys[(i + 2) % 3] + np.uint64(i + 1) & WORD
    return x0, x1


@functools.lru_cache(maxsize=2)
def shuffled(D, d, seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(d, dtype=np.int32), D // d)
    if D % d:
        groups = np.concatenate([groups, rng.choice(d, size=D % d, replace=False).astype(np.int32)])
    rng.shuffle(groups)
    return groups
