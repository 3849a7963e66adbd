"""Writing files so that a reader, or a writer that is killed, sees each whole or not at all.

What is new is written in a temporary folder beside its place, flushed to the disk, and renamed. The folder is locked by
its writer while it lives, so that the next writer there can tell the leftovers of dead ones, and takes them away.
"""

import contextlib
import errno
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

__all__ = ["alone", "new_files", "new_folder", "refuse_filled", "write_file"]

PREFIX = ".unilora-"
LEFTOVER = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{16}}")


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write one file; see `new_files`."""
    with new_files(path) as (new,):
        new.write_bytes(data)


@contextlib.contextmanager
def new_files(*paths: str | os.PathLike) -> Iterator[tuple[Path, ...]]:
    """Paths to write to in the ``with``; the files take the places of ``paths`` at its end, if no error ends it.

    Several files belong together and appear together: the last one is what makes them whole, so, unless it stays the
    same beside a single other, it is taken away before the first of the others changes, and comes last.

    Args:
        paths: where the files shall be; a symbolic link stays one, and what it points to is replaced. Who may read and
            write an old file may do so with the new one.

    Raises:
        OSError: a file cannot be written; it names the path. The old files are as they were.
    """
    places = [Path(os.path.realpath(path)) for path in paths]
    with contextlib.ExitStack() as stack, _naming(*paths):
        folders = {p.parent: stack.enter_context(_temporary(p.parent)) for p in dict.fromkeys(places)}
        new = tuple(folders[place.parent] / place.name for place in places)
        yield new
        for file in new:
            _flush(file)
        *others, last = pairs = list(zip(new, places, strict=True))
        with alone(places[-1].parent):
            for file, place in pairs:
                _like(place, file)
                with contextlib.suppress(OSError):  # none there, or no links: else freeing it would take time below
                    os.link(place, file.with_name(f"old-{secrets.token_hex(8)}"))
            if len(others) > 1 or (others and not _same(*last)):
                places[-1].unlink(missing_ok=True)
            for file, place in pairs:
                os.replace(file, place)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill in the ``with``; it takes the place of ``path`` at its end, if no error ends it.

    Raises:
        FileExistsError: ``path`` holds something, or is the current folder, which cannot be replaced.
        OSError: something cannot be written; it names the path. ``path`` is as it was.
    """
    refuse_filled(path)
    place = Path(os.path.realpath(path))
    with _naming(path), _temporary(place.parent) as new:
        whole = new / place.name
        whole.mkdir()
        yield whole
        for file in whole.rglob("*"):
            if file.is_file():
                _flush(file)
        if place.exists():
            shutil.copymode(place, whole)
            place.rmdir()
        whole.rename(place)


def refuse_filled(path: str | os.PathLike) -> None:
    """Refuse a folder that `new_folder` could not make, before the work that would fill it.

    Raises:
        FileExistsError: ``path`` is a file, a folder that is not empty, or the current folder.
    """
    place = Path(path)
    if place.exists() and (not place.is_dir() or any(place.iterdir()) or place.samefile(os.curdir)):
        raise FileExistsError(f"{path}: exists and is not an empty folder, or is the current one; choose another.")


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A new folder in a new one in this one, locked and taken away at the end; those of killed writers go first.

    What is locked is the outer, so that files can be written in the inner by this module, too.
    """
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    _tidy(parent)
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        try:
            path.mkdir()
            with _lock(path):
                if path.exists():  # else another writer tidied it away before it was locked
                    (path / "new").mkdir()
                    yield path / "new"
                    return
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    parent.rmdir()


@contextlib.contextmanager
def alone(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """No writer of this module changes the files of a folder during the ``with``.

    Args:
        shared: for readers of several files that belong together; others may read, too.
    """
    with _lock(Path(folder), shared=shared):
        yield


def _tidy(folder: Path) -> None:
    """Take away what writers that were killed left behind."""
    for path in folder.glob(f"{PREFIX}*"):
        if LEFTOVER.fullmatch(path.name):
            with _lock(path, wait=False) as held:
                if held:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Holds the lock of a folder during the ``with``, and gives whether it could be had."""
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
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _like(old: Path, new: Path) -> None:
    """Give a new file the permissions of the old one in its place, which must be no folder."""
    if old.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(old))
    with contextlib.suppress(FileNotFoundError):
        shutil.copymode(old, new)


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)


@contextlib.contextmanager
def _naming(*paths: str | os.PathLike) -> Iterator[None]:
    """Errors of the operating system that name no file, or a temporary one, name the path that was asked for."""
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
