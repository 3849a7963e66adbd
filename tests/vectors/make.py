"""Wrote the frozen vectors in ``unilora_core/testing``, once, with NumPy: a change of one changes the file format.

It refuses to overwrite: ``make.py NAME …`` writes new files. A new map gets a file of its own; a new case of an old
one, another file.
"""

import base64
import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unilora_core import Layout, ProjectionSpec, project, save_adapter
from unilora_core.frames import Sizes, piece_names
from unilora_core.grouping import ALGORITHMS
from unilora_core.header import FROZEN, write_targets
from unilora_core.maps import MAPS
from unilora_core.maps.gather import problem_of
from unilora_core.methods import METHODS, plan_spec

FOLDER = Path(__file__).parents[2] / "unilora_core" / "testing" / "vectors"

WHOLE = 10**7
"""Up to this D, everything is computed and hashed; beyond, slices only."""

SPECS = [
    {"D": 1, "d": 1},
    {"D": 7, "d": 3, "seed": 2**64 - 1},
    {"D": 7, "d": 7, "bound": 1.0},
    {"D": 12, "d": 1, "seed": 3},
    {"D": 97, "d": 10, "seed": 1, "start": "identity"},
    {"D": 1024, "d": 64, "seed": 2**32},
    {"D": 4096, "d": 4096, "seed": 5},
    {"D": 10007, "d": 64, "seed": 2**63 + 1, "start": "identity", "bound": 0.3},
    {"D": 36864, "d": 2304, "seed": 42},
    {"D": 65537, "d": 65536, "seed": 7},
    {"D": 100000, "d": 99991, "seed": 8},
    {"D": 1000003, "d": 999, "seed": 9},
    {"D": 10**7, "d": 100000, "seed": 10},
    {"D": 2**31 - 1, "d": 2**31 - 1, "seed": 11},
    {"D": 2**31, "d": 2**31, "seed": 12},
    {"D": 2**31, "d": 2**31 - 1, "seed": 13},
    {"D": 2**31 + 1, "d": 2**31, "seed": 14},
    {"D": 2**31 + 1, "d": 3, "seed": 15},
    {"D": 2**33 + 12345, "d": 10**6 + 3, "seed": 16},
    {"D": 2**40 + 1000, "d": 2**20, "seed": 17},
    {"D": 2**48, "d": 384, "seed": 18},
    {"D": 2**48, "d": 2**31 - 1, "seed": 19},
    {"D": 2**48, "d": 2**31, "seed": 20},
]


RESIZED = [
    {"D": 97, "d": 20, "first": 10, "seed": 1, "start": "identity"},
    {"D": 97, "d": 5, "first": 10, "seed": 1, "start": "identity"},
    {"D": 10007, "d": 192, "first": 64, "seed": 2**63 + 1, "start": "identity", "bound": 0.3},
    {"D": 36864, "d": 2304, "first": 9, "seed": 43, "start": "identity"},
    {"D": 36864, "d": 1, "first": 2304, "seed": 44},
    {"D": 65537, "d": 65536, "first": 1, "seed": 7},
    {"D": 1000003, "d": 1998, "first": 999, "seed": 9},
    {"D": 2**33 + 12345, "d": 4 * (10**6 + 3), "first": 10**6 + 3, "seed": 16},
    {"D": 2**40 + 1000, "d": 2**20, "first": 2**31, "seed": 17},
    {"D": 2**48, "d": 2**31 - 2, "first": 2**30 - 1, "seed": 19},
]
"""Of `balanced`, where training began with another d."""

MEMBERS = [
    *(SPECS[i] for i in (0, 1, 2, 4, 8, 10)),
    {"D": 97, "d": 20, "first": 10, "seed": 1},
    {"D": 10**7, "d": 10**6, "seed": 10},
    {"D": 2**31 - 1, "d": 2**29, "seed": 11},
    {"D": 2**31 + 1, "d": 2**31, "seed": 14},
    {"D": 2**33 + 12345, "d": 2**30 + 1, "seed": 16},
]
"""Of `balanced`: the positions of some groups, in the order of the permutation."""

CLASSES = [SPECS[i] for i in (1, 4, 7, 8, 18)]
IDENTITY = [{"D": 1, "d": 1}, {"D": 97, "d": 97, "seed": 1, "start": "identity"}, {"D": 10007, "d": 10007, "seed": 2}]
DENSE = [
    *(SPECS[i] for i in (0, 3, 4, 5)),
    {"D": 100, "d": 100, "seed": 6},
    {"D": 1009, "d": 33, "seed": 2**63 + 1, "start": "identity", "bound": 0.3},
]
MIXED = [
    {"shapes": [("0.A", (4, 64)), ("0.Bt", (4, 32)), ("1.A", (4, 48))], "d": 416, "seed": 7, "options": (16, 2, 8)},
    {"shapes": [("0.A", (3, 5)), ("1.Bt", (2, 7))], "d": 5 + 29 * 5, "seed": 2**64 - 1, "options": (1, 5, 5)},
]
"""Specs of further maps; the options are length, topk and vectors."""


