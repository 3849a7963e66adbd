"""Files appear whole or not at all: after kills, interrupts, full disks, beside other writers, wherever they lie."""

import contextlib
import errno
import functools
import gc
import itertools
import json
import linecache
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from unilora_core import files
from unilora_core.files import alone, new_files, new_folder, try_files, try_folder, write_file

WORKER = Path(__file__).with_name("files_worker.py")


def worker(*args):
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- writers that are killed, and writers beside each other ---------------------------------------------------------


def test_a_killed_writer_leaves_nothing_torn_and_the_next_one_tidies_up(tmp_path):
    with worker("kill", tmp_path, 60) as process:
        found = json.loads(process.communicate(timeout=120)[0])
    assert found["left"] > 6, "hardly a writer was killed in the middle: the test tests nothing"
    assert (found["torn"], found["left_after"], found["single_lost"]) == ([], 0, 0)


def test_a_living_writer_keeps_its_files(tmp_path):
    with worker("hold", tmp_path) as process:
        assert process.stdout.readline() == "writing\n"
        with new_files(tmp_path / "mine") as (new,):
            write_file(tmp_path / "other", b"1")
            new.write_bytes(b"2")
            assert len(files_of(tmp_path)) == 2
        assert names(tmp_path)[1:] == ["mine", "other"]
        process.communicate("go on\n", timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "held").read_bytes() == b"whole"
    assert names(tmp_path) == ["held", "mine", "other"]


def files_of(folder):
    """The temporary folders in this one."""
    return [path for path in Path(folder).iterdir() if path.name.startswith(".unilora-")]


def test_a_process_that_was_forked_meanwhile_holds_no_lock(tmp_path):
    with worker("fork", tmp_path) as process:
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert names(tmp_path) == ["a"]


def test_threads_that_write_and_read_the_same_files(tmp_path):
    def write(start):
        for number in range(start, 200, 3):
            with new_files(tmp_path / "weights", tmp_path / "config") as (weights, config):
                weights.write_bytes(bytes([number]) * 10_000)
                config.write_text(str(number))

    def read():
        while len(seen) < 200:
            with alone(tmp_path, shared=True):
                whole = (tmp_path / "config").exists()
                seen.append(
                    not whole or set((tmp_path / "weights").read_bytes()) == {int((tmp_path / "config").read_text())}
                )

    seen, switch = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [*(threading.Thread(target=write, args=(i,)) for i in range(3)), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert not any(thread.is_alive() for thread in threads)
    assert all(seen)
    assert names(tmp_path) == ["config", "weights"]


# ---- what is tidied and what is not ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no locks of folders, so that nothing is tidied")
def test_only_leftovers_are_tidied(tmp_path):
    left = tmp_path / ".unilora-0123456789abcdef"
    left.mkdir()
    (left / "big").write_bytes(b"1")
    others = [".unilora-cache", ".unilora-0123456789abcdeg", ".unilora-0123456789abcdef0", "unilora-0123456789abcdef"]
    for name in others:
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / ".unilora-0000000000000000")
    (tmp_path / ".unilora-1111111111111111").symlink_to(tmp_path / ".unilora-cache")
    write_file(tmp_path / "a", b"")
    assert set(names(tmp_path)) == {*others, "a", ".unilora-0000000000000000", ".unilora-1111111111111111"}


# ---- errors ---------------------------------------------------------------------------------------------------------


def old_pair(folder):
    for name in ("weights", "config"):
        (folder / name).write_bytes(b"old")
    return [folder / "weights", folder / "config"]


