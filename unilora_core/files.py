"""Writing files so that a reader, or a writer that is killed, sees each whole or not at all.

What is new is written in a temporary folder beside its place, flushed to the disk, and renamed. The folder is locked by
its writer while it lives, so that the next writer there can tell the leftovers of dead ones, and takes them away.
"""

import contextlib
import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "new_files", "new_folder", "write_file"]

PREFIX = ".unilora-"


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write one file; see `new_files`."""
    with new_files(path) as (new,):
        new.write_bytes(data)


@contextlib.contextmanager
def new_files(*paths: str | os.PathLike) -> Iterator[tuple[Path, ...]]:
    """Paths to write to in the ``with``; the files take the places of ``paths`` at its end, if no error ends it.

    Several files belong together and appear together: the last one is what makes them whole, so, unless it stays the
    same, it is taken away before the first of the others changes, and comes last.

    Args:
        paths: where the files shall be; a symbolic link stays one, and what it points to is replaced.

    Raises:
        OSError: a file cannot be written; it names the path. The old files are as they were.
    """
    places = [Path(os.path.realpath(path)) for path in paths]
    with contextlib.ExitStack() as stack, _naming(paths[0]):
        folders = {p.parent: stack.enter_context(_temporary(p.parent)) for p in dict.fromkeys(places)}
        new = tuple(folders[place.parent] / place.name for place in places)
        yield new
        for file in new:
            _flush(file)
        *others, (last, place) = zip(new, places, strict=True)
        with alone(place.parent):
            if others and not _same(last, place):
                place.unlink(missing_ok=True)
            for file, where in (*others, (last, place)):
                os.replace(file, where)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill in the ``with``; it takes the place of ``path`` at its end, if no error ends it.

    Raises:
        FileExistsError: ``path`` holds something.
        OSError: something cannot be written; it names the path. ``path`` is as it was.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{path}: exists and is not an empty folder; choose another.")
    with _naming(path), _temporary(place.parent) as new:
        whole = new / place.name
        whole.mkdir()
        yield whole
        for file in whole.rglob("*"):
            if file.is_file():
                _flush(file)
        if place.exists():
            place.rmdir()
        whole.rename(place)


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A new folder in this one, locked and taken away at the end; those of writers that were killed go first."""
    parent.mkdir(parents=True, exist_ok=True)
    _tidy(parent)
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        path.mkdir()
        handle = _locked(path, wait=True)
        if path.exists():  # else another writer tidied it away before it was locked
            break
        _release(handle)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _release(handle)


@contextlib.contextmanager
def alone(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """No writer of this module changes the files of a folder during the ``with``.

    Args:
        shared: for readers of several files that belong together; others may read, too.
    """
    handle = _locked(Path(folder), wait=True, shared=shared)
    try:
        yield
    finally:
        _release(handle)


def _tidy(folder: Path) -> None:
    """Take away what writers that were killed left behind."""
    for path in folder.glob(f"{PREFIX}*"):
        handle = _locked(path, wait=False)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            _release(handle)


def _locked(path: Path, wait: bool, shared: bool = False) -> int | None:
    """A handle that holds the lock of a file or folder until it is released; None where it cannot be had."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another holds it, or the file system has no locks
        os.close(handle)
        return None
    return handle


def _release(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _flush(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the operating system that name no file, or a temporary one, name the path that was asked for."""
    try:
        yield
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
    except OSError as error:
        if error.errno is None or (error.filename is not None and PREFIX not in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
