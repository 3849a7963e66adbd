"""Hostile files for every public reader: `nox -s fuzz`, a minute; `nox -s fuzz -- --seconds 3600 --seed 7`, an hour.

Each reader runs in a process of its own with a limit on its memory. A try ends in a clear refusal, in an acceptance
that is checked for meaning, or in neither: those are printed, grouped, with the words that repeat one, and the exit
code is 1. So it is where a try took more time or memory than its file and its model account for.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
}

SECONDS_PER_MB, MB_PER_MB = 4, 60
"""What a try may take for each megabyte of its file; some twenty times what linear readers take."""
HANG, DEAD = 30, 60
"""Seconds after which a try is interrupted, and after which its process is killed."""
ROOM = 3 * 2**29
"""Memory that a reader's process may take beside what it starts with."""


class Hang(BaseException):
    """A try that does not end."""


# ---- one try --------------------------------------------------------------------------------------------------------


def memory(field_: str) -> int:
    """VmRSS, VmHWM or VmSize of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field_))


def forget_peak() -> None:
    """Start `VmHWM` anew, where the kernel lets a process do that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def attempt(reader: Any, seed: int, index: int) -> dict[str, Any]:
    """What came of one try."""
    from readers import Refused

    size = reader.write(random.Random(f"{seed}/{reader.name}/{index}"))
    forget_peak()
    before, began = memory("VmRSS"), time.process_time()
    outcome, why, accepted = "accepted", "", False
    signal.setitimer(signal.ITIMER_REAL, HANG)
    spent: dict[str, float] = {}

    def measure() -> None:
        if not spent:
            spent.update(ms=1000 * (time.process_time() - began), mb=max(0, memory("VmHWM") - before) / 2**20)

    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = reader.read()
            accepted = True
            measure()
            reader.check(result)
            result = None
        outcome, why = judge_warnings(warned) or (outcome, why)
    except Refused as error:
        outcome, why = "refused", str(error)
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome, why = judge(error, accepted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        measure()
    try:
        reader.settle(accepted)
    except Exception as error:
        outcome, why = "unclear", describe(error)
    if outcome != "unclear" and (bound := exceeded(reader, size, **spent)):
        outcome, why = "unclear", bound
    return {"index": index, "outcome": outcome, "why": why, "bytes": size, **spent}


def exceeded(reader: Any, size: int, ms: float, mb: float) -> str:
    """Which bound a try broke, if any."""
    megabytes = (size + reader.model_bytes) / 2**20
    if ms / 1000 > reader.seconds + SECONDS_PER_MB * megabytes:
        return f"Bound: {reader.name}: time beyond {reader.seconds:g} s + {SECONDS_PER_MB} s/MB"
    if mb > reader.megabytes + MB_PER_MB * megabytes:
        return f"Bound: {reader.name}: memory beyond {reader.megabytes} MB + {MB_PER_MB} MB/MB"
    return ""


def judge(error: BaseException, accepted: bool) -> tuple[str, str]:
    """Whether an exception is a clear refusal."""
    from readers import controls

    from unilora_core import UniLoraError

    clear = isinstance(error, (UniLoraError, FileNotFoundError, FileExistsError)) or (
        isinstance(error, OSError) and error.filename is not None
    )
    if accepted or not clear:
        return "unclear", ("accepted, then " if accepted else "") + describe(error)
    text = str(error)
    if controls(text):
        return "unclear", f"ControlCharacters in a {type(error).__name__} at {frames(error)}"
    if len(text) > 10_000:
        return "unclear", f"LongMessage in a {type(error).__name__} at {frames(error)}"
    return "refused", text


def judge_warnings(warned: list[Any]) -> tuple[str, str] | None:
    """A warning that unilora gives on purpose names the file; any other comes from inside."""
    for each in warned:
        if "safetensors" not in str(each.message) and "folder" not in str(each.message):
            return (
                "unclear",
                f"{each.category.__name__}: {each.message!s:.120} at {Path(each.filename).name}:{each.lineno}",
            )
    return None


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.160} at {frames(error)}"


def frames(error: BaseException) -> str:
    """The innermost frame, and the innermost of unilora."""
    stack = traceback.extract_tb(error.__traceback__)[-400:]
    named = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in stack]
    ours = [
        name for name, f in zip(named, stack, strict=True) if "unilora" in f.filename and "hostile" not in f.filename
    ]
    inner = named[-1] if named else "?"
    return inner if not ours or ours[-1] == inner else f"{inner}, from {ours[-1]}"


# ---- a reader's process ---------------------------------------------------------------------------------------------


