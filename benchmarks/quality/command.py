"""Does it learn? Methods × tasks × seeds × rates, in one protocol; each run is one line of results/quality.

    export UNILORA_DATA=...                                     # the folder of the public data
    python benchmarks/quality list                              # tasks, and what has been run
    python benchmarks/quality sweep sst2 --method lora          # four rates, on validation examples
    python benchmarks/quality run sst2 --method lora            # five seeds at the best of them, on test examples
    python benchmarks/quality run sst2 --rate default           # Uni-LoRA untouched: no sweep
    python benchmarks/quality run sst2 --option rank=16 d=2304  # a variant, untouched
    python benchmarks/quality plan baselines sst2               # both, for every case of a plan: plans.py
    python benchmarks/quality report                            # tables and plots into docs/evidence.md

What a run gave is kept at once, and not run again; ``--part 0/2`` and ``--part 1/2`` share the runs of two processes.
A task of one's own is a short file like tasks/sst2.py: ``--tasks FOLDER``.
"""

import ast
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from common import SMOKE, parser

from quality import report
from quality.jobs import SEEDS, best_rate, judged, options_of, read, run, sweep
from quality.plans import PLANS, carry_out
from quality.smoke import smoke
from quality.tasks import TaskError, find, names


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if SMOKE:
            smoke()
        else:
            COMMANDS[arguments.command](arguments)
    except (TaskError, OSError) as error:
        sys.exit(f"quality: {error}")


def _list(arguments: Any) -> None:
    for name, path in names(arguments.tasks).items():
        rows = read(name)
        print(f"{name:14} {len(rows):4} runs  {path.name}")


def _sweep(arguments: Any) -> None:
    task, case = find(arguments.task, arguments.tasks), (arguments.method, options_of(_options(arguments.option)))
    run(sweep(arguments.task, task, case), task, task.data(), _work(arguments), arguments.part)


def _run(arguments: Any) -> None:
    task, case = find(arguments.task, arguments.tasks), (arguments.method, options_of(_options(arguments.option)))
    if arguments.rate == "best":
        rate = best_rate(read(arguments.task), task, case)
    else:
        rate = task.rate if arguments.rate == "default" else float(arguments.rate)
    jobs = list(judged(arguments.task, case, rate))[: arguments.seeds]
    run(jobs, task, task.data(), _work(arguments), arguments.part)


def _plan(arguments: Any) -> None:
    if arguments.task not in PLANS or arguments.on is None:
        raise TaskError(f"plan: expected one of {', '.join(PLANS)}, and a task; got {arguments.task} {arguments.on}.")
    task = find(arguments.on, arguments.tasks)
    carry_out(arguments.task, arguments.on, task, _work(arguments), arguments.part, seeds=arguments.seeds)


def _options(given: list[str]) -> dict[str, Any]:
    pairs = [each.split("=", 1) for each in given]
    if wrong := [pair[0] for pair in pairs if len(pair) == 1]:
        raise TaskError(f"--option {wrong[0]}: expected name=value.")
    return {name: _value(text) for name, text in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _work(arguments: Any) -> Path:
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments.work


def _parser() -> Any:
    made = parser(__doc__)
    made.add_argument("command", choices=list(COMMANDS), nargs="?" if SMOKE else None)
    made.add_argument("task", nargs="?", help="a name that `list` gives; of `plan`, the plan")
    made.add_argument("on", nargs="?", metavar="task", help="of `plan`, the task")
    made.add_argument("--method", default="uni-lora", help="of the framework, or peft-lora, …, full, head")
    made.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="of attach, or of PEFT's config")
    made.add_argument("--rate", default="best", help="best (of the sweep), default (the task's η), or a number")
    made.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (default: %(default)s)")
    made.add_argument("--part", default="0/1", metavar="I/N", help="every N-th run, from the I-th (default: all)")
    made.add_argument("--tasks", type=Path, action="append", default=[], metavar="FOLDER", help="tasks of one's own")
    made.add_argument("--work", type=Path, default=Path("runs/quality"), help="where bases are kept")
    made.add_argument("--threads", type=int, default=1)
    return made


COMMANDS = {
    "list": _list,
    "sweep": _sweep,
    "run": _run,
    "plan": _plan,
    "report": lambda arguments: report.write(arguments.tasks),
}
