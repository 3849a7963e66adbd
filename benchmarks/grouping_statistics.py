"""Are the groupings as random as a shuffle? Every test runs on NumPy's own generators too, as the control.

    python benchmarks/grouping_statistics.py                      # everything but the batteries, 6 minutes of a core
    python benchmarks/grouping_statistics.py --sections tiny rounds
    python benchmarks/grouping_statistics.py --sections dieharder smallcrush    # both tools must be installed
    python benchmarks/grouping_statistics.py --stream balanced | dieharder -g 200 -d 0

Results: ``benchmarks/results/grouping_statistics.{csv,json,png}``; a section that is run again replaces its old rows.
What is measured, and why the expectations are what they are: ``docs/grouping.md``.

One row is one test on one source and one (D, d): n p-values (over seeds, slices, strides), the Kolmogorov-Smirnov
p-value of their uniformity, and the smallest p-value (two-sided) times n, after Bonferroni.
"""

import csv
import functools
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy
from common import RESULTS, SMOKE, machine, parser
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from unilora_core import grouping
from unilora_core.grouping import Problem

SOURCES = ("balanced", "numpy-shuffle", "iid", "numpy-integers")
WITHOUT_REPLACEMENT = ("balanced", "numpy-shuffle")
DITHER = np.random.default_rng(20250601)
"""Only makes the p-values of integer statistics continuous."""


# ---- sources ------------------------------------------------------------------------------------------------------


class Rounds(grouping.Permutation):
    """The same network with any number of rounds (the core's own formula for the result expects an even number)."""

    def network(self, p):
        """The core's formula, but for the last line."""
        left, right = p // self.b, p % self.b
        m, n = self.a, self.b
        for key in self.keys:
            left, right = right, (left + (grouping._lowbias32(right ^ key) & 0x3FFFFFFF)) % m
            m, n = n, m
        return left * n + right


def permutation(size, keys):
    """π with the given keys, cycle walking included."""
    a, b = grouping._factor(size)
    bare = Rounds(size, a, b, keys)
    outside = bare.network(np.arange(size, a * b, dtype=np.int32))
    for _ in range(outside.size):
        over = outside >= size
        outside[over] = bare.network(outside[over])
    return Rounds(size, a, b, keys, tuple(outside.tolist()))


def groups(source, D, d, seed):
    """All D groups; "balanced:5" is `balanced` with five rounds."""
    if source == "numpy-integers":
        return np.random.default_rng(seed).integers(0, d, D, dtype=np.int32)
    problem = Problem(D, d, seed)
    if ":" in source:
        keys = grouping._words("balanced", problem, 0)[: int(source.split(":")[1])]
        return permutation(D, keys)(np.arange(D, dtype=np.int32), np) % d
    return grouping.groups(source, problem, 0, D, np)


def fixed_counts(source, g, d):
    """n_j of sources that draw without replacement, else None."""
    return np.bincount(g, minlength=d) if source.split(":")[0] in WITHOUT_REPLACEMENT else None


# ---- p-values -----------------------------------------------------------------------------------------------------


def pearson3(x, mean, variance, skew):
    """P(X ≥ x) of an integer X with the first three moments given (Pearson III), made continuous by a dither."""
    z = (x + DITHER.uniform(-0.5, 0.5) - mean) / math.sqrt(variance)
    if skew < 1e-3:
        return float(stats.norm.sf(z))
    shape = 4 / skew**2
    return float(stats.gamma.sf(z * math.sqrt(shape) + shape, shape))


def normal(x, mean, variance):
    return float(stats.norm.sf((x - mean) / math.sqrt(variance)))


def chi2_slices(x, shares, total):
    """One p-value per row of counts x: (R, K). Slices of `total` positions whose K labels have fixed counts
    `shares` (drawn without replacement: the variance is (total-m)/(total-1) of the multinomial's), or, with
    total = None, independent positions with probabilities `shares`."""
    m = x.sum(axis=1, keepdims=True)
    expected = m * (shares / shares.sum())
    q = ((x - expected) ** 2 / expected).sum(axis=1)
    if total is not None:
        rest = total - m[:, 0]
        q, rest = q[rest > 0], rest[rest > 0]
        q = q * (total - 1) / rest
    q = q + DITHER.uniform(-1, 1, len(q)) * x.shape[1] / m.min()  # half a step of the statistic, which is discrete
    return stats.chi2.sf(q, x.shape[1] - 1)