def assert_old(folder):
    assert {name: (folder / name).read_bytes() for name in names(folder)} == {"config": b"old", "weights": b"old"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_in_the_middle_leaves_the_old_files(tmp_path, error):
    def write_half(path):
        path.write_bytes(b"new")
        raise error

    with pytest.raises(error), new_files(*old_pair(tmp_path)) as (weights, _):
        write_half(weights)
    assert_old(tmp_path)
    with pytest.raises(error), new_folder(tmp_path / "folder", "a") as new:
        write_half(new / "a")
    assert_old(tmp_path)


def test_a_file_that_was_not_written_leaves_the_old_ones(tmp_path):
    pair = old_pair(tmp_path)
    with pytest.raises(FileNotFoundError) as caught, new_files(*pair) as (weights, _):
        weights.write_bytes(b"new")
    assert caught.value.filename == str(pair[1])
    assert_old(tmp_path)


def write_each(paths):
    for path in paths:
        path.write_bytes(b"new")


def test_a_folder_in_the_place_of_a_file_leaves_the_old_ones(tmp_path):
    pair = old_pair(tmp_path)
    (tmp_path / "shard").mkdir()
    with pytest.raises(IsADirectoryError, match="shard"), new_files(pair[0], tmp_path / "shard", pair[1]) as new:
        write_each(new)
    (tmp_path / "shard").rmdir()
    assert_old(tmp_path)


def fill(paths):
    paths[0].write_bytes(b"new")
    paths[-1].write_bytes(bytes(2_000_000))


def fill_safetensors(paths):
    paths[0].write_bytes(b"new")
    save_file({"x": np.zeros(500_000, np.float32)}, paths[-1])


FILLS = {"bytes": (fill, -1), "safetensors": (fill_safetensors, 0)}


@pytest.fixture
def limit(tmp_path):
    """The folder, where no file may be larger than a megabyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path):
    """A disk of a megabyte."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(("where", "number"), [("limit", errno.EFBIG), ("disk", errno.ENOSPC)])
@pytest.mark.parametrize("how", FILLS)
def test_a_full_disk_is_said_with_the_path(request, where, number, how):
    folder, (write, named) = request.getfixturevalue(where), FILLS[how]
    pair = old_pair(folder)
    with pytest.raises(OSError, match=os.strerror(number)) as caught, new_files(*pair) as new:
        write(new)
    assert (caught.value.errno, caught.value.filename) in {(number, str(pair[named])), (number, str(pair[0]))}
    assert_old(folder)


def test_a_read_only_folder_is_said_with_the_path():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with worker("nobody", folder) as process:
            found = process.communicate(timeout=60)[0]
        assert found.splitlines() == [str(Path(folder, "a"))] * 2
        assert names(folder) == []


def test_other_errors_of_the_system_are_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, new_files(tmp_path / "a"):
        (tmp_path / "no such" / "data").read_bytes()
    assert caught.value.filename == str(tmp_path / "no such" / "data")


# ---- interrupts -----------------------------------------------------------------------------------------------------


CLEANING = (
    "shutil.rmtree(path",
    "if handle is not None",
    "if held:",
    "fcntl.flock(handle, fcntl.LOCK_UN)",
    "os.close(h",
)
"""Lines that put things in order themselves: an interrupt that hits one of them leaves that undone."""


def interrupted_at(number, action):
    """The line before which the interrupt came; None where the action has fewer lines."""
    count, at = itertools.count(), None

    def trace(frame, event, _):
        nonlocal at
        if frame.f_code.co_filename not in (files.__file__, contextlib.__file__):
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not line.startswith(CLEANING) and next(count) == number:
                at = line
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    gc.collect()  # an exit stack that was interrupted is a circle
    return at


def new_pair(folder):
    with new_files(folder / "weights", folder / "config") as (weights, config):
        weights.write_bytes(b"new")
        config.write_bytes(b"newer")


def new_one(folder):
    with new_folder(folder / "folder", "a") as new:
        (new / "a").write_bytes(b"new")


def filled(folder):
    (folder / "folder").mkdir()
    with new_folder(folder / "folder", "a") as new:
        (new / "a").write_bytes(b"new")
        (new / "b").mkdir()
        (new / "b" / "c").write_bytes(b"first")


PAIRS = [(b"old", b"old"), (b"old", None), (b"new", None), (b"new", b"newer")]
FOLDERS = [(b"old", b"old", None), (b"old", b"old", b"new")]


@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO")  # opened, and interrupted before it is used
@pytest.mark.parametrize("action", [new_pair, new_one, filled])
def test_an_interrupt_at_any_line_leaves_nothing(tmp_path, action):
    gc.freeze()  # only what is new is worth collecting
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        old_pair(folder)
        at = interrupted_at(number, functools.partial(action, folder))
        found = [
            p.read_bytes() if p.exists() else None for p in (folder / n for n in ("weights", "config", "folder/a"))
        ]
        assert tuple(found[:2]) in PAIRS, at
        assert found[2] in (None, b"new"), at
        assert set(names(folder)) <= {"weights", "config", "folder"}, at
        if (folder / "folder").exists() and names(folder / "folder"):
            assert names(folder / "folder") == ["a", "b"][: 2 if action is filled else 1], at
        with files._lock(folder, wait=False) as held:
            assert held, at
        if at is None:
            break
    gc.unfreeze()
    assert number > 50
    assert (folder / "weights").read_bytes() == b"new" or (folder / "folder" / "a").exists()


# ---- where files lie ------------------------------------------------------------------------------------------------


class Place:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Place])
def test_a_path_of_any_kind(tmp_path, kind):
    write_file(kind(tmp_path / "new" / "a"), b"1")
    with new_files(kind(tmp_path / "b"), kind(tmp_path / "other" / "c")) as (b, c):
        b.write_bytes(b"2")
        c.write_bytes(b"3")
    with new_folder(kind(tmp_path / "folder" / "new"), "d") as new:
        (new / "d").write_bytes(b"4")
    found = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"new/a": b"1", "b": b"2", "other/c": b"3", "folder/new/d": b"4"}


