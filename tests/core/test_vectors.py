"""The frozen answers beyond the conformance suite: large vectors, JAX's strict mode, inductor, a whole file."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unilora_core import grouping as impl
from unilora_core import project, read_adapter
from unilora_core._namespace import standard
from unilora_core.grouping import ALGORITHMS
from unilora_core.testing.compare import sha256
from unilora_core.testing.compiled import frozen_positions, kernel
from unilora_core.testing.frozen import FILES, FOLDER, hexadecimal, name_of, spec_of, vectors, wholes

MAKE = Path(__file__).parents[1] / "vectors" / "make.py"
COMPILED = [case for case in vectors((*ALGORITHMS, "resized")) if case["spec"]["grouping"] != "numpy-shuffle"]


@pytest.mark.parametrize("whole", wholes(1, 10**7, vectors(FILES)), ids=name_of)
def test_counts_are_the_frozen_ones(whole):
    counts = spec_of(whole).counts()
    assert sha256(counts) == whole["counts"]["sha256"]
    assert [counts.min(), counts.max()] == [whole["counts"]["min"], whole["counts"]["max"]]


@pytest.mark.parametrize("whole", wholes(10**6, 10**7), ids=name_of)
def test_large_vectors_are_the_frozen_ones_in_numpy(whole):
    spec = spec_of(whole)
    assert sha256(spec.groups()) == whole["groups_sha256"]
    assert sha256(project(spec, spec.init()[::-1])) == whole["theta_D_of_reversed_theta_d"]["sha256"]


# ---- the kernels: functions of the positions, what a backend may compile ----


@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_the_kernel_gives_the_frozen_groups(case):
    for segment, positions, expected in frozen_positions(case):
        assert kernel(spec_of(case), segment, np)(positions).tolist() == expected


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


def test_the_frozen_file_still_reads(tmp_path):
    known = json.loads((FOLDER / "adapter.json").read_text("utf-8"))
    (tmp_path / "a").write_bytes(base64.b64decode(known["file"]))
    file = read_adapter(tmp_path / "a")
    assert file.spec == spec_of(known)
    assert hexadecimal(project(file.spec, file.theta_d)) == known["theta_D"]
    assert file.tensors["head"].tolist() == known["head"]
    assert file.tensors["scale"].shape == ()
    assert file.tensors["scale"] == known["scale"]
    assert file.metadata == {"note": known["note"]}


def test_the_vectors_cannot_be_overwritten():
    folder = MAKE.parents[2] / "unilora_core" / "testing" / "vectors"
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    done = subprocess.run([sys.executable, MAKE], capture_output=True, text=True, check=False)
    assert "FileExistsError" in done.stderr
    assert before == {path: path.read_bytes() for path in folder.glob("*.json")}
    assert {path.stem for path in before} == {*FILES, "adapter", "members", "methods"}
    assert before == {folder / path.name: path.read_bytes() for path in FOLDER.iterdir()}, "shipped as they are here"
