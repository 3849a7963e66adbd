"""`unilora combine`."""

import numpy as np
import pytest

from unilora_core import Layout, ProjectionSpec, combine, read_adapter, save_adapter

SPEC = ProjectionSpec(Layout([("a.A", (2, 8)), ("a.B", (6, 2))]), d=12, seed=7, start="identity", bound=0.3)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        theta_d = SPEC.init() + rng.standard_normal(12).astype(np.float32)
        save_adapter(tmp_path / f"{name}.safetensors", SPEC, theta_d, metadata={"base_model": "tiny"})
    return [tmp_path / f"{name}.safetensors" for name in "ab"]


@pytest.mark.parametrize(
    ("weights", "said"), [((), "0.5 · {a} + 0.5 · {b};"), ((1, -0.5), "1 · {a} + -0.5 · {b} + 0.5 · θ_d⁰;")]
)
def test_a_combination_is_a_file_like_its_parts(unilora, files, tmp_path, weights, said):
    out = tmp_path / "out.safetensors"
    result = unilora("combine", *files, *(["--weights", *weights] if weights else []), "--out", out)
    assert (result.code, result.err) == (0, "")
    assert said.format(a=files[0], b=files[1]) in result.out
    made = read_adapter(out)
    thetas = [read_adapter(path).theta_d for path in files]
    np.testing.assert_allclose(made.theta_d, combine(SPEC, thetas, weights or None), rtol=1e-5, atol=1e-6)
    assert (made.spec, made.metadata) == (SPEC, {"base_model": "tiny"})


def test_what_does_not_fit_writes_nothing(unilora, files, tmp_path):
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    spec = ProjectionSpec(SPEC.layout, d=12, seed=8, start="identity", bound=0.3)
    save_adapter(other, spec, spec.init())
    for words, match in (
        ([files[0], other], "different specs: seed = 7 and 8; train both from one start"),
        ([files[0], files[0]], "is named twice; give it the sum of its weights"),
        ([*files, "--weights", "1"], "expected 2 finite weights, one for each adapter, got [1.0]"),
        ([files[0], tmp_path / "gone"], "no such adapter file"),
    ):
        result = unilora("combine", *words, "--out", out)
        assert result.code == 1
        assert match in result.err
        assert not out.exists()


def test_one_file_under_two_names_is_one(unilora, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.safetensors").symlink_to(files[0])
    for other in ("./a.safetensors", files[0], tmp_path / "sub" / ".." / "a.safetensors", "linked.safetensors"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        result = unilora("combine", "a.safetensors", other, "--out", "out.safetensors")
        said = f"unilora: error: {other} is named twice, before as a.safetensors; give it the sum of its weights.\n"
        assert (result.code, result.err) == (1, said)
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_no_file_takes_the_place_of_one_that_it_is_made_of(unilora, files, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.safetensors").symlink_to(files[1])
    before = [path.read_bytes() for path in files]
    for out in (files[1], "./b.safetensors", "linked.safetensors"):
        result = unilora("combine", *files, "--out", out, *words)
        said = f"unilora: error: {out}: this is one of the files to combine; choose another --out.\n"
        assert (result.code, result.err) == (1, said)
        assert [path.read_bytes() for path in files] == before


def test_a_file_that_is_there_stays_but_for_overwrite(unilora, files, tmp_path):
    out = tmp_path / "out.safetensors"
    assert unilora("combine", *files, "--out", out).code == 0
    before = out.read_bytes()
    result = unilora("combine", files[0], "--out", out)
    said = f"unilora: error: {out}: there is a file already; add --overwrite, or choose another --out.\n"
    assert (result.code, result.err) == (1, said)
    assert out.read_bytes() == before
    assert unilora("combine", files[0], "--out", out, "--overwrite").code == 0
    assert np.array_equal(read_adapter(out).theta_d, read_adapter(files[0]).theta_d)
