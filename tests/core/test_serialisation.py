"""The adapter file: what goes in comes out, and what is damaged is named."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save

from unilora_core import (
    CorruptFileError,
    Layout,
    MismatchError,
    ProjectionSpec,
    UniLoraError,
    UnknownVersionError,
    ValuesError,
    load_adapter,
    project,
    read_adapter,
    save_adapter,
    serialisation,
)

SPEC = ProjectionSpec(Layout([("q.A", (2, 3)), ("q.B", (4, 2))]), d=4, seed=9)
NAMED = (CorruptFileError, UnknownVersionError, MismatchError)


@pytest.fixture
def path(tmp_path):
    """A whole adapter file, the only one in its folder."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, SPEC, SPEC.init(), tensors={"head": np.eye(2, dtype=np.float32)}, metadata={"base": "vit"})
    return path


def assert_whole(path):
    """The file of the fixture, and nothing beside it."""
    spec, theta_d = load_adapter(path)
    assert spec == SPEC
    assert (theta_d == SPEC.init()).all()
    assert os.listdir(path.parent) == [path.name]


def header_of(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def write(path, header, tensors, *, seal=True):
    """A file made by hand; ``seal``: with the checksum that belongs to it."""
    if seal:
        header = {name: text for name, text in header.items() if name != "checksum"}
        header["checksum"] = serialisation._checksum(tensors, header)
    path.write_bytes(save(tensors, metadata=header))


def rewrite(path, tensors=None, **header):
    """The file with another header or other tensors, sealed."""
    write(path, header_of(path) | header, load_file(path) if tensors is None else tensors)


def rewrite_spec(path, **fields):
    rewrite(path, spec=json.dumps(json.loads(header_of(path)["spec"]) | fields))


# ---- round trips ----


def test_the_spec_and_theta_d_come_back(path):
    assert_whole(path)


def test_extra_tensors_and_metadata_come_back(path):
    file = read_adapter(path)
    assert file.metadata == {"base": "vit"}
    assert list(file.tensors) == ["head"]
    assert (file.tensors["head"] == np.eye(2)).all()


def test_a_file_that_was_read_prints_in_a_line(path):
    tensors = {f"head.{i}": np.zeros(1000, np.float32) for i in range(500)}
    save_adapter(path, SPEC, SPEC.init(), tensors=tensors, metadata={"targets": "long" * 10**5})
    text = repr(read_adapter(path))
    assert text.startswith(f"AdapterFile(spec={SPEC!r}, tensors=['head.0', 'head.1', ")
    assert text.endswith(", ...], metadata=['targets'])")
    assert len(text) <= 600


def test_theta_d_of_any_namespace_is_saved(namespace, tmp_path):
    save_adapter(tmp_path / "a", SPEC, namespace.asarray(SPEC.init()))
    assert (load_adapter(tmp_path / "a")[1] == SPEC.init()).all()


@given(
    theta_d=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    seed=st.integers(0, 2**64 - 1),
    names=st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=1, max_size=4),
    metadata=st.dictionaries(st.text("äb\n\"'", min_size=1), st.text("äb\n\"'"), max_size=3),
)
def test_any_adapter_comes_back(tmp_path_factory, theta_d, seed, names, metadata):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    spec = ProjectionSpec(Layout([(name, (len(theta_d),)) for name in names]), len(theta_d), seed)
    save_adapter(path, spec, theta_d, metadata=metadata)
    file = read_adapter(path)
    assert file.spec == spec
    assert (file.theta_d == np.float32(theta_d)).all()
    assert file.metadata == metadata