@pytest.mark.parametrize("name", ["a", "./a", "../here/a"])
def test_a_file_in_the_current_folder(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_file(name, b"1")
    assert names(".") == ["a"]
    with new_folder(f"{name}b", "c") as new:
        (new / "c").write_bytes(b"2")
    assert names("ab") == ["c"]


def fill_folder(new):
    for name in ("config.json", "a", "deep/b", "z"):
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text(name)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in Path(folder).rglob("*") if p.is_file()}


FILLED = {name: name for name in ("config.json", "a", "deep/b", "z")}


@pytest.mark.parametrize("name", [".", "", "../here", "link"])
def test_the_current_folder_is_filled_and_stays_the_same(tmp_path, monkeypatch, name):
    """Whoever is in it would be in a folder that is no more."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    before = here.stat()
    with new_folder(tmp_path / "link" if name == "link" else name, "config.json") as new:
        fill_folder(new)
        monkeypatch.chdir(tmp_path)
    assert contents(here) == FILLED
    assert (here.stat().st_ino, here.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(here) == ["a", "config.json", "deep", "z"]
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_filled_and_another_refused(tmp_path):
    tmp_path.chmod(0o750)
    (tmp_path / "empty").mkdir(mode=0o700)
    inode = (tmp_path / "empty").stat().st_ino
    try_folder(tmp_path / "empty")
    with new_folder(tmp_path / "empty", "deep") as new:
        (new / "deep").mkdir()
        (new / "deep" / "a").write_bytes(b"1")
        assert names(tmp_path / "empty") == [path.name for path in files_of(tmp_path / "empty")]
    assert names(tmp_path / "empty" / "deep") == ["a"]
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    assert (tmp_path / "empty").stat().st_ino == inode
    for taken in (tmp_path / "empty", tmp_path / "empty" / "deep" / "a"):
        with (
            pytest.raises(FileExistsError, match=r"exists and is not an empty folder.*choose another"),
            new_folder(taken, "a"),
        ):
            pass
        with pytest.raises(FileExistsError, match="choose another"):
            try_folder(taken)
    assert names(tmp_path) == ["empty"]


@pytest.mark.parametrize("exists", [True, False], ids=["whole", "dangling"])
def test_a_symbolic_link_stays_one(tmp_path, exists):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(Path("there", "file"))
    if exists:
        (tmp_path / "there" / "file").write_bytes(b"old")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"
    assert (names(tmp_path), names(tmp_path / "there")) == (["link", "there"], ["file"])


@pytest.mark.parametrize("letter", ["a", "ä"])
def test_the_longest_name(tmp_path, letter):
    name = letter * (255 // len(letter.encode()))
    write_file(tmp_path / name, b"1")
    with new_folder(tmp_path / f"{name[:-1]}b", "a"):
        pass
    assert names(tmp_path) == sorted([name, f"{name[:-1]}b"])


def test_a_name_that_is_too_long_is_said(tmp_path):
    with pytest.raises(OSError, match="File name too long") as caught:
        write_file(tmp_path / ("a" * 256), b"")
    assert caught.value.filename == str(tmp_path / ("a" * 256))
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_other_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        (tmp_path / "folder").mkdir()
        write_file(tmp_path / "a", b"")
        with new_folder(tmp_path / "new", "a"):
            pass
    finally:
        os.umask(before)
    mode = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert (mode["a"], mode["new"]) == (mode["plain"], mode["folder"])


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_an_old_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(mode)
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


# ---- what a file system lacks ---------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """An empty folder that is a file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("holds", [(), ("lost+found", ".unilora-0123456789abcdef")])
def test_a_mounted_folder_is_filled(mounted, holds):
    for name in holds:
        (mounted / name).mkdir()
    try_folder(mounted)
    with new_folder(mounted, "config.json") as new:
        fill_folder(new)
    assert contents(mounted) == FILLED
    assert names(mounted.parent) == ["mounted"]
    assert set(names(mounted)) == {"a", "config.json", "deep", "z", *holds[:1]}


