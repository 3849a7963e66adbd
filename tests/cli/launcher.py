"""Runs of the command in processes of their own, which may be killed: imports once, then forks a run for each line of
JSON on standard input, and answers with a line of exit codes.

A line has: words, folder (where to run), processes (as torchrun would start them), kill_at (rows of run/metrics.csv
after which all of them get SIGKILL, or null).
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401

import unilora_cli.commands.finetune
import unilora_cli.tasks.pictures
import unilora_cli.tasks.vit  # noqa: F401
from unilora_cli.main import main


def start(job, rank, port):
    """The process id of one run; what it prints goes to out.RANK and err.RANK."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(job["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["processes"] > 1:
        os.environ |= {"WORLD_SIZE": str(job["processes"]), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 70
    with contextlib.suppress(SystemExit):
        code = main(job["words"])
    os._exit(code)


def run(job):
    """The exit codes of all processes of a run; -9 for those that were killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids = [start(job, rank, port) for rank in range(job["processes"])]
    if job["kill_at"] is not None:
        end = time.monotonic() + 60
        while rows(Path(job["folder"], "run/metrics.csv")) < job["kill_at"] and time.monotonic() < end:
            time.sleep(0.001)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def rows(path):
    return path.read_text().count("\n") - 1 if path.exists() else -1


for line in sys.stdin:
    sys.stdout.write(f"{json.dumps(run(json.loads(line)))}\n")
    sys.stdout.flush()
