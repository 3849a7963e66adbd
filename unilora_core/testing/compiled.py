"""Checks of compiled functions: they give the same integers and the same bits."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from unilora_core import grouping
from unilora_core._namespace import standard
from unilora_core.grouping import ALGORITHMS, Kernel
from unilora_core.maps.gather import problem_of
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.backend import Subject
from unilora_core.testing.compare import close, same, text_of
from unilora_core.testing.frozen import frozen_theta_D, name_of, spec_of, vectors, wholes
from unilora_core.testing.reference import LAYOUT, normal, transposed

__all__ = ["checks", "frozen_positions", "kernel"]

TRACED = (2**64 - 1, 42, 13, 16, 17, 19)
"""The seeds of six frozen specs, from D = 7 to 2^48: tracing and compiling take a second each."""


def checks(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks of what the backend says that it compiles."""
    if (compiler := subject.compile) and subject.compiles_groups:
        for case in vectors((*ALGORITHMS, "resized")):
            if case["spec"]["seed"] in TRACED and case["spec"]["grouping"] != "numpy-shuffle":
                yield f"compiled_groups-{name_of(case)}", partial(compiled_groups, subject, compiler, case)
    if compiler and subject.compiles_project:
        for case in wholes(10**4, 5 * 10**4):  # of each grouping, one of either start
            yield f"compiled_project-{name_of(case)}", partial(frozen_theta_D, subject, case, compiler)
        for name in ALGORITHMS:
            yield f"compiled_project_transpose-{name}", partial(compiled_transpose, subject, compiler, name)
        if pullback := subject.pullback:
            for start in ("paper", "identity"):
                yield f"compiled_gradient-{start}", partial(compiled_gradient, subject, compiler, pullback, start)


def kernel(spec: ProjectionSpec, segment: int, xp) -> Kernel:
    """Return the function that a backend compiles: position p of a segment → its group, (n,) int32 to (n,) int32."""
    make = ALGORITHMS[spec.grouping].kernel
    assert make, f"{spec.grouping} is a table"
    return make(problem_of(spec), segment, standard(xp), None)


def frozen_positions(case: dict) -> Iterator[tuple[int, np.ndarray, list[int]]]:
    """Yield (segment, positions, groups) of each frozen slice, cut where a segment ends."""
    spec = spec_of(case)
    length = ALGORITHMS[spec.grouping].segment(problem_of(spec))
    for start, expected in case["groups"].items():
        for segment, offset, n in grouping._pieces(int(start), int(start) + len(expected), length, length):
            first = segment * length + offset - int(start)
            yield segment, (offset + np.arange(n)).astype(np.int32), expected[first : first + n]


def compiled_groups(subject: Subject, compiler: Callable, case: dict) -> None:
    """Check the core's compiled kernel, a function of the positions, in the last frozen slice."""
    spec = spec_of(case)
    *_, (segment, positions, expected) = frozen_positions(case)
    found = compiler(kernel(spec, segment, subject.xp))(subject.array(positions))
    same(f"compiled groups of {text_of(spec)}, segment {segment}", subject.numpy(found), np.array(expected))


def compiled_transpose(subject: Subject, compiler: Callable, name: str) -> None:
    """Check the compiled Pᵀ y."""
    spec = ProjectionSpec(LAYOUT, 50, seed=3, grouping=name)
    found = compiler(subject.project_transpose(spec))(subject.array(normal(411)))
    expected = transposed(spec, normal(411))
    close(f"compiled project_transpose, {text_of(spec)}", subject.numpy(found), expected, rtol=1e-5, atol=1e-5)


def compiled_gradient(subject: Subject, compiler: Callable, pullback: Callable, start: str) -> None:
    """Check the pullback through the compiled function."""
    spec, y = ProjectionSpec(LAYOUT, 50, start=start), normal(411)
    found = pullback(compiler(subject.project(spec)), subject.init(spec), subject.array(y))
    close(f"compiled gradient, {text_of(spec)}", subject.numpy(found), transposed(spec, y), rtol=1e-5, atol=1e-6)
