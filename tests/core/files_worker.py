"""Writers in processes of their own: `python files_worker.py WHAT FOLDER [NUMBER]`. One thread, so that it may fork."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from unilora_core.files import alone, new_files, new_folder, write_file

SIZE = 300_000


def write_all(folder, generation):
    """One file, a pair, three whose last stays the same, and a folder, all of one generation."""
    data = bytes([generation]) * SIZE
    write_file(folder / "single", data)
    with new_files(folder / "weights", folder / "config.json") as (weights, config):
        weights.write_bytes(data)
        config.write_text(json.dumps(generation))
    with new_files(folder / "shard1", folder / "shard2", folder / "index") as (*shards, index):
        for shard in shards:
            shard.write_bytes(data)
        index.write_text("always the same")
    with contextlib.suppress(FileExistsError), new_folder(folder / f"folder{generation}", "b") as new:
        for name in ("a", "b"):
            (new / name).write_bytes(data)


def torn(folder):
    """What a reader would find neither whole nor missing."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = {name: set(data) for name, data in found.items() if len(data) == SIZE}
    folders = {name.partition("/")[0] for name in found if name.startswith("folder")}
    sets = {
        "single": "single" not in found or len(whole.get("single", ())) == 1,
        "pair": "config.json" not in found or whole.get("weights") == {int(found["config.json"])},
        "shards": "index" not in found or len(whole["shard1"] | whole["shard2"]) == 1,
        **{name: whole.get(f"{name}/a") == whole.get(f"{name}/b") == {int(name[6:])} for name in folders},
    }
    return [name for name, is_whole in sets.items() if not is_whole]


def leftovers(folder):
    return list(folder.glob(".unilora-*"))


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def kill(folder, kills):
    """Kill writers at random moments, and say what they left."""
    rng, found = random.Random(0), {"torn": [], "left": 0, "left_after": 0, "single_lost": 0}
    write_all(folder, 0)
    for number in range(kills):
        if not (pid := os.fork()):
            for generation in range(255):
                write_all(folder, (7 * number + generation) % 251)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["torn"] += torn(folder)
        found["left"] += bool(leftovers(folder))
        found["single_lost"] += not (folder / "single").exists()
        write_file(folder / "next", b"")
        found["left_after"] += len(leftovers(folder))
    say(json.dumps(found))


def hold(folder, _):
    """Stay in the middle of writing until told to go on."""
    with new_files(folder / "held") as (new,):
        new.write_bytes(b"half")
        say("writing")
        sys.stdin.readline()
        new.write_bytes(b"whole")


def fork(folder, _):
    """Fork while the folder is locked; the child lives on."""
    with alone(folder):
        if not (pid := os.fork()):
            time.sleep(60)
            os._exit(0)
    write_file(folder / "a", b"written")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def nobody(folder, _):
    """Write where only root may."""
    with contextlib.suppress(PermissionError):
        os.setuid(65534)
    for write in (lambda path: write_file(path, b""), lambda path: new_folder(path, "a").__enter__()):
        try:
            write(folder / "a")
        except PermissionError as error:
            say(error.filename)


def unlisted(folder, _):
    """Write where nobody may list."""
    with contextlib.suppress(PermissionError):
        os.setuid(65534)
    write_file(folder / "a", b"")
    say("written")
    try:
        with new_folder(folder, "a"):
            pass
    except PermissionError as error:
        say("listing" if error.filename == str(folder) else error)


if __name__ == "__main__":
    {f.__name__: f for f in (kill, hold, fork, nobody, unlisted)}[sys.argv[1]](
        Path(sys.argv[2]), int((*sys.argv, 0)[3])
    )
