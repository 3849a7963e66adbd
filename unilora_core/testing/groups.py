"""Checks of the groups against the references in plain Python integers, and of the properties of every slice."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unilora_core._namespace import has_int64
from unilora_core.errors import SpecError
from unilora_core.grouping import ALGORITHMS
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.backend import Subject
from unilora_core.testing.compare import drawn, expect, raises, same, text_of
from unilora_core.testing.frozen import name_of, spec_of, vectors
from unilora_core.testing.reference import AWKWARD, GROUPS, flat, image, problems

__all__ = ["checks"]


def checks(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks: groups of any spec, groups around the borders of a word, slices, and members if the core's."""
    for name in GROUPS:
        yield f"groups_anywhere-{name}", partial(groups_anywhere, subject, name)
        for D, d in AWKWARD:
            yield f"groups_around_32_bits-{name}-{D}-{d}", partial(groups_around_32_bits, subject, name, D, d)
    for name in ALGORITHMS:
        yield f"groups_are_int32_in_range-{name}", partial(groups_are_int32_in_range, subject, name)
        yield f"slices_make_the_whole-{name}", partial(slices_make_the_whole, subject, name)
        yield f"an_empty_slice_is_empty-{name}", partial(an_empty_slice_is_empty, subject, name)
    yield "a_slice_outside_is_refused", partial(a_slice_outside_is_refused, subject)
    if subject.computes_groups:
        for case in vectors(("members",)):
            yield f"frozen_members-{name_of(case)}", partial(frozen_members, subject, case)
        for name in GROUPS:
            yield f"members_anywhere-{name}", partial(members_anywhere, subject, name)
        for name in ALGORITHMS:
            yield f"members_are_a_stable_sort-{name}", partial(members_are_a_stable_sort, subject, name)
        yield "members_outside_are_refused", partial(members_outside_are_refused, subject)


def groups_anywhere(subject: Subject, name: str) -> None:
    """Check five positions of any spec, D up to 2^48."""

    @settings(drawn, max_examples=100)
    @given(problem=problems(), where=st.floats(0, 1) | st.floats(0.5, 1))
    def check(problem, where):
        D, d, seed = problem
        start = min(D - 1, int(where * D))
        _equal_the_reference(subject, flat(D, d, seed=seed, grouping=name), start, min(D, start + 5))

    check()


