"""The frozen answers in ``tests/vectors``, in every namespace, eager and compiled: the same integers, the same bits."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unilora_core import ProjectionSpec, project, read_adapter
from unilora_core import grouping as impl
from unilora_core._namespace import standard

FOLDER = Path(__file__).parents[1] / "vectors"
CASES = [case for name in impl.ALGORITHMS for case in json.loads((FOLDER / f"{name}.json").read_text())]


def name_of(case):
    return "{grouping}-{d}-{seed}".format(**case["spec"])


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).astype(np.asarray(array).dtype.newbyteorder("<"))).hexdigest()


def hexadecimal(values):
    return np.asarray(values).astype("<f4").tobytes().hex()


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def case(request):
    """Each frozen spec: a few slices of its groups are known."""
    return request.param


def spec_of(case):
    return ProjectionSpec.from_json(case["spec"])


def wholes(smallest, largest):
    """Parametrise over the frozen specs of which everything is known."""
    known = [case for case in CASES if "groups_sha256" in case and smallest <= spec_of(case).D <= largest]
    return pytest.mark.parametrize("whole", known, ids=name_of)


def test_slices_of_groups_are_the_frozen_ones(case, xp):
    for start, expected in case["groups"].items():
        groups = spec_of(case).groups(int(start), int(start) + len(expected), xp=xp)
        assert np.asarray(groups).tolist() == expected


@wholes(30000, 2 * 10**6)
def test_all_groups_are_the_frozen_ones(whole, xp):
    assert sha256(spec_of(whole).groups(xp=xp)) == whole["groups_sha256"]


@wholes(1, 10**7)
def test_counts_are_the_frozen_ones(whole):
    counts = spec_of(whole).counts()
    assert sha256(counts) == whole["counts"]["sha256"]
    assert [counts.min(), counts.max()] == [whole["counts"]["min"], whole["counts"]["max"]]


@wholes(1, 10**5)
def test_theta_d_starts_with_the_frozen_bits(whole, xp):
    theta_d = np.asarray(spec_of(whole).init(xp=xp))
    assert hexadecimal(theta_d[:3]) == whole["theta_d"]["first"]
    assert sha256(theta_d) == whole["theta_d"]["sha256"]


@wholes(1, 10**5)
def test_theta_D_has_the_frozen_bits(whole, namespace):
    spec = spec_of(whole)
    theta_D = np.asarray(project(spec, namespace.asarray(spec.init()[::-1])))
    assert hexadecimal(theta_D[-3:]) == whole["theta_D_of_reversed_theta_d"]["last"]
    assert sha256(theta_D) == whole["theta_D_of_reversed_theta_d"]["sha256"]


@wholes(10**6, 10**7)
def test_large_vectors_are_the_frozen_ones_in_numpy(whole):
    spec = spec_of(whole)
    assert sha256(spec.groups()) == whole["groups_sha256"]
    assert sha256(project(spec, spec.init()[::-1])) == whole["theta_D_of_reversed_theta_d"]["sha256"]


# ---- compiled: a function of the positions, traced once per segment ----


def kernel(spec, segment, xp):
    """p → g of position p of a segment: (n,) int32 to (n,) int32, what a backend compiles."""
    problem, xp = impl.Problem(spec.D, spec.d, spec.seed), standard(xp)
    return impl.ALGORITHMS[spec.grouping].kernel(problem, segment, xp, None)


def frozen_positions(case):
    """(segment, positions, groups): each frozen slice, cut where a segment ends."""
    spec = spec_of(case)
    length = impl.ALGORITHMS[spec.grouping].segment(impl.Problem(spec.D, spec.d, spec.seed))
    for start, expected in case["groups"].items():
        for segment, offset, n in impl._pieces(int(start), int(start) + len(expected), length, length):
            first = segment * length + offset - int(start)
            positions = (offset + np.arange(n)).astype(np.int32)
            yield segment, positions, expected[first : first + n]


COMPILED = [case for case in CASES if case["spec"]["grouping"] != "numpy-shuffle"]
TRACED = [case for case in COMPILED if case["spec"]["seed"] in (2**64 - 1, 42, 13, 16, 17, 19)]
"""Twelve: tracing and compiling take a second each."""


@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_the_kernel_gives_the_frozen_groups(case):
    for segment, positions, expected in frozen_positions(case):
        assert kernel(spec_of(case), segment, np)(positions).tolist() == expected


@pytest.mark.parametrize("case", TRACED, ids=name_of)
def test_jax_jit_gives_the_frozen_groups(jax, case):
    *_, (segment, positions, expected) = frozen_positions(case)
    assert jax.jit(kernel(spec_of(case), segment, jax.numpy))(positions).tolist() == expected


@pytest.mark.parametrize("case", TRACED, ids=name_of)
def test_torch_compile_gives_the_frozen_groups(torch, case):
    torch.compiler.reset()
    *_, (segment, positions, expected) = frozen_positions(case)
    compiled = torch.compile(kernel(spec_of(case), segment, torch), fullgraph=True, backend="eager")
    assert compiled(torch.asarray(positions)).tolist() == expected


LARGEST = [case for case in COMPILED if case["spec"]["seed"] == 10]


@pytest.mark.parametrize("case", LARGEST, ids=name_of)
def test_jax_jit_gives_ten_million_frozen_groups(jax, case):
    """Also under JAX's strict promotion: no dtype is left to a guess."""
    spec = spec_of(case)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        groups = jax.jit(kernel(spec, 0, jax.numpy))(jax.numpy.arange(spec.D, dtype="int32"))
    assert sha256(np.asarray(groups)) == case["groups_sha256"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_torch_inductor_wraps_shifts_and_divides_as_numpy(torch):
    """The steps of both kernels, not the whole: it takes inductor minutes to compile eight or twenty rounds."""
    torch.compiler.reset()
    rounds = impl.Permutation(10**7, 3163, 3163, keys=(-123456789,))

    def steps(p, xp):
        word = impl._lowbias32(p)
        return rounds.network(p), word, impl._times_shifted(word, p, 2**31 - 1, xp)

    p = np.random.default_rng(0).integers(0, 10**7, 1003).astype(np.int32)  # 1003: a tail after the vectorised part
    namespace = standard(torch)
    compiled = torch.compile(lambda p: steps(p, namespace), fullgraph=True, backend="inductor")
    for ours, theirs in zip(steps(p, np), compiled(torch.asarray(p)), strict=True):
        assert theirs.numpy().dtype == np.int32
        assert (theirs.numpy() == ours).all()


def test_jax_jit_of_project_has_the_frozen_bits(jax):
    case = next(case for case in CASES if name_of(case) == "balanced-2304-42")
    spec = spec_of(case)
    theta_D = jax.jit(lambda theta_d: project(spec, theta_d))(spec.init()[::-1])
    assert sha256(np.asarray(theta_D)) == case["theta_D_of_reversed_theta_d"]["sha256"]


def test_the_frozen_file_still_reads(tmp_path):
    known = json.loads((FOLDER / "adapter.json").read_text())
    (tmp_path / "a").write_bytes(base64.b64decode(known["file"]))
    file = read_adapter(tmp_path / "a")
    assert file.spec == spec_of(known)
    assert hexadecimal(project(file.spec, file.theta_d)) == known["theta_D"]
    assert file.tensors["head"].tolist() == known["head"]
    assert file.tensors["scale"].shape == ()
    assert file.tensors["scale"] == known["scale"]
    assert file.metadata == {"note": known["note"]}


def test_the_vectors_cannot_be_overwritten():
    before = {path: path.read_bytes() for path in FOLDER.glob("*.json")}
    done = subprocess.run([sys.executable, FOLDER / "make.py"], capture_output=True, text=True, check=False)
    assert "FileExistsError" in done.stderr
    assert before == {path: path.read_bytes() for path in FOLDER.glob("*.json")}
    assert sorted(path.stem for path in before) == ["adapter", "balanced", "iid", "numpy-shuffle"]
