"""Checks of the maps beyond one grouping for all positions, against their definitions: exact ones bit by bit, others to
rounding.

The specs are few, because JAX compiles anew for each shape.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from unilora_core.errors import SpecError
from unilora_core.maps import MAPS
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.backend import Subject
from unilora_core.testing.compare import close, raises, same, text_of
from unilora_core.testing.definitions import (
    FURTHER,
    by_definition,
    codebook_pullback,
    columns,
    matrix,
    theta_D,
    weights,
)
from unilora_core.testing.reference import gathered, normal

__all__ = ["checks"]

NARROW = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The float dtypes that are computed in float32 → half of their last bit, of 1."""

CLOSE = {"rtol": 1e-5, "atol": 4e-6}
"""The tolerance in float32, with sums in any order; a product of matrices in fewer bits (TF32) is not close."""


def checks(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks: P, Pᵀ, the gradient and the groups of one small spec of each map, from either start."""
    for name in FURTHER:
        if name not in subject.maps:
            continue
        linear = MAPS[name].transpose is not None
        for start in ("paper", "identity") if linear else ("paper",):
            spec = by_definition(name, start=start)
            yield f"map_project-{name}-{start}", partial(map_project, subject, spec)
            if subject.pullback:
                yield f"map_gradient-{name}-{start}", partial(map_gradient, subject, subject.pullback, spec)
        yield f"map_transpose-{name}", partial(map_transpose if linear else no_transpose, subject, by_definition(name))
        if MAPS[name].groups is not None:
            yield f"map_groups-{name}", partial(map_groups, subject, by_definition(name))
        if subject.compile and (subject.compiles_project if MAPS[name].exact else subject.compiles_maps):
            yield f"compiled_map-{name}", partial(map_project, subject, by_definition(name), subject.compile)
        for dtype in [dtype for dtype in subject.dtypes if dtype in NARROW]:
            yield f"map_computed_in_float32-{name}-{dtype}", partial(map_computed_in_float32, subject, name, dtype)


def map_project(subject: Subject, spec: ProjectionSpec, compiler: Callable | None = None) -> None:
    """Check θ_D in float32: where the map is exact, it has the bits that IEEE arithmetic gives."""
    theta_d = normal(spec.d)
    project = compiler(subject.project(spec)) if compiler else subject.project(spec)
    found = project(subject.array(theta_d))
    subject.expect_dtype(f"project, {text_of(spec)}", found, "float32")
    if spec.map.exact:
        expected = gathered(spec, theta_d, np.array(columns(spec)), weights(spec))
        same(f"project, {text_of(spec)}, bit by bit", subject.numpy(found), expected)
    else:
        close(f"project, {text_of(spec)}", subject.numpy(found), theta_D(spec, theta_d), **CLOSE)


def map_transpose(subject: Subject, spec: ProjectionSpec) -> None:
    """Check Pᵀ y in float32."""
    found = subject.project_transpose(spec)(subject.array(normal(spec.D)))
    subject.expect_dtype(f"project_transpose, {text_of(spec)}", found, "float32")
    expected = matrix(spec).T @ normal(spec.D)
    close(f"project_transpose, {text_of(spec)}", subject.numpy(found), expected, rtol=1e-5, atol=1e-5)


def no_transpose(subject: Subject, spec: ProjectionSpec) -> None:
    """Check that the transpose raises `SpecError`, with the text of the core."""
    text = f"project_transpose: the grouping {spec.grouping!r} is not linear; differentiate project."
    with raises(f"project_transpose, {text_of(spec)}", SpecError, text):
        subject.project_transpose(spec)(subject.array(normal(spec.D)))


def map_gradient(subject: Subject, pullback: Callable, spec: ProjectionSpec) -> None:
    """Check the pullback of y: it is Pᵀ y, or what the derivative of the mixtures gives."""
    theta_d, y = normal(spec.d), normal(spec.D, 1)
    found = subject.numpy(pullback(subject.project(spec), subject.array(theta_d), subject.array(y)))
    linear = spec.map.transpose is not None
    expected = matrix(spec).T @ y if linear else codebook_pullback(spec, theta_d, y)
    close(f"gradient, {text_of(spec)}", found, expected, rtol=1e-5, atol=1e-5)


def map_groups(subject: Subject, spec: ProjectionSpec) -> None:
    """Check the column of each row, in slices that cut factors."""
    expected = np.array(columns(spec))
    for start, stop in ((0, spec.D), (0, 0), (7, 8), (100, 300), (spec.D - 9, spec.D)):
        found = subject.groups(spec, start, stop)
        subject.expect_dtype(f"groups from {start} on of {text_of(spec)}", found, "int32")
        same(f"groups from {start} on of {text_of(spec)}", subject.numpy(found), expected[start:stop])


def map_computed_in_float32(subject: Subject, name: str, dtype: str) -> None:
    """Check that narrow floats are widened, computed with, and rounded once: θ_D is within the last bit."""
    spec = by_definition(name)
    narrow = subject.array(normal(spec.d), dtype)
    found = subject.project(spec)(narrow)
    subject.expect_dtype(f"project of {dtype}, {text_of(spec)}", found, dtype)
    expected = theta_D(spec, subject.numpy(narrow))
    close(f"project of {dtype}, {text_of(spec)}", subject.numpy(found), expected, rtol=1.01 * NARROW[dtype], atol=4e-6)