def groups_around_32_bits(subject: Subject, name: str, D: int, d: int) -> None:
    """Check six positions on both sides of the ends of words and segments."""
    spec = flat(D, d, seed=2**64 - 1, grouping=name)
    for border in (0, 2**31 - 3, 2**31 // d * d - 3, 2**32 - 3, D - 6):
        if 0 <= border <= D - 6:
            _equal_the_reference(subject, spec, border, border + 6)


def _equal_the_reference(subject: Subject, spec: ProjectionSpec, start: int, stop: int) -> None:
    expected = [GROUPS[spec.grouping](spec.D, spec.d, spec.seed, i) for i in range(start, stop)]
    found = subject.numpy(subject.groups(spec, start, stop))
    same(f"groups from {start} on of {text_of(spec)}", found, np.array(expected))


def groups_are_int32_in_range(subject: Subject, name: str) -> None:
    """Check shape, dtype, range, and the device of the backend."""
    for d in (1, 2, 64, 1000):
        spec = flat(1000, d, grouping=name)
        groups = subject.groups(spec, 0, 1000)
        what = f"groups of {text_of(spec)}"
        subject.expect_dtype(what, groups, "int32")
        subject.expect_device(what, groups)
        found = subject.numpy(groups)
        expect(f"{what}: shape", found.shape, (1000,))
        expect(f"{what}: positions outside 0 … d-1", int(((found < 0) | (found >= d)).sum()), 0)


def slices_make_the_whole(subject: Subject, name: str) -> None:
    """Check that slices make the whole, whatever the cuts, the last position among them."""
    spec = flat(1000, 37, seed=5, grouping=name)
    cuts = (0, 1, 8, 300, 997, 1000)
    parts = [subject.numpy(subject.groups(spec, *cut)) for cut in itertools.pairwise(cuts)]
    same(f"groups of {text_of(spec)}, cut at {cuts}", np.concatenate(parts), spec.groups())


def an_empty_slice_is_empty(subject: Subject, name: str) -> None:
    """Check that an empty slice is (0,) int32."""
    groups = subject.groups(flat(10, 3, grouping=name), 4, 4)
    expect("groups(4, 4): shape", tuple(groups.shape), (0,))
    subject.expect_dtype("groups(4, 4)", groups, "int32")


def a_slice_outside_is_refused(subject: Subject) -> None:
    """Check that a slice outside raises `SpecError`, with the text of the core."""
    for start, stop in ((-1, 3), (0, 11), (5, 4), (11, 11)):
        text = f"groups: expected 0 ≤ start ≤ stop ≤ D = 10, got start = {start}, stop = {stop}."
        with raises(f"groups({start}, {stop}) with D = 10", SpecError, text):
            subject.groups(flat(10, 3), start, stop)


# ---- members, the inverse -------------------------------------------------------------------------------------------


def frozen_members(subject: Subject, case: dict) -> None:
    """Check the frozen members of a few groups, in their order."""
    spec = spec_of(case)
    if spec.D >= 2**31 and not has_int64(subject.xp):
        with raises(f"members of {text_of(spec)}", SpecError, f"members: D = {spec.D} has positions past 2^31"):
            subject.members(spec, 0, 1)
        return
    for start, expected in case["members"].items():
        offsets, positions = map(subject.numpy, subject.members(spec, int(start), int(start) + len(expected)))
        what = f"members of the groups from {start} on of {text_of(spec)}"
        same(f"{what}: offsets", offsets, np.cumsum([0, *map(len, expected)]))
        same(f"{what}: positions", positions, np.array([i for group in expected for i in group]))


def members_anywhere(subject: Subject, name: str) -> None:
    """Check any slice of any spec with D up to 400, against the reference position by position."""

    @settings(drawn, max_examples=20)
    @given(problem=problems(400), where=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def check(problem, where):
        D, d, seed = problem
        spec = flat(D, d, seed=seed, grouping=name)
        start, stop = sorted(int(part * d) for part in where)
        order = (lambda i: image(D, d, seed, i)) if name == "balanced" else int
        groups = [GROUPS[name](D, d, seed, i) for i in range(D)]
        ordered = sorted(range(D), key=order)
        found = [[i for i in ordered if groups[i] == j] for j in range(start, stop)]
        offsets, positions = map(subject.numpy, subject.members(spec, start, stop))
        what = f"members({start}, {stop}) of {text_of(spec)}"
        same(f"{what}: offsets", offsets, np.cumsum([0, *map(len, found)]))
        same(f"{what}: positions", positions, np.array([i for group in found for i in group], np.int64))

    check()


def members_are_a_stable_sort(subject: Subject, name: str) -> None:
    """Check all members, up to their order in a group; int32."""
    for D, d in ((411, 64), (1000, 1), (1000, 999), (1000, 1000), (2**15 + 7, 3)):
        spec = flat(D, d, seed=5, grouping=name)
        offsets, positions = subject.members(spec, 0, d)
        what = f"members of {text_of(spec)}"
        for array in (offsets, positions):
            subject.expect_dtype(what, array, "int32")
            subject.expect_device(what, array)
        groups, ends = spec.groups(), subject.numpy(offsets)
        same(f"{what}: offsets", ends, np.cumsum([0, *np.bincount(groups, minlength=d)]))
        parts = np.split(subject.numpy(positions), ends[1:-1])
        same(f"{what}: positions", np.concatenate([*map(np.sort, parts)]), np.argsort(groups, kind="stable"))


def members_outside_are_refused(subject: Subject) -> None:
    """Check that a slice outside raises `SpecError`, with the text of the core."""
    for start, stop in ((-1, 3), (0, 4), (3, 2)):
        text = f"members: expected 0 ≤ start ≤ stop ≤ d = 3, got start = {start}, stop = {stop}."
        with raises(f"members({start}, {stop}) with d = 3", SpecError, text):
            subject.members(flat(10, 3), start, stop)