TENSORS = {
    "a scalar": np.array(3),
    "empty": np.zeros((0, 3)),
    "in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "a view": np.arange(10)[::-3],
    "big-endian": np.arange(3, dtype=">f4"),
    "bool": np.array([True, False]),
    "float16": np.float16([1, 2]),
    "int64": np.array([2**62]),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_extra_tensors_keep_shape_and_values(tmp_path, tensor):
    save_adapter(tmp_path / "a", SPEC, SPEC.init(), tensors={"x": tensor})
    back = read_adapter(tmp_path / "a").tensors["x"]
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype.newbyteorder("=")
    assert (back == tensor).all()


ALIKE = """
import sys
import numpy as np
from unilora_core import Layout, ProjectionSpec, save_adapter
spec = ProjectionSpec(Layout([("m.A", (4, 5))]), d=3, seed=1)
names = {name: f"ein {name}: ä" for name in ("task", "base_model", "labels", "targets", "written_by", "zebra")}
tensors = {"head.weight": np.eye(3), "head.bias": np.ones(3)}
save_adapter(sys.argv[1], spec, spec.init(), tensors=tensors, metadata=names)
"""


def test_equal_adapters_are_equal_files_in_every_process(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        subprocess.run([sys.executable, "-c", ALIKE, str(path)], check=True)
    assert len({path.read_bytes() for path in paths}) == 1
    assert read_adapter(paths[0]).metadata["zebra"] == "ein zebra: ä"


def test_bfloat16_without_ml_dtypes_says_so(tmp_path):
    """As PyTorch would write a head; the header is made by hand, because NumPy cannot."""
    header = {
        "__metadata__": {"format": "unilora"},
        "head": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0\0\0")
    code = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "from unilora_core import AdapterFileError, CorruptFileError, read_adapter\n"
        "try: read_adapter(sys.argv[1])\n"
        "except AdapterFileError as error: print(type(error) is AdapterFileError, error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], capture_output=True, text=True)
    assert run.stdout.startswith("True"), run.stderr
    assert "a.safetensors: it holds tensors in bfloat16, which NumPy lacks; pip install ml_dtypes" in run.stdout


def test_the_file_has_the_mode_of_any_other_file(path):
    other = path.parent / "other"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_saving_makes_the_folder_and_replaces_the_file(path):
    save_adapter(path, SPEC, np.ones(4))
    assert (load_adapter(path)[1] == 1).all()
    save_adapter(path.parent / "new" / "folder" / "a.safetensors", SPEC, np.ones(4))
    assert (load_adapter(path.parent / "new" / "folder" / "a.safetensors")[1] == 1).all()


# ---- what cannot be saved: the old file stays ----


@pytest.mark.parametrize(
    ("theta_d", "message"),
    [
        ([0, np.nan, 0, np.inf], "2 of the 4 values of theta_d are NaN or infinite; training diverged"),
        ([0, 1e39, 0, 0], "1 of the 4 values of theta_d are NaN or infinite"),
        (np.zeros(3), r"expected theta_d \(4,\) float32, got \(3,\) float32"),
        (np.zeros((4, 1)), r"expected theta_d \(4,\) float32, got \(4, 1\)"),
        (1.0, r"expected theta_d \(4,\) float32, got \(\)"),
    ],
)
def test_values_that_do_not_fit_are_refused(path, theta_d, message):
    with pytest.raises(ValuesError, match=message):
        save_adapter(path, SPEC, theta_d)
    assert_whole(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"tensors": {"theta_d": np.zeros(4)}},
        {"tensors": {"__metadata__": np.zeros(4)}},
        {"metadata": {"checksum": ""}},
        {"metadata": {"spec": ""}},
        {"metadata": {"format": ""}},
        {"metadata": {"format_version": ""}},
        {"metadata": {"fingerprint": ""}},
    ],
    ids=str,
)
def test_names_that_are_taken_are_refused(path, extra):
    with pytest.raises(ValuesError, match="are taken"):
        save_adapter(path, SPEC, SPEC.init(), **extra)
    assert_whole(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"tensors": {"x": np.array(["text"])}},
        {"tensors": {"x": np.array([1j])}},
        {"tensors": {"\ud800": np.zeros(1)}},
        {"metadata": {"rank": 4}},
        {"metadata": {4: "rank"}},
        {"metadata": {"x": "\ud800"}},
    ],
    ids=ascii,
)
def test_extras_that_cannot_be_stored_are_refused(path, extra):
    with pytest.raises(ValuesError, match=r"adapter\.safetensors: .*cannot be stored"):
        save_adapter(path, SPEC, SPEC.init(), **extra)
    assert_whole(path)


# ---- a save that is interrupted: the old file stays ----


def test_a_whole_file_that_finds_no_place_is_kept_beside_it(path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"No space left on device; what was written is kept in .*unilora-unplaced-"):
            save_adapter(path, SPEC, np.ones(4))
    kept = next(path.parent.glob("unilora-unplaced-*/*"))
    assert np.array_equal(load_adapter(kept)[1], np.ones(4))
    shutil.rmtree(kept.parent)
    assert_whole(path)


@pytest.mark.parametrize("step", ["fsync", "mkdir"])
def test_a_failing_system_call_leaves_the_old_file_and_nothing_else(path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, step) if step == "fsync" else (Path, step)), fail)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(path, SPEC, np.ones(4))
    assert_whole(path)


