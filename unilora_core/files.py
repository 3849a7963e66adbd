"""Writing of files so that a reader sees each one whole or not at all, also when a writer is killed.

What is new is written in a temporary folder beside its place, flushed to the disk, and renamed. The folder is locked by
its writer while it lives, so that the next writer there recognises the leftovers of dead ones, and removes them.

Where a file system lacks something (permissions, locks, links, flushing, renaming), writing goes on without it.
"""

import contextlib
import errno
import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "new_files", "new_folder", "try_files", "try_folder", "write_file"]

PREFIX = ".unilora-"
LEFTOVER = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{16}}")
KEPT = "unilora-unplaced-"
"""The prefix of a folder that keeps whole files which could not take their places."""

NOT_THERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}
"""The error numbers for what a file system does not have, or does not allow."""

NO_RENAME = NOT_THERE | {errno.EXDEV, errno.EBUSY}
"""The error numbers of a refused renaming: the place may be a mounted file, which can only be written over."""


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write one file; see `new_files`."""
    with new_files(path) as (new,):
        new.write_bytes(data)


@contextlib.contextmanager
def new_files(*paths: str | os.PathLike) -> Iterator[tuple[Path, ...]]:
    """Yield paths to write to; the files take the places of ``paths`` at the end of the ``with``, if no error ends it.

    Several files belong together and appear together. The last one makes them whole: it is removed before the first of
    the others changes, and placed last, unless it stays the same beside a single other.

    Args:
        paths: the places of the files; a symbolic link stays one, and what it points to is replaced. Who may read and
            write an old file may do so with the new one, where the file system has permissions.

    Raises:
        OSError: a file cannot be written; the error names the path. The old files are as they were. Where only the last
            step is refused, the new files are kept, and the error says where.
    """
    places = [Path(os.path.realpath(path)) for path in paths]
    with contextlib.ExitStack() as stack, _naming(*paths):
        folders = {p.parent: stack.enter_context(_temporary(p.parent)) for p in dict.fromkeys(places)}
        new = tuple(folders[place.parent] / place.name for place in places)
        for place in places:
            _refuse_other(place)
        yield new
        for file in new:
            _flush(file)
        *others, last = pairs = list(zip(new, places, strict=True))
        with alone(places[-1].parent), _kept(*folders.values()):
            for file, place in pairs:
                _like(place, file)
                with contextlib.suppress(OSError):  # kept until the end: freeing an old file here takes time
                    os.link(place, file.parent.with_name(f"old-{secrets.token_hex(8)}"))
            if len(others) > 1 or (others and not _same(*last)):
                with _done_without(NO_RENAME):
                    places[-1].unlink(missing_ok=True)
            for file, place in pairs:
                _move(file, place)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, last: str) -> Iterator[Path]:
    """Yield a folder to fill; at the end of the ``with``, if no error ends it, it takes the place ``path``.

    An empty folder that is there stays the same one, as a mounted or the current one must: it is filled. The file
    called ``last`` comes last; without it no reader takes the folder for whole.

    Raises:
        FileExistsError: ``path`` holds something.
        OSError: something cannot be written; the error names the path. ``path`` is as it was. Where only the last step
            is refused, what was written is kept, and the error says where.
    """
    _refuse_filled(path)
    place = Path(os.path.realpath(path))
    there = place.is_dir()
    with _naming(path), _temporary(place if there else place.parent) as new:
        whole = new / place.name
        whole.mkdir()
        yield whole
        for file in whole.rglob("*"):
            if file.is_file():
                _flush(file)
        with alone(new.parent.parent), _kept(new):
            if there:
                _refuse_filled(place)  # another writer may have filled it meanwhile
                _move_into(whole, place, last)
            else:
                _move(whole, place, last)


def try_files(*paths: str | os.PathLike) -> None:
    """Refuse what `new_files` could not write, before the work that makes it; nothing stays on the disk.

    Raises:
        OSError: a folder or a device is in the place of a file, or nothing can be written beside it.
    """
    with _naming(*paths):
        for place in (Path(os.path.realpath(path)) for path in paths):
            with _temporary(place.parent) as new:
                _refuse_other(place)
                (new / place.name).touch()


def try_folder(path: str | os.PathLike) -> None:
    """Refuse what `new_folder` could not make, before the work that fills it; nothing stays on the disk.

    Raises:
        FileExistsError: ``path`` holds something.
        OSError: it cannot be written.
    """
    _refuse_filled(path)
    place = Path(os.path.realpath(path))
    with _naming(path), _temporary(place if place.is_dir() else place.parent) as new:
        (new / place.name).mkdir()


def _refuse_filled(path: str | os.PathLike) -> None:
    """Refuse a folder that holds something, except what a file system or a killed writer left there.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that is not empty.
    """
    place = Path(path)
    if os.path.lexists(place) and (
        (place.exists() and not place.is_dir())
        or (place.is_dir() and any(not _nobodys(entry.name) for entry in place.iterdir()))
    ):
        raise FileExistsError(f"{path}: exists and is not an empty folder; choose another.")


def _nobodys(name: str) -> bool:
    return name == "lost+found" or LEFTOVER.fullmatch(name) is not None


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """Yield a new folder inside a new locked one in ``parent``; both are removed at the end.

    Folders of killed writers are removed first. The outer one is locked, so that this module can write files in the
    inner one.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    _tidy(parent)
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        try:
            path.mkdir(parents=True)
            with _lock(path):
                if path.exists():  # else another writer tidied it away before it was locked
                    (path / "new").mkdir()
                    yield path / "new"
                    return
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds something, as it should
                for folder in made:
                    folder.rmdir()


