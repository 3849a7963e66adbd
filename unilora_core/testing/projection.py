"""Checks of project and project_transpose against P, built row by row from its definition."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unilora_core._namespace import Array
from unilora_core.errors import ValuesError
from unilora_core.grouping import ALGORITHMS
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.backend import Subject
from unilora_core.testing.compare import close, drawn, expect, raises, same, text_of
from unilora_core.testing.reference import LAYOUT, SEEDS, dense, flat, normal, transposed, vector

__all__ = ["checks"]

Check = tuple[str, Callable[[], None]]
STARTS = ("paper", "identity")
SIZES = (1, 64, 100, 411)
"""Each d that is tried with LAYOUT: they are few, because JAX compiles anew for each shape."""


def checks(subject: Subject) -> Iterator[Check]:
    """Yield the checks of P and Pᵀ: matrix, bits, isometry, adjoint; then start, dtype, device, gradient, errors."""
    for grouping in ALGORITHMS:
        for d in SIZES:
            spec = ProjectionSpec(LAYOUT, d, seed=3, grouping=grouping)
            yield f"project_is_P-{grouping}-{d}", partial(project_is_P, subject, spec)
            yield f"project_transpose_is_P_transposed-{grouping}-{d}", partial(transpose_is_P_transposed, subject, spec)
        yield f"P_is_an_isometry-{grouping}", partial(P_is_an_isometry, subject, grouping)
    for check in (bits_of_the_reference, transpose_of_the_reference, distances_are_kept):
        yield f"{check.__name__}-drawn", partial(check, subject)
    yield "indices_past_2^24", partial(indices_past_a_float, subject)
    yield "identity_start_has_B_zero", partial(identity_start_has_B_zero, subject)
    yield "identity_start_moves_as_the_paper_start", partial(identity_start_moves_as_the_paper_start, subject)
    yield "non_finite_numbers_stay_in_their_group", partial(non_finite_numbers_stay_in_their_group, subject)
    yield "inputs_are_left_as_they_were", partial(inputs_are_left_as_they_were, subject)
    yield from _by_dtype(subject)
    if pullback := subject.pullback:
        for start in STARTS:
            for grouping in ALGORITHMS:
                yield f"gradient-{grouping}-{start}", partial(gradient, subject, pullback, grouping, start)
    for what, bad in BAD_THETA.items():
        yield f"project_refuses-{what}", partial(project_refuses, subject, bad)
    for what, bad in BAD_Y.items():
        yield f"project_transpose_refuses-{what}", partial(project_transpose_refuses, subject, bad)


def _by_dtype(subject: Subject) -> Iterator[Check]:
    for dtype in subject.dtypes:
        for start in STARTS:
            yield (
                f"dtype_and_device_are_kept-{dtype}-{start}",
                partial(dtype_and_device_are_kept, subject, dtype, start),
            )
        if dtype in ("float16", "bfloat16"):
            yield f"computed_in_float32-{dtype}", partial(computed_in_float32, subject, dtype)
        else:
            yield f"adjoint-{dtype}", partial(adjoint, subject, dtype)
    if "float64" in subject.dtypes:
        yield "computed_in_float64", partial(computed_in_float64, subject)


# ---- as a matrix ----------------------------------------------------------------------------------------------------


def project_is_P(subject: Subject, spec: ProjectionSpec) -> None:
    """Check θ_D = P θ_d in float32."""
    theta_d = normal(spec.d)
    theta_D = subject.project(spec)(subject.array(theta_d))
    subject.expect_dtype(f"project, {text_of(spec)}", theta_D, "float32")
    close(f"project, {text_of(spec)}", subject.numpy(theta_D), dense(spec) @ theta_d, rtol=3e-7)


def transpose_is_P_transposed(subject: Subject, spec: ProjectionSpec) -> None:
    """Check Pᵀ y in float32."""
    y = normal(spec.D)
    summed = subject.project_transpose(spec)(subject.array(y))
    subject.expect_dtype(f"project_transpose, {text_of(spec)}", summed, "float32")
    close(f"project_transpose, {text_of(spec)}", subject.numpy(summed), dense(spec).T @ y, rtol=1e-5, atol=1e-5)


def P_is_an_isometry(subject: Subject, grouping: str) -> None:
    """Check PᵀP = I_d to 1e-6 in float32, column by column; an empty group of ``iid`` is a zero on the diagonal."""
    spec = ProjectionSpec(LAYOUT, 37, grouping=grouping)
    project, project_transpose = subject.project(spec), subject.project_transpose(spec)
    columns = [subject.numpy(project_transpose(project(subject.array(e)))) for e in np.eye(37, dtype=np.float32)]
    expected = np.diag((spec.counts() > 0).astype(np.float64))
    close(f"PᵀP, {text_of(spec)}", np.stack(columns), expected, rtol=0, atol=1e-6)


# ---- specs that hypothesis draws ------------------------------------------------------------------------------------


def specs() -> st.SearchStrategy[ProjectionSpec]:
    """Draw specs of any seed, grouping, start and bound, in the sizes of which a compiler has seen the shapes."""
    return st.builds(
        ProjectionSpec,
        st.just(LAYOUT),
        st.sampled_from(SIZES),
        SEEDS,
        st.sampled_from(list(ALGORITHMS)),
        st.sampled_from(STARTS),
        st.floats(1e-3, 10),
    )


def bits_of_the_reference(subject: Subject) -> None:
    """Check that θ_D in float32 has the bits that IEEE arithmetic gives: scale, then gather."""

    @drawn
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1))
    def check(spec, seed):
        theta_d = normal(spec.d, seed)
        found = subject.numpy(subject.project(spec)(subject.array(theta_d)))
        same(f"project, {text_of(spec)}, bit by bit", found, vector(spec, theta_d))

    check()


def transpose_of_the_reference(subject: Subject) -> None:
    """Check Pᵀ y, whatever the start."""

    @drawn
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1))
    def check(spec, seed):
        y = normal(spec.D, seed)
        found = subject.numpy(subject.project_transpose(spec)(subject.array(y)))
        close(f"project_transpose, {text_of(spec)}", found, transposed(spec, y), rtol=1e-5, atol=1e-5)

    check()


def distances_are_kept(subject: Subject) -> None:
    """Check PᵀP θ_d = θ_d, except for the empty groups of ``iid``; up to 411 numbers are summed, maybe in float32."""

    @drawn
    @given(spec=specs().map(lambda spec: replace(spec, start="paper")), seed=st.integers(0, 2**32 - 1))
    def check(spec, seed):
        theta_d = normal(spec.d, seed)
        found = subject.project_transpose(spec)(subject.project(spec)(subject.array(theta_d)))
        expected = np.where(spec.counts() > 0, theta_d, 0)
        close(f"PᵀP θ_d, {text_of(spec)}", subject.numpy(found), expected, rtol=1e-5, atol=1e-6)

    check()


def adjoint(subject: Subject, dtype: str) -> None:
    """Check ⟨P x, y⟩ = ⟨x, Pᵀ y⟩; the products are summed in float64."""
    tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]

    @drawn
    @given(spec=specs().map(lambda spec: replace(spec, start="paper")), seed=st.integers(0, 2**32 - 1))
    def check(spec, seed):
        x, y = normal(spec.d, seed, np.float64).astype(dtype), normal(spec.D, seed + 1, np.float64).astype(dtype)
        Px = subject.numpy(subject.project(spec)(subject.array(x))).astype(np.float64)
        Py = subject.numpy(subject.project_transpose(spec)(subject.array(y))).astype(np.float64)
        x, y = x.astype(np.float64), y.astype(np.float64)
        size = np.linalg.norm(x) * np.linalg.norm(y)
        close(f"⟨P x, y⟩ and ⟨x, Pᵀ y⟩, {text_of(spec)}", np.array([Px @ y]), np.array([x @ Py]), 0, tolerance * size)

    check()


def indices_past_a_float(subject: Subject) -> None:
    """Check more positions and groups than float32 can count: an index that passed through float32 is off by one here.

    The grouping is ``numpy-shuffle``, because its table is made once for all backends.
    """
    spec = flat(2**24 + 2**10, 2**24 + 2**9, seed=1, grouping="numpy-shuffle")
    groups, counts = spec.groups(), spec.counts()
    scale = (1 / np.sqrt(counts)).astype(np.float32)
    theta_d = normal(spec.d)
    theta_D = subject.project(spec)(subject.array(theta_d))
    same(f"project, {text_of(spec)}", subject.numpy(theta_D), (theta_d * scale)[groups])
    summed = subject.project_transpose(spec)(theta_D)
    close(f"project_transpose, {text_of(spec)}", subject.numpy(summed), theta_d, rtol=1e-6)


# ---- start, values that are not finite, inputs ----------------------------------------------------------------------


def identity_start_has_B_zero(subject: Subject) -> None:
    """Check that at θ_d⁰ the factors B are zero and the factors A are not."""
    spec = ProjectionSpec(LAYOUT, 50, start="identity")
    theta_D = subject.numpy(subject.project(spec)(subject.init(spec)))
    for name, at in LAYOUT.slices.items():
        what = f"numbers other than zero in {name} at the start, {text_of(spec)}"
        expect(what, int((theta_D[at] != 0).sum()), 0 if name.endswith(".B") else at.stop - at.start)


def identity_start_moves_as_the_paper_start(subject: Subject) -> None:
    """Check that the factors move by P times the step of θ_d, wherever they start."""
    paper, identity = (ProjectionSpec(LAYOUT, 50, start=start) for start in STARTS)
    theta_d = paper.init() + normal(50)
    moved, from_identity = (subject.numpy(subject.project(s)(subject.array(theta_d))) for s in (paper, identity))
    at_start = vector(paper, paper.init())
    for name, at in LAYOUT.slices.items():
        expected = moved[at] - at_start[at] if name.endswith(".B") else moved[at]
        close(f"{name}, {text_of(identity)}", from_identity[at], expected, rtol=1e-7, atol=1e-6)


def non_finite_numbers_stay_in_their_group(subject: Subject) -> None:
    """Check that NaN and infinity reach the positions of their group, and no other: a gather, no product with zeros."""
    spec = ProjectionSpec(LAYOUT, 50)
    theta_d, y = normal(50), normal(411)
    theta_d[[0, 49]] = np.nan, np.inf
    at = [int(np.argmax(spec.groups() == j)) for j in (3, 7)]
    y[at] = np.nan, -np.inf
    found = subject.numpy(subject.project(spec)(subject.array(theta_d)))
    same(f"project of NaN and infinity, {text_of(spec)}", found, vector(spec, theta_d))
    summed = subject.numpy(subject.project_transpose(spec)(subject.array(y)))
    expected = transposed(spec, y)
    what = f"project_transpose of NaN and infinity, {text_of(spec)}"
    finite = np.isfinite(expected)
    same(what, np.where(finite, 0, summed), np.where(finite, 0, expected))
    close(what, summed[finite], expected[finite], rtol=1e-5, atol=1e-5)


def inputs_are_left_as_they_were(subject: Subject) -> None:
    """Check that neither function writes into its argument."""
    for start in STARTS:
        spec = ProjectionSpec(LAYOUT, 50, start=start)
        for name, size in (("project", spec.d), ("project_transpose", spec.D)):
            x = subject.array(normal(size))
            getattr(subject, name)(spec)(x)
            same(f"the argument of {name} afterwards, {text_of(spec)}", subject.numpy(x), normal(size))


# ---- dtypes and devices ---------------------------------------------------------------------------------------------


def dtype_and_device_are_kept(subject: Subject, dtype: str, start: str) -> None:
    """Check that dtype and device stay: nothing is promoted to float64, nothing moves to another device."""
    spec = ProjectionSpec(LAYOUT, 50, start=start)
    for name, size in (("project", spec.d), ("project_transpose", spec.D)):
        found = getattr(subject, name)(spec)(subject.array(normal(size), dtype))
        subject.expect_dtype(f"{name} of {dtype}, {text_of(spec)}", found, dtype)
        subject.expect_device(f"{name} of {dtype}, {text_of(spec)}", found)


def computed_in_float32(subject: Subject, dtype: str) -> None:
    """Check that narrow floats are widened, computed with, and rounded once."""
    spec = ProjectionSpec(LAYOUT, 1)

    def rounded(values):
        return subject.numpy(subject.array(values, dtype)).astype(np.float32)

    theta_D = subject.numpy(subject.project(spec)(subject.array(np.full(1, 3, np.float32), dtype))).astype(np.float32)
    same(f"project of {dtype}, {text_of(spec)}", theta_D, rounded(np.full(411, 3 * spec.scale())))
    for value in (1, 300):  # 256 + 1 is 256 in bfloat16, 411 · 300 is infinite in float16
        y = subject.array(np.full(411, value, np.float32), dtype)
        summed = subject.numpy(subject.project_transpose(spec)(y)).astype(np.float32)
        what = f"project_transpose of 411 times {value} in {dtype}, {text_of(spec)}"
        close(what, summed, np.array([411**0.5 * value]), rtol=1e-3 if dtype == "float16" else 4e-3)


def computed_in_float64(subject: Subject) -> None:
    """Check that wide floats are not narrowed, nor the scale."""
    spec = ProjectionSpec(LAYOUT, 50)
    theta_d, y = normal(50, dtype=np.float64), normal(411, dtype=np.float64)
    theta_D = subject.numpy(subject.project(spec)(subject.array(theta_d)))
    close(f"project of float64, {text_of(spec)}", theta_D, dense(spec) @ theta_d, rtol=1e-15)
    summed = subject.numpy(subject.project_transpose(spec)(subject.array(y)))
    close(f"project_transpose of float64, {text_of(spec)}", summed, dense(spec).T @ y, rtol=1e-13, atol=1e-14)


# ---- gradients ------------------------------------------------------------------------------------------------------


def gradient(subject: Subject, pullback: Callable, grouping: str, start: str) -> None:
    """Check that the pullback of y is Pᵀ y, from either start, in the dtype of θ_d."""
    spec, y = ProjectionSpec(LAYOUT, 50, grouping=grouping, start=start), normal(411)
    found = pullback(subject.project(spec), subject.init(spec), subject.array(y))
    subject.expect_dtype(f"gradient, {text_of(spec)}", found, "float32")
    close(f"gradient, {text_of(spec)}", subject.numpy(found), transposed(spec, y), rtol=1e-5, atol=1e-6)


# ---- what does not fit ----------------------------------------------------------------------------------------------

BAD_THETA = {
    "one_less": np.zeros(49, np.float32),
    "a_column": np.zeros((50, 1), np.float32),
    "int32": np.zeros(50, np.int32),
    "complex64": np.zeros(50, np.complex64),
}
BAD_Y = {"d_for_D": np.zeros(50, np.float32), "int32": np.zeros(411, np.int32)}


def project_refuses(subject: Subject, bad: np.ndarray) -> None:
    """Check that project raises `ValuesError`, with the text of the core."""
    _refuses(subject.project(ProjectionSpec(LAYOUT, 50)), "project: theta_d", 50, subject.array(bad))


def project_transpose_refuses(subject: Subject, bad: np.ndarray) -> None:
    """Check that project_transpose raises `ValuesError`, with the text of the core."""
    _refuses(subject.project_transpose(ProjectionSpec(LAYOUT, 50)), "project_transpose: y", 411, subject.array(bad))


def _refuses(function: Callable, what: str, size: int, bad: Array) -> None:
    got = f"{tuple(bad.shape)} {bad.dtype}"
    with raises(f"{what} as {got}", ValuesError, f"{what}: expected shape ({size},) and ", f", got {got}."):
        function(bad)
