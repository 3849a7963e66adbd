"""Checks against the frozen answers in ``vectors``: they are the same integers and the same bits. The answers are part
of the file format.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from unilora_core.grouping import ALGORITHMS
from unilora_core.maps import FIRST_D, MAPS
from unilora_core.spec import ProjectionSpec
from unilora_core.testing import reference
from unilora_core.testing.backend import Subject
from unilora_core.testing.compare import close, expect, same, sha256, text_of

__all__ = ["FILES", "FOLDER", "checks", "hexadecimal", "name_of", "spec_of", "vectors", "wholes"]

FOLDER = Path(__file__).parent / "vectors"

FILES = (*MAPS, "resized")
"""The files of frozen answers: one for each map, and one for `balanced` where d has changed."""


def checks(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks: groups and θ_d⁰ of every frozen spec, θ_D where D ≤ 10^5, all groups where D ≤ 2·10^6."""
    known = [case for case in vectors(FILES) if case["spec"]["grouping"] in subject.maps]
    for case in known:
        if "groups" in case:
            yield f"frozen_groups-{name_of(case)}", partial(frozen_groups, subject, case)
    for case in wholes(30000, 2 * 10**6, known):
        yield f"all_frozen_groups-{name_of(case)}", partial(all_frozen_groups, subject, case)
    for case in known:
        if "theta_d" in case and spec_of(case).D <= 10**5:
            yield f"frozen_init-{name_of(case)}", partial(frozen_init, subject, case)
            yield f"frozen_theta_D-{name_of(case)}", partial(frozen_theta_D, subject, case)


@functools.cache
def vectors(files: tuple[str, ...] = tuple(ALGORITHMS)) -> tuple[dict, ...]:
    """Read each frozen spec of these files and what is known of it."""
    return tuple(case for name in files for case in json.loads((FOLDER / f"{name}.json").read_text("utf-8")))


def wholes(smallest: int, largest: int, cases: Iterable[dict] | None = None) -> list[dict]:
    """Return the frozen specs of which all groups are known, with D in this range."""
    cases = vectors() if cases is None else cases
    return [case for case in cases if "groups_sha256" in case and smallest <= spec_of(case).D <= largest]


def name_of(case: dict) -> str:
    """Name a frozen spec by its grouping, d and seed, and by the first d where that is another."""
    name, first_d = "{grouping}-{d}-{seed}".format(**case["spec"]), case["spec"].get("options", {}).get(FIRST_D)
    return name if first_d is None else f"{name}-from-{first_d}"


def spec_of(case: dict) -> ProjectionSpec:
    """Make the spec of a frozen case."""
    return ProjectionSpec.from_json(case["spec"])


def hexadecimal(values: np.ndarray) -> str:
    """Return the bytes of the values as float32, little-endian, in hexadecimal."""
    return np.asarray(values).astype("<f4").tobytes().hex()


# ---- the checks -----------------------------------------------------------------------------------------------------


def frozen_groups(subject: Subject, case: dict) -> None:
    """Check slices of the groups: the first, the last, and both sides of each border of a segment or a word."""
    spec = spec_of(case)
    for start, expected in case["groups"].items():
        found = subject.numpy(subject.groups(spec, int(start), int(start) + len(expected)))
        same(f"groups from {start} on of {text_of(spec)}", found, np.array(expected))


def all_frozen_groups(subject: Subject, case: dict) -> None:
    """Check all D groups."""
    spec = spec_of(case)
    found = subject.numpy(subject.groups(spec, 0, spec.D))
    _hashed(f"groups of {text_of(spec)}", found, "int32", case["groups_sha256"], spec.groups)


def frozen_init(subject: Subject, case: dict) -> None:
    """Check θ_d⁰ bit by bit."""
    spec, known = spec_of(case), case["theta_d"]
    what, found = f"init of {text_of(spec)}", subject.numpy(subject.init(spec))
    _hashed(what, found, "float32", known["sha256"], spec.init)
    expect(f"{what}: the first three, in hexadecimal", hexadecimal(found[:3]), known["first"])


def frozen_theta_D(subject: Subject, case: dict, compiler: Callable | None = None) -> None:
    """Check P of the reversed θ_d⁰, compiled where a compiler is given: bit by bit, or to rounding if the map is not
    exact.
    """
    spec, known = spec_of(case), case["theta_D_of_reversed_theta_d"]
    theta_d = spec.init()[::-1]
    project = compiler(subject.project(spec)) if compiler else subject.project(spec)
    what, found = f"project, {text_of(spec)}", subject.numpy(project(subject.array(theta_d)))
    if not spec.map.exact:
        atol = 1e-6 * float(np.abs(theta_d).max())
        for start, expected in known.items():
            part = found[int(start) : int(start) + len(expected)]
            close(f"{what}, from {start} on", part, np.array(expected), rtol=1e-5, atol=atol)
        return
    _hashed(what, found, "float32", known["sha256"], lambda: reference.vector(spec, theta_d))
    expect(f"{what}: the last three, in hexadecimal", hexadecimal(found[-3:]), known["last"])


def _hashed(what: str, found: np.ndarray, dtype: str, known: str, expected: Callable[[], np.ndarray]) -> None:
    """Check the dtype and the hash; where the hash is another, ``expected`` tells the position."""
    expect(f"{what}: dtype", found.dtype.name, dtype)
    if sha256(found) != known:
        same(what, found, expected())
    expect(f"{what}: SHA-256", sha256(found), known)
