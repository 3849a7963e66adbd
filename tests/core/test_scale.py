"""Sizes that no table fits: what is planned, and what a slice takes, does not grow with D."""

import tracemalloc

import numpy as np
import pytest

from unilora_core import project
from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec

SLICE = 2**16


def most(run):
    """What came back, and the most bytes that were held on the way."""
    tracemalloc.start()
    try:
        return run(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def taken(spec, at):
    """The most bytes for a slice of θ_D that begins at a part of it, and for the members of as many numbers."""
    table, start = spec.init() * spec.scale(), int(at * (spec.D - SLICE))
    columns = SLICE * spec.d // spec.D
    first = int(at * (spec.d - columns))
    numbers, held = most(lambda: table[spec.groups(start, start + SLICE)])
    (_, positions), listed = most(lambda: spec.members(first, first + columns))
    assert numbers.shape == (SLICE,)
    assert (spec.groups(positions[0], positions[0] + 1) == first).all()
    return held, listed


@pytest.mark.parametrize("at", [0, 0.37, 1])
def test_a_slice_takes_the_memory_of_a_slice(spec_of, at):
    """At most 36 bytes for each number, whatever D; a table of D = 10^10 would be 40 GB."""
    found = {D: taken(spec_of(D, 2**18), at) for D in (10**7, 10**8, 10**10)}
    for held, listed in found.values():
        assert held <= 36 * SLICE
        assert listed <= 64 * SLICE
    (least, _), *_, (largest, _) = found.values()
    assert largest <= 1.2 * least


def test_slices_are_what_project_gives(spec_of):
    spec = spec_of(100_003, 1000)
    theta_d = spec.init() + np.float32(0.5)
    table = theta_d * spec.scale()
    parts = [table[spec.groups(at, min(at + 9973, spec.D))] for at in range(0, spec.D, 9973)]
    assert (np.concatenate(parts) == project(spec, theta_d)).all()


def llama(width, inner, blocks):
    """Names and sizes of all linear layers, as Llama-3.1 has them."""
    sides = {"q": (width, width), "k": (width, 1024), "v": (width, 1024), "o": (width, width)}
    sides |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    return [(f"layers.{block}.{name}", Sizes(*each)) for block in range(blocks) for name, each in sides.items()]


def test_a_model_of_405_billion_parameters_is_planned_in_little_memory():
    targets = llama(16384, 53248, 126)
    spec, held = most(lambda: plan_spec(targets, rank=16))
    assert (spec.D, spec.d) == (623_443_968, 9_741_312)
    assert held < 4e6