@pytest.fixture
def mounted_file(tmp_path):
    """A file that is mounted by itself, which cannot be renamed over."""
    for name in ("source", "file"):
        (tmp_path / name).write_bytes(b"old")
    if subprocess.run(["mount", "--bind", tmp_path / "source", tmp_path / "file"], capture_output=True).returncode:
        pytest.skip("this process may not mount a file")
    yield tmp_path / "file"
    subprocess.run(["umount", tmp_path / "file"], check=True)


def test_a_mounted_file_is_written_over(mounted_file):
    write_file(mounted_file, b"new")
    with new_files(mounted_file.with_name("weights"), mounted_file) as (weights, config):
        weights.write_bytes(b"1")
        config.write_bytes(b"newer")
    assert mounted_file.with_name("source").read_bytes() == b"newer"
    assert names(mounted_file.parent) == ["file", "source", "weights"]


LACKING = {
    "chmod": (["chmod", "fchmod"], errno.EPERM),
    "chmod of a bucket": (["chmod", "fchmod"], errno.ENOTSUP),
    "fsync": (["fsync"], errno.EINVAL),
    "links": (["link"], errno.EPERM),
    "renaming": (["replace", "rename"], errno.ENOSYS),
    "renaming to another device": (["replace", "rename"], errno.EXDEV),
    "all of it": (["chmod", "fchmod", "fsync", "link", "replace", "rename"], errno.ENOTSUP),
}


@pytest.fixture
def refuse(monkeypatch):
    """refuse(names, number): these functions of the operating system raise the error of this number."""

    def apply(functions, number, where=os):
        for name in functions:

            def refused(*args, **_):
                raise OSError(number, os.strerror(number), str(args[0]))

            monkeypatch.setattr(where, name, refused)

    return apply


@pytest.mark.parametrize(("functions", "number"), LACKING.values(), ids=LACKING)
def test_what_a_file_system_lacks_costs_no_file(tmp_path, refuse, functions, number):
    pair = old_pair(tmp_path)
    (tmp_path / "there").mkdir()
    refuse(functions, number)
    with new_files(*pair) as new:
        write_each(new)
    for name in ("there", "new"):
        with new_folder(tmp_path / name, "config.json") as new:
            fill_folder(new)
        assert contents(tmp_path / name) == FILLED
    assert [path.read_bytes() for path in pair] == [b"new", b"new"]
    assert names(tmp_path) == ["config", "new", "there", "weights"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_without_locks_files_are_written(tmp_path, refuse, number):
    fcntl = pytest.importorskip("fcntl", reason="locks are those of POSIX")
    refuse(["flock"], number, where=fcntl)
    write_file(tmp_path / "a", b"1")
    with new_folder(tmp_path / "b", "c") as new:
        (new / "c").write_bytes(b"1")
    assert names(tmp_path) == ["a", "b"]


def test_in_a_folder_that_cannot_be_listed():
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o711)
        inner = Path(outer, "unlisted")
        inner.mkdir()
        os.chown(inner, 65534, -1) if os.geteuid() == 0 else None
        inner.chmod(0o300)
        with worker("unlisted", inner) as process:
            assert process.communicate(timeout=60)[0].splitlines() == ["written", "listing"]
        inner.chmod(0o700)
        assert names(inner) == ["a"]