@contextlib.contextmanager
def alone(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """Keep writers of this module from changing the files of a folder during the ``with``.

    Args:
        shared: True for readers of several files that belong together; others may then read, too.
    """
    with _lock(Path(folder), shared=shared):
        yield


def _tidy(folder: Path) -> None:
    """Remove what killed writers left behind."""
    for path in folder.glob(f"{PREFIX}*"):
        if LEFTOVER.fullmatch(path.name):
            with _lock(path, wait=False) as held:
                if held:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder during the ``with``, and yield whether it could be had."""
    handle, held = None, False
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # another holds it, or the file system has no locks
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
                held = True
        yield held
    finally:
        if handle is not None:
            if held:  # said, because a process that was forked meanwhile holds the handle, too
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _flush(file: Path) -> None:
    with _done_without(NOT_THERE), open(file, "rb+" if os.name == "nt" else "rb") as opened:
        os.fsync(opened.fileno())


def _refuse_other(place: Path) -> None:
    """Refuse a place that holds something other than a file: root would put a file there instead."""
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    if place.exists() and not place.is_file():
        raise FileExistsError(errno.EEXIST, "a device, a pipe or a socket is there, and no file", str(place))


def _like(old: Path, new: Path) -> None:
    """Give a new file the permissions of the old one in its place, which must be a file."""
    _refuse_other(old)
    with contextlib.suppress(OSError):  # none there, or a file system without permissions
        shutil.copymode(old, new)


def _move(written: Path, place: Path, last: str = "") -> None:
    """Rename a file or folder; where that is refused, write it in its place, a folder file by file, ``last`` at the
    end.
    """
    fresh = not place.exists()
    with _done_without(NO_RENAME):
        os.replace(written, place)
        return
    if written.is_dir():
        place.mkdir(exist_ok=True)
        _move_into(written, place, last)
        return
    try:
        shutil.copyfile(written, place)
    except BaseException:
        if fresh:
            place.unlink(missing_ok=True)
        raise


def _move_into(written: Path, place: Path, last: str) -> None:
    """Move the entries of one folder into another, which is empty, and back again if an error stops that."""
    entries = sorted(written.iterdir(), key=lambda entry: entry.name == last)
    try:
        for entry in entries:
            _move(entry, place / entry.name)
    except BaseException:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.exists():
                    _remove(place / entry.name)
                else:
                    _move(place / entry.name, entry)
        raise


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _kept(*folders: Path) -> Iterator[None]:
    """Keep whole files that cannot take their places beside them, and let the error say where."""
    try:
        yield
    except OSError as error:
        kept = []
        for folder in folders:
            if any(folder.iterdir()):
                with contextlib.suppress(OSError):
                    kept.append(str(folder.rename(folder.parent.with_name(f"{KEPT}{secrets.token_hex(4)}"))))
        if not kept:
            raise
        what = f"{error.strerror or error}; what was written is kept in {', '.join(kept)}"
        raise (OSError(error.errno, what, error.filename) if error.errno else type(error)(what)) from error


@contextlib.contextmanager
def _done_without(numbers: Collection[int]) -> Iterator[None]:
    """Go on after an error of the operating system that has one of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)


@contextlib.contextmanager
def _naming(*paths: str | os.PathLike) -> Iterator[None]:
    """Make errors of the operating system that name no file, or a temporary one, name the path that was asked for."""
    try:
        yield
    except SafetensorError as error:
        if (number := re.search(r"(?:os error|code:) (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(paths[0])) from error
    except OSError as error:
        temporary = error.filename is not None and LEFTOVER.search(str(error.filename))
        if error.errno is None or (error.filename is not None and not temporary):
            raise
        names = {os.path.basename(os.path.realpath(path)): path for path in paths}
        path = names.get(os.path.basename(error.filename or ""), paths[0])
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