def work(kind: Any, seed: int, first: int, seconds: float, only: int | None, log: Path, progress: mmap.mmap) -> None:
    """Try until the time is over; a line a try goes into ``log``."""
    from readers import scratch_folder

    def hang(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    scratch = scratch_folder()
    try:
        reader = kind(scratch)
        limit = memory("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        index, end = first if only is None else only, time.monotonic() + seconds
        with log.open("a", encoding="utf-8", buffering=1) as file:
            while only is not None or time.monotonic() < end:
                progress[:16] = struct.pack("<qd", index, time.monotonic())
                result = attempt(reader, seed, index)
                file.write(json.dumps(result) + "\n")
                index += 1
                if only is not None:
                    keep(scratch)
                    break
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def keep(scratch: Path) -> None:
    """The files of a try that was repeated by its number, for a look."""
    shutil.rmtree("fuzz-case", ignore_errors=True)
    shutil.copytree(scratch, "fuzz-case", ignore=shutil.ignore_patterns("pipe"))


@dataclass
class Job:
    """One reader: its process, and what its tries have come to."""

    kind: Any
    seed: int
    seconds: float
    log: Path
    only: int | None = None
    pid: int = 0
    first: int = 0
    end: float = 0.0
    progress: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 16))

    def start(self) -> None:
        if not self.end:
            self.end = time.monotonic() + self.seconds + 30  # the 30 are for the set-up
        sys.stdout.flush()
        self.progress[:16] = struct.pack("<qd", -1, time.monotonic())
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                left = min(self.seconds, self.end - time.monotonic())
                work(self.kind, self.seed, self.first, left, self.only, self.log, self.progress)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> bool:
        """Whether it has ended; a process that hangs is killed, and goes on behind the try that did it."""
        index, since = struct.unpack("<qd", self.progress[:16])
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if index >= 0 and time.monotonic() - since > DEAD:
                os.kill(self.pid, signal.SIGKILL)
            return False
        if status == 0:
            return True
        set_up = index >= 0
        why = (
            "the set-up failed"
            if not set_up
            else f"Died: signal {os.WTERMSIG(status)}"
            if os.WIFSIGNALED(status)
            else "Died"
        )
        why += " (killed, as it hung)" if time.monotonic() - since > DEAD else ""
        with self.log.open("a", encoding="utf-8") as file:
            line = {
                "index": index,
                "outcome": "unclear",
                "why": why,
                "bytes": 1,
                "ms": 1000 * (time.monotonic() - since),
                "mb": 0,
            }
            file.write(json.dumps(line) + "\n")
        self.first = index + 1
        if not set_up or self.only is not None or time.monotonic() >= self.end:
            return True
        self.start()
        return False


def run(jobs: list[Job], at_once: int) -> None:
    """All jobs, so many at a time."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(0.05)
        running = [job for job in running if not job.poll()]


# ---- the report -----------------------------------------------------------------------------------------------------


def report(jobs: list[Job]) -> bool:
    """Print the table and the groups of what was unclear; whether there was none."""
    heads = ["tries", "refused", "accepted", "unclear", "worst ms", "worst MB", "ms/kB", "MB/kB"]
    say(f"{'reader':22}" + "".join(f"{head:>10}" for head in heads))
    groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    totals: collections.Counter[str] = collections.Counter()
    for job in jobs:
        lines = (
            [json.loads(line) for line in job.log.read_text(encoding="utf-8").splitlines()] if job.log.exists() else []
        )
        count = collections.Counter(line["outcome"] for line in lines)
        totals += count
        worst = [max((f(line) for line in lines), default=0) for f in WORST]
        say(
            f"{job.kind.name:22}{len(lines):10,}{count['refused']:10,}{count['accepted']:10,}{count['unclear']:10,}"
            f"{worst[0]:10.0f}{worst[1]:10.0f}{worst[2]:10.1f}{worst[3]:10.2f}"
        )
        for line in lines:
            if line["outcome"] == "unclear":
                groups[job.kind.name, group_of(line["why"])].append(line["index"])
    numbers = [totals.total(), *(totals[outcome] for outcome in ("refused", "accepted", "unclear"))]
    say(f"{'all':22}" + "".join(f"{number:10,}" for number in numbers))
    for (name, why), indices in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        say(f"  {name}: {len(indices)} × {why}")
        say(f"      repeat: --reader {name!r} --seed {jobs[0].seed} --index {indices[0]}")
    return not groups


WORST = [
    lambda line: line["ms"],
    lambda line: line["mb"],
    lambda line: line["ms"] / max(1, line["bytes"] / 1024),
    lambda line: line["mb"] / max(1, line["bytes"] / 1024),
]


def group_of(why: str) -> str:
    """What two tries of one fault have in common: the type and the frames, or a message without its details."""
    head, at, where = why.rpartition(" at ")
    kind = head.split(":")[0] if at else why
    if "Unclear" in kind or not at:
        return " ".join(why.split("'")[0].split()[:16])
    return f"{kind} at {where}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="of all readers together, without their set-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--index", type=int, help="only this try; its files are left in ./fuzz-case")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    import timm  # noqa: F401  (imported once, before the processes part)
    import transformers
    from readers import READERS, scratch_folder

    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  (it prints something when it is first imported)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.LlamaForCausalLM, transformers.BertForSequenceClassification, transformers.PreTrainedTokenizerFast  # noqa: B018
    kinds = [kind for kind in READERS if not arguments.reader or kind.name in arguments.reader]
    share = arguments.seconds * arguments.jobs / sum(kind.share for kind in kinds)
    logs = scratch_folder()
    jobs = [
        Job(kind, arguments.seed, share * kind.share, logs / f"{i}.jsonl", arguments.index)
        for i, kind in enumerate(kinds)
    ]
    try:
        run(jobs, arguments.jobs)
        if arguments.index is not None:
            say(jobs[0].log.read_text())
        return 0 if report(jobs) else 1
    finally:
        shutil.rmtree(logs, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