@pytest.mark.parametrize("there", [True, False], ids=["filled", "new"])
def test_what_cannot_take_its_place_is_kept_and_said(tmp_path, refuse, monkeypatch, there):
    """An error that nothing was known of before: a file that is open elsewhere, an unsteady connection."""
    pair = old_pair(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        refuse_with(patch, "replace", errno.EIO)
        with pytest.raises(OSError, match=r"kept in (.*unilora-unplaced-\w+)") as caught, new_files(*pair) as new:
            write_each(new)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(pair[0])
    (kept,) = tmp_path.glob("unilora-unplaced-*")
    assert contents(kept) == {"weights": "new", "config": "new"}
    assert str(kept) in str(caught.value)
    (tmp_path / "deep").mkdir()
    if there:
        (tmp_path / "deep/folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        refuse_with(patch, "replace", errno.EIO)
        with pytest.raises(OSError, match="kept in"), new_folder(tmp_path / "deep/folder", "config.json") as new:
            fill_folder(new)
    (kept,) = (tmp_path / "deep").rglob("unilora-unplaced-*")
    assert contents(kept / "folder") == FILLED


def refuse_with(patch, name, number):
    def refused(*args, **_):
        raise OSError(number, os.strerror(number), str(args[0]))

    patch.setattr(os, name, refused)


def test_a_folder_that_another_writer_filled_meanwhile_is_left_to_it(tmp_path):
    (tmp_path / "folder").mkdir()

    def fill_both():
        with new_folder(tmp_path / "folder", "config.json") as new:
            fill_folder(new)
            (tmp_path / "folder/other").write_bytes(b"1")

    with pytest.raises(FileExistsError, match=r"choose another\.; what was written is kept in"):
        fill_both()
    assert (tmp_path / "folder/other").read_bytes() == b"1"
    (kept,) = (tmp_path / "folder").glob("unilora-unplaced-*")
    assert contents(kept / "folder") == FILLED


def test_a_move_that_fails_in_the_middle_is_taken_back(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    replace = os.replace

    def stops(old, new):
        if Path(old).name == "config.json" and "folder/config.json" in str(new) and "unplaced" not in str(new):
            assert contents(tmp_path / "folder").keys() >= {"a", "deep/b", "z"}  # the one without which it is nothing
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(old))
        replace(old, new)

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(OSError, match="kept in"), new_folder(tmp_path / "folder", "config.json") as new:
        fill_folder(new)
    (kept,) = (tmp_path / "folder").iterdir()
    assert contents(kept / "folder") == FILLED


# ---- tried before the work ------------------------------------------------------------------------------------------


def test_a_device_is_not_replaced(tmp_path):
    """As root one would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for write in (try_files, functools.partial(write_file, data=b"")):
        with pytest.raises(FileExistsError, match="a device, a pipe or a socket is there"):
            write(tmp_path / "link")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_trying_leaves_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    try_files(tmp_path / "a", tmp_path / "new/deep/b")
    try_folder(tmp_path / "new/deep/c")
    assert contents(tmp_path) == {"a": "old"}
    assert names(tmp_path) == ["a"]


def test_what_cannot_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for place in ("file/a", "folder", "a" * 256):
        with pytest.raises(OSError, match=place[:4]) as caught:
            try_files(tmp_path / place)
        assert str(tmp_path) in str(caught.value.filename), place
    for place in ("file", "file/a", "a" * 256):
        with pytest.raises(OSError, match=place[:4]):
            try_folder(tmp_path / place)
    assert contents(tmp_path) == {"file": "old"}
    assert names(tmp_path) == ["file", "folder"]
