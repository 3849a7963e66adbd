"""Wrote the frozen vectors in ``unilora_core/testing``, once, with NumPy: a change of one changes the file format.

It refuses to overwrite. A new grouping gets a file of its own; a new case of an old grouping, another file.
"""

import base64
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from unilora_core import Layout, ProjectionSpec, save_adapter
from unilora_core.grouping import ALGORITHMS

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


def layout_of(D: int) -> Layout:
    """Up to three factors that fill D positions."""
    sizes = [size for size in (D // 3, D // 3, D - 2 * (D // 3)) if size]
    rows = [max(r for r in range(1, 9) if size % r == 0) for size in sizes]
    names = ["0.A", "0.B", "1.A"]
    return Layout((name, (r, size // r)) for name, r, size in zip(names, rows, sizes, strict=False))


def case(D: int, grouping: str, **fields) -> dict:
    """One spec and what is known of it; arrays of floats as hexadecimal float32, little-endian."""
    spec = ProjectionSpec(layout_of(D), grouping=grouping, **fields)
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


def slices(spec: ProjectionSpec) -> list[tuple[int, int]]:
    """(start, stop): the first, the last, the middle, and both sides of each border of a segment or a word."""
    segment = ALGORITHMS[spec.grouping].segment(spec._problem)
    borders = {segment, spec.D // segment * segment, 2**31, 2**32, 2**40, spec.D // 2}
    starts = {0, max(0, spec.D - 8), *(border - 4 for border in borders if 4 <= border < spec.D)}
    return [(start, min(start + 8, spec.D)) for start in sorted(starts)]


def sha256(array: np.ndarray) -> str:
    """Of the bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def _project(spec: ProjectionSpec, theta_d: np.ndarray) -> np.ndarray:
    """By the definition, without `unilora_core.project`."""
    scale = (1 / np.sqrt(np.maximum(spec.counts(), 1))).astype(np.float32)
    groups = spec.groups()
    theta_D = (theta_d * scale)[groups]
    if spec.start == "identity":
        for name, at in spec.layout.slices.items():
            if name.endswith(".B"):
                theta_D[at] = ((theta_d - spec.init()) * scale)[groups[at]]
    return theta_D


if __name__ == "__main__":
    for grouping in ALGORITHMS:
        specs = [fields for fields in SPECS if grouping != "numpy-shuffle" or fields["D"] <= WHOLE]
        with (FOLDER / f"{grouping}.json").open("x") as file:  # "x": never over an old one
            lines = [json.dumps(case(grouping=grouping, **fields), separators=(",", ":")) for fields in specs]
            file.write("[\n" + ",\n".join(lines) + "\n]\n")
    with (FOLDER / "adapter.json").open("x") as file:
        json.dump(adapter(), file, indent=1)
        file.write("\n")