def chi2_table(table):
    """Independence of the rows and columns of a table of counts."""
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    expected, table = expected[:, expected.sum(0) > 0], table[:, expected.sum(0) > 0]
    q = ((table - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(q, (table.shape[0] - 1) * (table.shape[1] - 1)))


def collision_p(found, pairs, overlaps, triangles, D, d, counts):
    """p of `found` equal pairs among `pairs` pairs of positions, with the exact mean and variance.

    Args:
        overlaps: ordered pairs of different pairs that share a position. triangles: triples with all three pairs.
        counts: n_j of a random balanced assignment; None: independent uniform labels.
    """
    if counts is None:
        mean, variance = pairs / d, pairs / d * (1 - 1 / d)
    else:
        q, q3, q22 = _coincidences(D, d)
        mean = float(pairs * q)
        variance = float(pairs * q + overlaps * q3 + (pairs * (pairs - 1) - overlaps) * q22 - (pairs * q) ** 2)
    if mean < 100:  # rare and nearly independent: Poisson
        tail, equal = stats.poisson.sf(found, mean), stats.poisson.pmf(found, mean)
        return float(tail + DITHER.uniform() * equal), mean
    return pearson3(found, mean, variance, (mean + 6 * triangles / d**2) / variance**1.5), mean


@functools.lru_cache(maxsize=256)
def _coincidences(D, d):
    """Of a random assignment with n_j ∈ {⌊D/d⌋, ⌈D/d⌉}: P(g₁=g₂), P(g₁=g₂=g₃), P(g₁=g₂ and g₃=g₄), exactly."""
    least, more = divmod(D, d)
    sizes = ((least, d - more), (least + 1, more))

    def falling(n, k):
        return math.prod(n - i for i in range(k))

    s2, s3, s4 = (sum(times * falling(n, k) for n, times in sizes) for k in (2, 3, 4))
    squares = sum(times * falling(n, 2) ** 2 for n, times in sizes)
    return (
        Fraction(s2, falling(D, 2)),
        Fraction(s3, falling(D, 3) or 1),
        Fraction(s4 + s2**2 - squares, falling(D, 4) or 1),
    )


# ---- results ------------------------------------------------------------------------------------------------------


class Table:
    """Collects p-values under (section, test, source, D, d) and sums them up."""

    def __init__(self):
        self.p, self.effect = {}, {}

    def add(self, key, p, effect=None):
        """Keep p, one or many; effect: (observed, expected) counts."""
        values = [float(v) for v in np.atleast_1d(p) if p is not None]
        self.p.setdefault(key, []).extend(values)
        if effect is not None:
            self.effect.setdefault(key, []).append(effect)

    def rows(self):
        """One dict for each key."""
        for key, p in self.p.items():
            if not p:
                continue
            crude = key[0] == "dieharder"  # its own p-values of ten samples are too large for every generator
            smallest = min(p) if crude else 2 * min(min(p), 1 - max(p))
            ks = stats.kstest(p, "uniform").pvalue if len(p) >= 5 and not crude else None
            seen = self.effect.get(key)
            ratio = sum(s[0] for s in seen) / sum(s[1] for s in seen) if seen else None
            yield dict(
                zip(("section", "test", "source", "D", "d"), key, strict=True),
                n=len(p),
                ks_p=ks,
                min_p=min(p),
                max_p=max(p),
                bonferroni=min(1.0, smallest * len(p)),
                observed_over_expected=ratio,
            )


# ---- shapes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Factor shapes and d, with how many seeds to try."""

    name: str
    shapes: tuple
    d: int
    seeds: int

    @property
    def D(self):
        """The number of positions."""
        return sum(r * c for r, c in self.shapes)


def lora(linears, r):
    """A (r × in) and B (out × r) of each linear layer."""
    return tuple(s for out, inp in linears for s in ((r, inp), (out, r)))


def plain(D, width):
    """D positions in 12 factors of equal length, rows of `width`; what is left over is a last row."""
    rows = D // width // 12
    rest = D - 12 * rows * width
    return ((rows, width),) * 12 + (((1, rest),) if rest else ())


def cases():
    """Layouts of models, and sizes that are odd in some way."""
    if SMOKE:
        return [Case("q,v", lora([(64, 64)] * 2, 4), 64, 2), Case("d = D / 2", plain(4000, 256), 2000, 2)]
    minilm = lora([(384, 384)] * 12, 4)
    vit = lora([(768, 768)] * 24, 4)
    llama = lora(([(512, 512)] * 4 + [(1408, 512)] * 2 + [(512, 1408)]) * 8, 16)
    return [
        Case("MiniLM q,v r=4", minilm, 2304, 24),
        Case("MiniLM q,v r=4", minilm, 256, 24),
        Case("ViT-B q,v r=4", vit, 9216, 24),
        Case("ViT-B q,v r=4", vit, 72_000, 24),
        Case("Llama 8x512 r=16", llama, 78_848, 6),
        Case("12.5 M", plain(12_500_000, 2048), 524_288, 2),
        Case("12.5 M, few groups", plain(12_500_000, 2048), 64, 1),
        Case("primes", plain(36_871, 256), 2311, 24),
        Case("primes", plain(1_000_003, 256), 1009, 6),
        Case("powers of two", plain(2**16, 256), 256, 24),
        Case("powers of two", plain(2**17, 256), 8, 24),
        Case("powers of two", plain(2**20, 256), 2**14, 6),
        Case("square, d = b", plain(10**6, 256), 1000, 6),
        Case("square, d = 2", plain(250_000, 256), 2, 24),
        Case("square, d = 3", plain(250_000, 256), 3, 24),
        Case("square, d = b + 1", plain(90_000, 256), 301, 24),
        Case("d = D / 2", plain(40_000, 256), 20_000, 24),
    ]


def strides(case):
    """The distances at which positions of matrices, and of the network's own domain, are neighbours."""
    a, b = grouping._factor(case.D)
    sides = {side for shape in case.shapes[:4] for side in shape} | {r * c for r, c in case.shapes[:4]}
    centres = sides | {a, b, 2 * a, 2 * b, 3 * b, math.isqrt(case.D), case.d, a * b // 2}
    wanted = {c + e for c in centres for e in (-1, 0, 1)} | {1, 2, 3} | {2**k for k in range(40)}
    return sorted(s for s in wanted if 0 < s <= case.D - 16)


def classes(case):
    """name → the class of each position: how rows, columns and factors, and the network, cut up the positions."""
    i = np.arange(case.D)
    a, b = grouping._factor(case.D)
    lengths = np.concatenate([[c] * r for r, c in case.shapes])
    width = case.shapes[0][1]
    found = {
        "row": np.repeat(np.arange(len(lengths)), lengths),
        "column": i % width,
        "i mod b": i % b,
        "i div b": i // b,
    }
    if a != b:
        found["i mod a"] = i % a
    return {"row": found["row"], "i mod b": found["i mod b"]} if case.D > 5e6 else found


# ---- tests on g ---------------------------------------------------------------------------------------------------


def bucket(g, d, K, how):
    return (g % K if how == "low" else (g.astype(np.int64) * K // d)).astype(np.int64)


def bucket_counts(d, K, how, counts):
    """How many positions (or, of independent groups, what share) each bucket has."""
    weights = np.ones(d) if counts is None else counts
    return np.bincount(bucket(np.arange(d), d, K, how), weights, minlength=K)


def test_frequencies(table, key, case, g, counts):
    """χ² of group frequencies in each factor and in each row of at least 256."""
    sizes = np.array([r * c for r, c in case.shapes])
    lengths = np.concatenate([[c] * r for r, c in case.shapes])
    for what, pieces in (("factor", sizes), ("row", lengths)):
        part = np.repeat(np.arange(len(pieces)), pieces)
        usable = pieces >= 256
        if not usable.any() or case.d < 8:  # two or three groups: too discrete for χ²
            continue
        m = pieces[usable].min()
        every = m >= 8 * case.d
        for how in ("low",) if every else ("low", "high"):
            K = case.d if every else min(64, 2 ** int(math.log2(m / 16)))
            x = np.bincount(part * K + bucket(g, case.d, K, how), minlength=len(pieces) * K).reshape(-1, K)[usable]
            p = chi2_slices(x, bucket_counts(case.d, K, how, counts), None if counts is None else case.D)
            name = "all groups" if every else f"{how} bits"
            table.add(("frequencies", f"chi2 per {what}, {name}", *key), p)


def test_strides(table, key, case, g, counts):
    """Pairs with g(i) = g(i+s)."""
    for s in strides(case):
        pairs = case.D - s
        found = int((g[:-s] == g[s:]).sum())
        p, mean = collision_p(found, pairs, 2 * max(0, case.D - 2 * s), 0, case.D, case.d, counts)
        table.add(("collisions", "g(i) = g(i+s)", *key), p, (found, mean))


def equal_pairs(part, g, d):
    """Pairs of positions of one class and one group."""
    joint = np.sort(part.astype(np.int64) * d + g)
    edges = np.flatnonzero(np.diff(joint, prepend=joint[0] - 1))
    n = np.diff(np.append(edges, len(joint)))
    return int((n * (n - 1) // 2).sum())


def test_classes(table, key, case, g, counts):
    """Pairs of one group within a row, a column, a residue class of the network's own domain."""
    for name, part in classes(case).items():
        m = np.bincount(part).astype(object)
        pairs = int((m * (m - 1)).sum()) // 2
        triples = int((m * (m - 1) * (m - 2)).sum())
        p, _ = collision_p(equal_pairs(part, g, case.d), pairs, triples, triples // 6, case.D, case.d, counts)
        table.add(("collisions", f"pairs within {name}", *key), p)


def labels(g, d):
    """The low and the high bits of g in at most 16 buckets."""
    K = min(16, d)
    return {how: bucket(g, d, K, how) for how in (("low", "high") if d > K else ("low",))}, K


def test_serial(table, key, case, g):
    """χ² of the pairs (g(i), g(i+s)) in 16 × 16 buckets, cyclic: (16-1)² degrees; and their correlation."""
    found, K = labels(g, case.d)
    centred = g - g.mean()
    energy = float(centred @ centred)
    chosen = strides(case)
    for s in chosen[:: max(1, len(chosen) // 16)]:
        for how, x in found.items() if K >= 8 else ():
            joint = np.bincount(x * K + np.roll(x, -s), minlength=K * K).reshape(K, K)
            table.add(("serial", f"chi2 of pairs, {how} bits", *key), chi2_table(joint))
        r = float(centred @ np.roll(centred, -s)) / energy
        table.add(("serial", "correlation", *key), normal(r, -1 / (case.D - 1), 1 / (case.D - 1)))


def test_residues(table, key, case, g):
    """χ² of 16 classes of positions (by low bits, and by both halves of the network's domain) against buckets of g."""
    a, b = grouping._factor(case.D)
    found, K = labels(g, case.d)
    i = np.arange(case.D)
    for part in (i % 16, i % b * 16 // b, i // b * 16 // a):
        for how, x in found.items():
            joint = np.bincount(part * K + x, minlength=16 * K).reshape(16, K)
            table.add(("serial", f"chi2 of position classes, {how} bits", *key), chi2_table(joint))


def test_occurrence(table, key, case, g, counts):
    """Where every 32nd group occurs first (all would be dependent: no two occur at one position): a KS p-value."""
    D, d = case.D, case.d
    first = np.full(d, D)
    first[g[::-1]] = np.arange(D)[::-1]
    if counts is None:
        base = math.log1p(-1 / d)
        at_least, beyond = np.exp(first * base), np.where(first < D, np.exp((first + 1) * base), 0)
    else:
        at_least, beyond = np.ones(d), np.ones(d)
        for k in range(int(counts.max())):
            active = k < counts
            at_least = np.where(active, at_least * np.maximum(D - first - k, 0) / (D - k), at_least)
            beyond = np.where(active, beyond * np.maximum(D - first - 1 - k, 0) / (D - k), beyond)
    u = (beyond + DITHER.uniform(size=d) * (at_least - beyond))[::32]
    table.add(("serial", "first occurrence of groups", *key), stats.kstest(u, "uniform").pvalue)


def run_groups(table, wanted):
    for case in tqdm(cases(), desc="groups", disable=None):
        for source in SOURCES:
            key = (source, case.D, case.d)
            for seed in range(case.seeds):
                g = groups(source, case.D, case.d, seed)
                counts = fixed_counts(source, g, case.d)
                if "frequencies" in wanted:
                    test_frequencies(table, key, case, g, counts)
                if "collisions" in wanted:
                    test_strides(table, key, case, g, counts)
                    test_classes(table, key, case, g, counts)
                if "serial" in wanted:
                    test_serial(table, key, case, g)
                    test_residues(table, key, case, g)
                    if case.D // case.d < 1000 and case.d >= 1000:
                        test_occurrence(table, key, case, g, counts)


# ---- tests on π ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def cycle_survival(D):
    """P(a random permutation has ≥ k cycles), k = 0 … 80: cycles are a sum of independent Bernoulli(1/j)."""
    pmf = np.zeros(81)
    pmf[0] = 1
    for j in range(1, D + 1):
        pmf[1:], pmf[0] = pmf[1:] * (1 - 1 / j) + pmf[:-1] / j, pmf[0] * (1 - 1 / j)
    return np.append(pmf[::-1].cumsum()[::-1], 0)


def dithered(survival, k):
    """A continuous p-value of an integer statistic from P(X ≥ k), k = 0, 1, ..."""
    return float(survival[k + 1] + DITHER.uniform() * (survival[k] - survival[k + 1]))


def run_permutation(table):
    poisson = stats.poisson(1).sf(np.arange(-1, 60))
    sizes, seeds = ((500,), 2) if SMOKE else ((500, 1009, 4096, 10_000, 36_864, 65_536), 100)
    for D in tqdm(sizes, desc="permutation", disable=None):
        i = np.arange(D)
        for source, seed in itertools.product(WITHOUT_REPLACEMENT, range(seeds)):
            pi = groups(source, D, D, seed)

            def add(test, p, key=(source, D, D)):
                table.add(("permutation", test, *key), p)

            add("fixed points", dithered(poisson, int((pi == i).sum())))
            add("points i -> D-1-i", dithered(poisson, int((pi == D - 1 - i).sum())))
            cycles, _ = connected_components(coo_array((np.ones(D, bool), (i, pi)), shape=(D, D)), directed=False)
            add("cycles", dithered(cycle_survival(D), cycles))
            shift = float(np.abs(pi - i).sum())
            add("displacement", normal(shift, (D * D - 1) / 3, (D + 1) * (2 * D * D + 7) / 45))
            rising = int((pi[1:] > pi[:-1]).sum())
            add("ascents", pearson3(rising, (D - 1) / 2, (D + 1) / 12, 0))
            inversions = (1 - stats.kendalltau(i, pi).statistic) * D * (D - 1) / 4
            add("inversions", normal(inversions, D * (D - 1) / 4, D * (D - 1) * (2 * D + 5) / 72))
            add("rank correlation", normal(np.corrcoef(i, pi)[0, 1], 0, 1 / (D - 1)))
            add("order of the members", member_order(pi, D // 16))


def member_order(pi, d):
    """χ² over the 24 orders in which the first four members of each group (j, j+d, j+2d, j+3d) occur."""
    where = np.empty_like(pi)
    where[pi] = np.arange(len(pi))
    order = np.argsort(where[: 4 * d].reshape(4, d), axis=0)
    code = order[0] * 64 + order[1] * 16 + order[2] * 4 + order[3]
    _, found = np.unique(code, return_counts=True)
    found = np.pad(found, (0, 24 - len(found)))
    return float(stats.chisquare(found).pvalue)


# ---- tiny domains: all permutations, all assignments --------------------------------------------------------------


def many(source, D, d, seeds):
    """(seeds, D) groups of as many seeds, all at once."""
    if source == "numpy-shuffle":
        return np.random.default_rng(7).permuted(np.tile(np.arange(D) % d, (seeds, 1)), axis=1)
    words = np.array([grouping._words("balanced", Problem(D, d, s), 0) for s in range(seeds)], np.int32).T.copy()
    seed, position = np.divmod(np.arange(seeds * D, dtype=np.int32), np.int32(D))

    def step(where, points):
        return Rounds(D, *grouping._factor(D), tuple(words[:, seed[where]])).network(points)

    y = step(np.arange(len(seed)), position)
    while len(over := np.flatnonzero(y >= D)):
        y[over] = step(over, y[over])
    y = y.reshape(seeds, D)
    check = min(seeds, 50)
    assert all((y[s] % d == grouping.groups("balanced", Problem(D, d, s), 0, D, np)).all() for s in range(check))
    return y % d


def run_tiny(table, extra):
    sizes = [(D, D) for D in range(3, 9)] + [(6, 2), (6, 3), (7, 2), (7, 3), (8, 2), (8, 4), (9, 3), (10, 2), (12, 3)]
    sizes, least = ([(6, 2)], 200) if SMOKE else (sizes, 20_000)
    for (D, d), source in tqdm(list(itertools.product(sizes, WITHOUT_REPLACEMENT)), desc="tiny", disable=None):
        possible = math.factorial(D) // math.prod(
            math.factorial(n) for n in grouping.counts("balanced", Problem(D, d, 0)).tolist()
        )
        seeds = max(least, 8 * possible)
        code = (many(source, D, d, seeds).astype(np.int64) * d ** np.arange(D)).sum(axis=1)
        _, found = np.unique(code, return_counts=True)
        never = possible - len(found)
        found = np.pad(found, (0, never))
        p = stats.chisquare(found).pvalue
        table.add(("tiny", "all arrangements equally frequent", source, D, d), p)
        excess = ((found - seeds / possible) ** 2).sum() - seeds * (1 - 1 / possible)
        extra.append(
            {
                "source": source,
                "D": D,
                "d": d,
                "factors": list(grouping._factor(D)),
                "arrangements": possible,
                "seeds": seeds,
                "never_seen": int(never),
                "chi2_p": float(p),
                "relative_deviation_rms": float(math.sqrt(max(0, excess) * possible) / seeds),
            }
        )


# ---- avalanche ----------------------------------------------------------------------------------------------------


def compare(table, test, source, D, d, g, h, d2=None):
    """Two assignments as if independent: positions with equal groups, and correlation."""
    n, n2 = np.bincount(g, minlength=d), np.bincount(h, minlength=d2 or d)
    both, D0 = min(d, d2 or d), len(g)
    mean = float((n[:both].astype(float) * n2[:both]).sum()) / D0
    found = int((g == h).sum())
    variance = mean * (1 - mean / D0)
    table.add(("avalanche", f"{test}: equal groups", source, D, d), pearson3(found, mean, variance, mean**-0.5))
    r = float(np.corrcoef(g, h)[0, 1])
    table.add(("avalanche", f"{test}: correlation", source, D, d), normal(r, 0, 1 / (D0 - 1)))


def run_avalanche(table):
    sizes = ((36_864, 2304), (36_864, 256), (65_536, 256), (100_003, 101), (10_000, 2))
    sizes, seeds, bits = (((1000, 100),), 4, 2) if SMOKE else (sizes, 100, 64)
    for (D, d), source in tqdm(list(itertools.product(sizes, SOURCES)), desc="avalanche", disable=None):
        base = groups(source, D, d, 0)
        last = base
        for seed in range(1, seeds + 1):
            g = groups(source, D, d, seed)
            compare(table, "seed, seed + 1", source, D, d, last, g)
            last = g
        for bit in range(bits):
            compare(table, "one bit of the seed", source, D, d, base, groups(source, D, d, 1 << bit))
        for seed in range(seeds // 2):
            g = groups(source, D, d, seed)
            if source in grouping.ALGORITHMS and source != "numpy-shuffle":
                compare(table, "D, D + 1", source, D, d, g, groups(source, D + 1, d, seed)[:D])
                compare(table, "d, d + 1", source, D, d, g, groups(source, D, d + 1, seed), d + 1)
    for source in ("balanced", "iid"):
        run_segments(table, source)


def run_segments(table, source, D=2**40, d=4096, n=2**12 if SMOKE else 2**17):
    """The same offsets of ten segments of one projection, and across the seam of two."""
    problem = Problem(D, d, 5)
    length = grouping.ALGORITHMS[source].segment(problem)
    pieces = [grouping.groups(source, problem, k * length, k * length + n, np) for k in range(10)]
    for g, h in itertools.combinations(pieces, 2):
        compare(table, "two segments", source, D, d, g, h)


# ---- how many rounds ----------------------------------------------------------------------------------------------


def differential(n, rounds, seeds, source="balanced"):
    """Patarin's attacks on all n² points of many permutations of Z_n × Z_n: pairs with equal right halves, whose
    results are related to the difference of their left halves. Four z-scores, by the spread over seeds."""
    D, half = n * n, (n - 1) // 2
    found = np.zeros((seeds, 4))
    for seed in range(seeds):
        if source == "balanced":
            pi = Rounds(D, n, n, grouping._words("balanced", Problem(D, D, seed), 0)[:rounds]).network(
                np.arange(D, dtype=np.int32)
            )
        else:
            pi = np.random.default_rng(seed).permutation(D).astype(np.int32)
        left, right = (pi // n).reshape(n, n), (pi % n).reshape(n, n)
        for t in range(1, half + 1):
            dl, dr = np.roll(left, -t, 0) - left, np.roll(right, -t, 0) - right
            same_l, same_r = (dl == t) | (dl == t - n), (dr == t) | (dr == t - n)
            found[seed] += same_l.sum(), same_r.sum(), (same_r & (dl == 0)).sum(), (same_l & (dr == 0)).sum()
    pairs = half * D
    expected = np.array([pairs * n, pairs * n, pairs, pairs]) / (D - 1)
    error = np.maximum(found.std(0, ddof=1), 1e-9) / math.sqrt(seeds)
    return np.clip((found.mean(0) - expected) / error, -1e3, 1e3), found.mean(0) / expected


def run_rounds(table, extra):
    small = [
        Case("MiniLM q,v r=4", lora([(384, 384)] * 12, 4), 2304, 12),
        Case("prime", plain(36_871, 256), 251, 12),
        Case("power of two", plain(2**16, 256), 256, 12),
        Case("square", plain(250_000, 256), 500, 6),
    ]
    squares = ((11, 4000), (32, 400), (128, 40))
    small, squares = (cases(), ((11, 4),)) if SMOKE else (small, squares)
    for rounds in tqdm(range(1, grouping.ROUNDS + 1), desc="rounds", disable=None):
        source = f"balanced:{rounds}"
        for case in small:
            key = (source, case.D, case.d)
            for seed in range(case.seeds):
                g = groups(source, case.D, case.d, seed)
                if rounds == grouping.ROUNDS:
                    assert (g == groups("balanced", case.D, case.d, seed)).all()
                counts = fixed_counts(source, g, case.d)
                for test in (test_frequencies, test_strides, test_classes):
                    test(table, key, case, g, counts)
                test_serial(table, key, case, g)
                test_residues(table, key, case, g)
    for n, seeds in squares:
        for rounds in tqdm((*range(2, grouping.ROUNDS + 1), 0), desc=f"differential {n}", disable=None):
            z, ratio = differential(n, rounds, seeds, "balanced" if rounds else "numpy-shuffle")
            name = f"balanced:{rounds}" if rounds else "numpy-shuffle"
            table.add(("rounds", "differential (Patarin)", name, n * n, n * n), 2 * stats.norm.sf(abs(z)))
            extra.append({"n": n, "seeds": seeds, "rounds": rounds, "z": z.tolist(), "ratio": ratio.tolist()})


# ---- batteries ----------------------------------------------------------------------------------------------------

STREAMS = ("balanced", "iid", "numpy-pcg64")
DIEHARDER = "0 1 2 3 4 8 9 10 11 12 13 15 16 100 101 102 200:6 201:3 202:5 203:8 204 206 207 208 209"
"""Test numbers, with the n-tuple where one has to be chosen; the tests rated good, less 17 (slow) and 205."""
CRUSH = r"""
#include <stdio.h>
#include <stdlib.h>
#include "unif01.h"
#include "bbattery.h"
#include "swrite.h"
static unsigned int buffer[1 << 16]; static size_t at, have; static unsigned long used;
static unsigned int next(void) {
    if (at == have) { have = fread(buffer, 4, 1 << 16, stdin); at = 0; if (!have) { printf("EOF\n"); exit(1); } }
    used++; return buffer[at++];
}
int main(void) {
    unif01_Gen *gen = unif01_CreateExternGenBits("stdin", next);
    swrite_Basic = 0; bbattery_SmallCrush(gen);
    for (int i = 0; i < bbattery_NTests; i++) printf("p\t%s\t%.17g\n", bbattery_TestNames[i], bbattery_pVal[i]);
    printf("used,%lu\n", used); return 0;
}
"""


def stream(source, first_seed=0):
    """Endless bytes. balanced: y mod 256 of the first 2^26 positions of a domain of 2^31, then the next seed (a small
    part of the domain, for within one seed nothing is drawn twice). iid: Threefry's 64 bits. numpy-pcg64: raw."""
    for seed in itertools.count(first_seed):
        if source == "numpy-pcg64":
            bits = np.random.PCG64(seed)
            for _ in range(64):
                yield bits.random_raw(2**18).astype("<u8").tobytes()
        for start in range(0, 2**26, 2**21):
            if source == "balanced":
                yield (
                    grouping.groups("balanced", Problem(2**31, 256, seed), start, start + 2**21, np)
                    .astype(np.uint8)
                    .tobytes()
                )
            elif source == "iid":
                key = grouping._words("iid", Problem(2**31, 256, seed), 0)[:2]
                for begin in range(start, start + 2**21, 2**15):
                    p = np.arange(begin, begin + 2**15, dtype=np.int32)
                    yield np.stack(grouping.threefry(key, 0 * p, p), axis=1).astype("<i4").tobytes()


def piped(source, command, first_seed=0):
    """The output of a program that reads the stream."""
    me = [sys.executable, __file__, "--stream", source, "--first-seed", str(first_seed)]
    with subprocess.Popen(me, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as feed:
        done = subprocess.run(command, stdin=feed.stdout, capture_output=True, text=True, check=False)
        feed.kill()
    return done.stdout


def run_dieharder(table, extra, psamples):
    if not shutil.which("dieharder"):
        sys.exit("dieharder is not installed (Debian: apt-get install dieharder)")
    for source, test in tqdm(list(itertools.product(STREAMS, DIEHARDER.split())), desc="dieharder", disable=None):
        number, _, ntuple = test.partition(":")
        times = 1 if number in ("206", "207", "208", "209") else psamples  # by themselves as long as many others
        command = ["dieharder", "-g", "200", "-d", number, "-n", ntuple or "0", "-p", str(times), "-c", ","]
        start = time.perf_counter()
        for line in piped(source, command, 1000 * int(number)).splitlines():
            fields = [f.strip() for f in line.split(",")]
            try:
                p = float(fields[4])
            except (ValueError, IndexError):
                continue
            table.add(("dieharder", "all", source, 2**31, 256), p)
            extra.append(
                {
                    "battery": "dieharder",
                    "source": source,
                    "test": fields[0],
                    "ntuple": fields[1],
                    "p": p,
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )


def run_smallcrush(table, extra, prefix):
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder, "crush.c"), str(Path(folder, "crush"))
        code.write_text(CRUSH)
        libraries = ["-l:libtestu01.a", "-l:libtestu01probdist.a", "-l:libtestu01mylib.a", "-lm"]  # Debian's names
        triplet = f"{platform.machine()}-linux-gnu"
        folders = ("include", "include/testu01", f"include/{triplet}")
        paths = [f"-I{prefix}/{name}" for name in folders] + [f"-L{prefix}/lib/{triplet}"]
        subprocess.run(["gcc", "-O2", "-w", *paths, str(code), "-o", program, *libraries], check=True)
        for source in tqdm(STREAMS, desc="SmallCrush", disable=None):
            for line in piped(source, [program], 50_000).splitlines():
                if line.startswith("p\t"):
                    _, test, p = line.split("\t")
                    table.add(("SmallCrush", "all", source, 2**31, 256), float(p))
                    extra.append({"battery": "SmallCrush", "source": source, "test": test, "p": float(p)})


# ---- time ---------------------------------------------------------------------------------------------------------


def run_time(extra, D=12_500_000, d=524_288):
    D, d = (12_500, 524) if SMOKE else (D, d)
    times = {name: [] for name in grouping.ALGORITHMS}
    for seed in range(5):
        for name, found in times.items():
            start = time.perf_counter()
            grouping.groups(name, Problem(D, d, 100 + seed), 0, D, np)
            found.append(time.perf_counter() - start)
    extra.extend(
        {"grouping": name, "D": D, "d": d, "seconds_median": float(np.median(t)), "seconds": t}
        for name, t in times.items()
    )


# ---- report -------------------------------------------------------------------------------------------------------

SECTIONS = ("frequencies", "collisions", "serial", "permutation", "tiny", "avalanche", "rounds", "time")
BATTERIES = ("dieharder", "smallcrush")


def verdicts(rows):
    """Per section and source: rows, p-values, and the smallest row p-values after Bonferroni over those rows."""
    found = []
    order = {}
    for row in rows:
        order.setdefault((row["section"], row["source"]), []).append(row)
    for (section, source), members in order.items():
        ks = [m["ks_p"] for m in members if m["ks_p"] is not None]
        least = min(m["bonferroni"] for m in members)
        found.append(
            {
                "section": section,
                "source": source,
                "rows": len(members),
                "p_values": sum(m["n"] for m in members),
                "worst_p_bonferroni": min(1.0, least * len(members)),
                "worst_ks_bonferroni": min(1.0, min(ks) * len(ks)) if ks else None,
            }
        )
    return found


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    colours = {"balanced": "C0", "iid": "C1", "numpy-shuffle": "0.45", "numpy-integers": "0.7"}
    for source in SOURCES:
        ks = sorted(
            r["ks_p"]
            for r in rows
            if r["source"] == source
            and r["ks_p"] is not None
            and r["section"] in ("frequencies", "collisions", "serial", "permutation", "avalanche")
        )
        left.plot(
            ks, np.arange(1, len(ks) + 1) / (len(ks) + 1), label=f"{source} ({len(ks)} tests)", color=colours[source]
        )
    left.plot([0, 1], [0, 1], "k:", lw=1)
    left.set(
        xlabel="KS p-value of a test", ylabel="share of tests at or below", title="All tests: a straight line is right"
    )
    left.legend()
    found = {}
    for r in rows:
        if r["source"].startswith("balanced:"):
            rounds = int(r["source"].split(":")[1])
            name = {
                "collisions": "collisions",
                "frequencies": "chi² per factor and row",
                "serial": "serial",
                "rounds": f"differentials, D = {r['D']}",
            }[r["section"]]
            found.setdefault(name, {}).setdefault(rounds, []).append(r["bonferroni"])
    for name, series in found.items():
        xs = sorted(series)
        right.plot(
            xs,
            [min(40, -math.log10(max(1e-300, min(1, min(series[x]) * len(series[x]))))) for x in xs],
            "o-",
            label=name,
        )
    right.axhline(3, color="k", ls=":", lw=1)
    right.set(
        xlabel="Feistel rounds (balanced has 8)",
        ylabel="-log10 of the smallest p (Bonferroni), at most 40",
        title="How many rounds are needed",
    )
    if found:
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def short(row):
    return {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()}


def write(table, extra, sections, folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "grouping_statistics.json"
    old = json.loads(file.read_text()) if file.exists() else {"rows": [], "details": {}}
    names = {"SmallCrush" if s == "smallcrush" else s for s in sections}
    if "rounds" in names:
        old["rows"] = [r for r in old["rows"] if not r["source"].startswith("balanced:")]
    kept = [r for r in old["rows"] if r["section"] not in names or r["source"].startswith("balanced:")]
    rows = [short(row) for row in kept + list(table.rows())]
    plain_rows = [r for r in rows if not r["source"].startswith("balanced:")]
    details = old["details"] | {name: value for name, value in extra.items() if value}
    header = {**machine(), "scipy": scipy.__version__}
    result = {"machine": header, "summary": verdicts(plain_rows), "rows": rows, "details": details}
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(json.dumps(result | {"rows": "@"}, indent=1).replace('"@"', f"[\n{lines}\n]") + "\n")
    with (folder / "grouping_statistics.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "grouping_statistics.png")
    for v in result["summary"]:
        print(v)


def main():
    command = parser(__doc__)
    command.add_argument("--sections", nargs="*", choices=SECTIONS + BATTERIES, default=SECTIONS)
    command.add_argument("--stream", choices=STREAMS, help="write random bytes to standard output, endlessly")
    command.add_argument("--first-seed", type=int, default=0, help="of --stream")
    command.add_argument("--psamples", type=int, default=10, help="samples of each dieharder test")
    command.add_argument("--testu01", default="/usr", help="where TestU01 is installed")
    command.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
    args = command.parse_args()
    if args.stream:
        try:
            for block in stream(args.stream, args.first_seed):
                sys.stdout.buffer.write(block)
        except BrokenPipeError:
            os._exit(0)
    table, extra = Table(), {name: [] for name in SECTIONS + BATTERIES}
    if {"frequencies", "collisions", "serial"} & set(args.sections):
        run_groups(table, args.sections)
    if "permutation" in args.sections:
        run_permutation(table)
    if "tiny" in args.sections:
        run_tiny(table, extra["tiny"])
    if "avalanche" in args.sections:
        run_avalanche(table)
    if "rounds" in args.sections:
        run_rounds(table, extra["rounds"])
    if "dieharder" in args.sections:
        run_dieharder(table, extra["dieharder"], args.psamples)
    if "smallcrush" in args.sections:
        run_smallcrush(table, extra["smallcrush"], args.testu01)
    if "time" in args.sections:
        run_time(extra["time"])
    write(table, extra, args.sections, args.folder)


if __name__ == "__main__":
    main()