def test_an_interrupt_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(path, SPEC, np.ones(4))
    assert_whole(path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_process_leaves_the_old_file(path, step):
    program = f"""
        import os, signal, sys
        import numpy as np
        from unilora_core import load_adapter, save_adapter
        spec, _ = load_adapter(sys.argv[1])
        os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_adapter(sys.argv[1], spec, np.ones(4))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (load_adapter(path)[1] == SPEC.init()).all()
    save_adapter(path, SPEC, np.ones(4))  # what the dead process left behind is in nobody's way
    assert (load_adapter(path)[1] == 1).all()


# ---- damage ----


def test_a_missing_file_is_named(tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such adapter file"):
            load_adapter(place)


def test_a_truncated_file_is_named(path):
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            CorruptFileError, match=r"adapter\.safetensors: not a whole safetensors file .*fetch it again"
        ):
            load_adapter(path)


def test_a_longer_file_is_named(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        load_adapter(path)


def test_every_flipped_byte_is_named(path):
    """Each byte of the file, header and data, in each of its bits and in all of them at once."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(NAMED, match=r"adapter\.safetensors: "):
                load_adapter(path)


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_byte_is_noticed_or_changes_nothing(tmp_path_factory, place, byte):
    path = tmp_path_factory.mktemp("byte") / "a.safetensors"
    save_adapter(path, SPEC, SPEC.init(), metadata={"base": "vit"})
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] = byte
    path.write_bytes(damaged)
    with contextlib.suppress(*NAMED):
        file = read_adapter(path)
        assert file.spec == SPEC
        assert (file.theta_d == SPEC.init()).all()
        assert file.metadata == {"base": "vit"}