def layout_of(D: int) -> Layout:
    """Up to three factors that fill D positions."""
    sizes = [size for size in (D // 3, D // 3, D - 2 * (D // 3)) if size]
    rows = [max(r for r in range(1, 9) if size % r == 0) for size in sizes]
    names = ["0.A", "0.B", "1.A"]
    return Layout((name, (r, size // r)) for name, r, size in zip(names, rows, sizes, strict=False))


def case(D: int, grouping: str, first: int | None = None, **fields) -> dict:
    """One spec and what is known of it; arrays of floats as hexadecimal float32, little-endian."""
    options = () if first is None else (("first_d", first),)
    spec = ProjectionSpec(layout_of(D), grouping=grouping, options=options, **fields)
    known = {"spec": spec.to_json(), "groups": {a: spec.groups(a, b).tolist() for a, b in slices(spec)}}
    if spec.D <= WHOLE:
        theta_d = spec.init()
        theta_D = _project(spec, theta_d[::-1])
        counts = spec.counts().astype("<i8")
        known |= {
            "groups_sha256": sha256(spec.groups().astype("<i4")),
            "counts": {"min": int(counts.min()), "max": int(counts.max()), "sha256": sha256(counts)},
            "theta_d": {"first": theta_d[:3].astype("<f4").tobytes().hex(), "sha256": sha256(theta_d.astype("<f4"))},
            "theta_D_of_reversed_theta_d": {
                "last": theta_D[-3:].astype("<f4").tobytes().hex(),
                "sha256": sha256(theta_D.astype("<f4")),
            },
        }
    return known


def members(D: int, first: int | None = None, **fields) -> dict:
    """Group → its positions: the first groups, the last, and those around the border where they become fewer."""
    spec = ProjectionSpec(layout_of(D), options=() if first is None else (("first_d", first),), **fields)
    starts = sorted({0, max(0, spec.d - 3), max(0, spec.D % spec.d - 2)})
    known = {start: spec.members(start, min(start + 3, spec.d)) for start in starts}
    parts = {start: np.split(positions, offsets[1:-1]) for start, (offsets, positions) in known.items()}
    return {"spec": spec.to_json(), "members": {start: [p.tolist() for p in each] for start, each in parts.items()}}


def mixed(shapes: list, options: tuple[int, ...], **fields) -> dict:
    """The same for the codebook."""
    named = tuple(zip(("length", "topk", "vectors"), options, strict=True))
    return rounded(ProjectionSpec(Layout(shapes), grouping="codebook", options=named, **fields))


def dense(D: int, grouping: str, **fields) -> dict:
    """The same for a map that is not exact."""
    return rounded(ProjectionSpec(layout_of(D), grouping=grouping, **fields))


def rounded(spec: ProjectionSpec) -> dict:
    """What is known to nine digits: θ_D at the start, in the middle and at the end, computed in float64."""
    theta_d = spec.init()
    theta_D = project(spec, theta_d[::-1].astype(np.float64))
    starts = sorted({0, spec.D // 2, max(0, spec.D - 8)})
    return {
        "spec": spec.to_json(),
        "theta_d": {"first": theta_d[:3].astype("<f4").tobytes().hex(), "sha256": sha256(theta_d.astype("<f4"))},
        "theta_D_of_reversed_theta_d": {at: [float(f"{x:.9g}") for x in theta_D[at : at + 8]] for at in starts},
    }


def identity(**fields) -> dict:
    """A map without groups, bit by bit."""
    spec = ProjectionSpec(layout_of(fields.pop("D")), grouping="identity", **fields)
    theta_d = spec.init()
    theta_D = theta_d[::-1].copy()
    for name, at in spec.layout.slices.items():
        if spec.start == "identity" and name.endswith(".B"):
            theta_D[at] = (theta_d[::-1] - theta_d)[at]
    return {
        "spec": spec.to_json(),
        "theta_d": {"first": theta_d[:3].astype("<f4").tobytes().hex(), "sha256": sha256(theta_d.astype("<f4"))},
        "theta_D_of_reversed_theta_d": {
            "last": theta_D[-3:].astype("<f4").tobytes().hex(),
            "sha256": sha256(theta_D.astype("<f4")),
        },
    }


def adapter() -> dict:
    """A whole file of format version 1, and what is in it."""
    fields = {"d": 5, "seed": 2**64 - 1, "grouping": "iid", "start": "identity", "bound": 0.5}
    spec = ProjectionSpec(Layout([("q.A", (2, 3)), ("q.B", (4, 2))]), **fields)
    theta_d = np.arange(5, dtype=np.float32) / 3
    head = np.arange(4, dtype=np.int64).reshape(2, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_adapter(path, spec, theta_d, tensors={"head": head, "scale": np.float16(2)}, metadata={"note": "ä\n"})
        data = base64.b64encode(path.read_bytes()).decode()
    theta_D = _project(spec, theta_d).astype("<f4").tobytes().hex()
    return {
        "spec": spec.to_json(),
        "head": head.tolist(),
        "scale": 2.0,
        "note": "ä\n",
        "theta_D": theta_D,
        "file": data,
    }


TARGETS = [("q", Sizes(8, 6)), ("v", Sizes(8, 6)), ("up", Sizes(4, 8, 2))]
ROWS = [("q", "attn.qkv", 0, False, None), ("v", "attn.qkv", 12, False, None), ("up", "experts", 0, True, "up")]
"""The targets of the files of each method, and where they are in their model."""

SMALL = {"vb-lora": {"length": 2, "topk": 2, "vectors": 3}, "fourierft": {"frequencies": 5}}


def method(name: str) -> dict:
    """A file of a method, θ_D to nine digits, and each ΔW to six, multiplied out from its chain."""
    options = {"options": SMALL.get(name, {})} | ({"rank": 2} if METHODS[name].rank else {})
    spec = plan_spec(TARGETS, method=name, seed=2**64 - 1, **options)
    theta_d = ((np.arange(spec.d) % 7 - 3) / 8).astype(np.float32)
    theta_D = project(spec, theta_d.astype(np.float64))
    factors, tensors, deltas = spec.layout.split(theta_D), {}, {}
    for target, sizes in TARGETS:
        frozen = spec.form.frozen(sizes, spec.seed, spec.chosen)
        if spec.form.of_weight:
            shape = (*sizes.stack, sizes.out_features, sizes.in_features)
            frozen = spec.form.of_weight(np.cos(np.arange(np.prod(shape))).astype(np.float32).reshape(shape), 2)
            tensors |= {f"{FROZEN}{target}.{array}": value for array, value in frozen.items()}
        pieces = {piece: factors[name] for piece, name in piece_names(spec.form, target, sizes).items()}
        first, *rest = spec.form.chain(pieces, frozen, spec.chosen)
        deltas[target] = functools.reduce(lambda product, factor: factor @ product, rest, first)
    sized = [
        (*row, sizes.in_features, sizes.out_features, sizes.experts)
        for row, (_, sizes) in zip(ROWS, TARGETS, strict=True)
    ]
    pairs = [row if row[-1] else row[:-1] for row in ROWS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        rows = write_targets(pairs if spec.frame == "pair" else sized)
        save_adapter(path, spec, theta_d, tensors=tensors, metadata=rows)
        data = base64.b64encode(path.read_bytes()).decode()
    return {
        "method": name,
        "spec": spec.to_json(),
        "theta_D": [float(f"{x:.9g}") for x in theta_D],
        "deltas": {target: [float(f"{x:.6g}") for x in delta.reshape(-1)] for target, delta in deltas.items()},
        "file": data,
    }


def slices(spec: ProjectionSpec) -> list[tuple[int, int]]:
    """(start, stop): the first, the last, the middle, and both sides of each border of a segment or a word."""
    algorithm = ALGORITHMS.get(spec.grouping, ALGORITHMS["balanced"])  # of which classes are made
    segment = algorithm.segment(problem_of(spec))
    borders = {segment, spec.D // segment * segment, 2**31, 2**32, 2**40, spec.D // 2}
    starts = {0, max(0, spec.D - 8), *(border - 4 for border in borders if 4 <= border < spec.D)}
    return [(start, min(start + 8, spec.D)) for start in sorted(starts)]


def sha256(array: np.ndarray) -> str:
    """Of the bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def _project(spec: ProjectionSpec, theta_d: np.ndarray) -> np.ndarray:
    """By the definition, without `unilora_core.project`."""
    scale = (1 / np.sqrt(np.maximum(spec.counts(), 1))).astype(np.float32)
    scale = np.ones_like(scale) if spec.grouping == "unnormalised" else scale
    groups = spec.groups()
    theta_D = (theta_d * scale)[groups]
    if spec.start == "identity":
        for name, at in spec.layout.slices.items():
            if name.endswith(".B"):
                theta_D[at] = ((theta_d - spec.init()) * scale)[groups[at]]
    return theta_D


def lines(cases: Iterable[dict]) -> str:
    """A JSON list, a case a line."""
    return "[\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in cases) + "\n]\n"


def text(name: str) -> str:
    """What the file of this name holds."""
    if name == "methods":
        return lines(map(method, METHODS))
    if name == "adapter":
        return json.dumps(adapter(), indent=1) + "\n"
    if name == "identity":
        return lines(identity(**fields) for fields in IDENTITY)
    if name == "codebook":
        return lines(mixed(**fields) for fields in MIXED)
    if name in ("fastfood", "gaussian"):
        return lines(dense(grouping=name, **fields) for fields in DENSE)
    if name == "resized":
        return lines(case(grouping="balanced", **fields) for fields in RESIZED)
    if name == "members":
        return lines(members(**fields) for fields in MEMBERS)
    specs = SPECS if name in ALGORITHMS else CLASSES
    small = [fields for fields in specs if name != "numpy-shuffle" or fields["D"] <= WHOLE]
    return lines(case(grouping=name, **fields) for fields in small)


if __name__ == "__main__":
    for name in sys.argv[1:] or [*MAPS, "adapter", "methods", "resized", "members"]:
        with (FOLDER / f"{name}.json").open("x") as file:  # "x": never over an old one
            file.write(text(name))