def header_bytes(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        b"PK\x03\x04 a zip file, say, of some length",
        header_bytes(b"[]"),
        header_bytes(b"null"),
        header_bytes(b"[" * 10**5),
        header_bytes(b'{"__metadata__":{"format":1}}'),
        header_bytes(b'{"__metadata__":{"format":"\xff"}}'),
        header_bytes(b'{"x":{"dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,0]}}'),
        header_bytes(b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        header_bytes(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4),
        header_bytes(b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        header_bytes(b'{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4),
    ],
    ids=lambda content: ascii(content[:30]),
)
def test_what_is_no_safetensors_file_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        load_adapter(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_plain_safetensors_file_is_named(path, metadata):
    path.write_bytes(save({"theta_d": SPEC.init()}, metadata=metadata))
    with pytest.raises(CorruptFileError, match="a safetensors file, but not a unilora adapter"):
        load_adapter(path)


def test_an_unsealed_change_is_named(path):
    header = header_of(path)
    write(path, header | {"base": "another"}, load_file(path), seal=False)
    with pytest.raises(CorruptFileError, match="do not match the checksum; the file is damaged"):
        load_adapter(path)
    del header["checksum"]
    write(path, header, load_file(path), seal=False)
    with pytest.raises(CorruptFileError, match="do not match the checksum"):
        load_adapter(path)


def test_a_changed_head_is_named(path):
    tensors = load_file(path)
    for change in ({"head": tensors["head"].T + 1}, {"head": tensors["head"].reshape(4)}, {"top": tensors["head"]}):
        write(path, header_of(path), {"theta_d": tensors["theta_d"], **change}, seal=False)
        with pytest.raises(CorruptFileError, match="do not match the checksum"):
            load_adapter(path)


# ---- files from another world, whole and sealed ----


@pytest.mark.parametrize("version", ["2", "0", "", "1.0", " 1"])
def test_an_unknown_format_version_is_named(path, version):
    rewrite(path, format_version=version)
    with pytest.raises(UnknownVersionError, match=f"expected format version 1, got {version!r}; a newer unilora"):
        load_adapter(path)


@pytest.mark.parametrize("fields", [{"grouping": "sorted"}, {"grouping_version": 3}, {"start": "warm"}], ids=str)
def test_an_unknown_algorithm_is_named(path, fields):
    rewrite_spec(path, **fields)
    with pytest.raises(UnknownVersionError, match=r"adapter\.safetensors: .* is not known here .*a newer unilora"):
        load_adapter(path)


@pytest.mark.parametrize(
    "layout",
    [
        [["q.B", [4, 2]], ["q.A", [2, 3]]],
        [["q.A", [3, 2]], ["q.B", [4, 2]]],
        [["k.A", [2, 3]], ["q.B", [4, 2]]],
        [["q.A", [2, 3]], ["q.B", [4, 3]]],
    ],
    ids=str,
)
def test_permuted_renamed_or_reshaped_factors_are_named(path, layout):
    rewrite_spec(path, layout=layout)
    with pytest.raises(MismatchError, match=r"fingerprint is .{12}…, the file says .*renamed, reshaped or permuted"):
        load_adapter(path)


def test_a_missing_fingerprint_is_named(path):
    header = header_of(path)
    del header["fingerprint"]
    write(path, header, load_file(path))
    with pytest.raises(MismatchError, match="the file says None"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("theta_d", "message"),
    [
        (np.float32([0, np.nan, 0, 0]), r"adapter\.safetensors: 1 of the 4 values of theta_d are NaN or infinite"),
        (np.float32([0, np.inf, -np.inf, 0]), "2 of the 4 values"),
        (np.zeros(3, np.float32), r"expected theta_d \(4,\) float32, got \(3,\) float32"),
        (np.zeros((2, 2), np.float32), r"expected theta_d \(4,\) float32, got \(2, 2\) float32"),
        (np.zeros(4, np.float64), r"expected theta_d \(4,\) float32, got \(4,\) float64"),
        (np.zeros(4, np.float16), r"got \(4,\) float16"),
        (np.zeros(4, np.int32), r"got \(4,\) int32"),
    ],
)
def test_a_theta_d_that_does_not_fit_is_named(path, theta_d, message):
    rewrite(path, tensors={"theta_d": theta_d})
    with pytest.raises(ValuesError, match=message):
        load_adapter(path)


def test_a_missing_theta_d_is_named(path):
    rewrite(path, tensors={"head": np.eye(2)})
    with pytest.raises(CorruptFileError, match="there is no tensor 'theta_d' in it"):
        load_adapter(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"d": 0},
        {"d": -4},
        {"d": "4"},
        {"d": 4.0},
        {"d": None},
        {"d": 10**30},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "9"},
        {"bound": 0},
        {"bound": "0.02"},
        {"bound": 10**400},
        {"bound": float("nan")},
        {"layout": []},
        {"layout": {}},
        {"layout": [["q.A", []]]},
        {"layout": [["q.A", [10**30]]]},
        {"layout": [["q.A", [10**4000, 10**4000]]]},
        {"layout": [["q.A", [-2, -7]]]},
        {"layout": [["q.A", ["14"]]]},
        {"layout": [["q.A", "14"]]},
        {"layout": [["q.A", [14]], ["q.A", [1]]]},
        {"layout": [[3, [14]]]},
        {"extra": 1},
    ],
    ids=lambda fields: ascii(fields)[:40],
)
def test_a_hostile_spec_is_named(path, fields):
    rewrite_spec(path, **fields)
    with pytest.raises(CorruptFileError, match=r"adapter\.safetensors: the header's spec cannot be read: "):
        load_adapter(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"spec"', "[" * 10**5, '{"a":' * 10**5, "9" * 5000, "\0", "NaN"],
    ids=lambda text: ascii(text[:9]),
)
def test_hostile_json_is_named(path, text):
    rewrite(path, spec=text)
    with pytest.raises(CorruptFileError, match="the header's spec cannot be read"):
        load_adapter(path)


def test_a_deeply_nested_field_is_named(path):
    for field in ("layout", "d", "seed", "bound", "start", "grouping"):
        nested = json.dumps(dict(SPEC.to_json(), **{field: "HERE"})).replace('"HERE"', "[" * 900 + "]" * 900)
        rewrite(path, spec=nested)
        with pytest.raises((CorruptFileError, UnknownVersionError), match=r"adapter\.safetensors: "):
            load_adapter(path)


def test_a_huge_d_without_values_costs_no_memory(path):
    rewrite_spec(path, d=14)
    with pytest.raises(ValuesError, match=r"expected theta_d \(14,\) float32, got \(4,\) float32"):
        load_adapter(path)


def test_every_error_of_a_file_is_one_of_ours(path):
    rewrite_spec(path, d=0)
    with pytest.raises(UniLoraError):
        load_adapter(path)


def test_a_theta_whose_distance_from_the_start_is_infinite(path):
    spec = ProjectionSpec(Layout([("q.A", (2, 3)), ("q.B", (4, 2))]), 4, start="identity", bound=3e38)
    save_adapter(path, spec, np.full(4, 4e37))
    with pytest.raises(ValuesError, match=r"theta_d - theta_d⁰ is infinite in float32"):
        save_adapter(path, spec, np.full(4, 3e38))
    save_adapter(path, ProjectionSpec(spec.layout, 4, bound=3e38), np.full(4, 3e38))


@pytest.mark.parametrize("grouping", ["fastfood", "gaussian"])
def test_a_theta_whose_sums_would_be_infinite_is_refused(tmp_path, grouping):
    spec = ProjectionSpec(Layout([("q.A", (2, 8)), ("q.B", (8, 2))]), d=4, grouping=grouping)
    save_adapter(tmp_path / "a.safetensors", spec, np.full(4, 1e19, np.float32))
    spec, theta_d = load_adapter(tmp_path / "a.safetensors")
    assert np.isfinite(project(spec, theta_d)).all()
    with pytest.raises(
        ValuesError, match=f"theta_d holds 3e\\+38, whose sums under the grouping '{grouping}' float32 may"
    ):
        save_adapter(tmp_path / "b.safetensors", spec, np.full(4, 3e38, np.float32))
    assert not (tmp_path / "b.safetensors").exists()
