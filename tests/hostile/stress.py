"""Threads and interrupts, for every kind of target: `nox -s stress`; `nox -s stress -- --passes 600 --places 50`.

Threads: four run one adapted model at once, some of them with `disabled()`, and every output is compared with the one
that a single thread gave. Interrupts: a pass is ended by an exception at a random line of Python inside it; then
outputs, the base's outputs and the weights must be bit for bit what they were before.
"""

import argparse
import collections
import contextlib
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS, Kind  # tests/torch
from torch import Tensor, nn

import unilora_core
import unilora_torch

THREADS = 4
ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError)


@dataclass
class Row:
    """What the table says of one kind."""

    passes: int = 0
    wrong: int = 0
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    interrupts: int = 0
    unequal: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def good(self) -> bool:
        return not (self.wrong or self.errors or self.unequal)


# ---- threads --------------------------------------------------------------------------------------------------------


def in_threads(run: Callable[[int], None], row: Row) -> None:
    """Run it in each thread; what it raises is counted."""
    start = threading.Barrier(THREADS)

    def safely(number: int) -> None:
        start.wait()
        try:
            run(number)
        except Exception as error:
            row.errors[f"{type(error).__name__}: {error!s:.90}"] += 1

    threads = [threading.Thread(target=safely, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def threads(kind: Kind, passes: int, row: Row) -> None:
    """Each thread has inputs of its own; every eighth pass of two of them is the base's."""
    model, adapter, x = kind.made()
    with torch.no_grad():
        inputs = [x, x.flip(0), x.roll(1, -1), x.roll(1, 0)]
        wanted = [model(each) for each in inputs]
        with adapter.disabled():
            base = [model(each) for each in inputs]

    @torch.no_grad()
    def run(number: int) -> None:
        for i in range(passes):
            off = number < 2 and i % 8 == number
            try:
                with adapter.disabled() if off else contextlib.nullcontext():
                    output = model(inputs[number])
            except Exception as error:
                row.errors[f"{type(error).__name__}: {error!s:.90}"] += 1
                continue
            want = (base if off else wanted)[number]
            row.wrong += not (output.shape == want.shape and torch.allclose(output, want, rtol=1e-3, atol=1e-4))

    in_threads(run, row)
    row.passes += THREADS * passes
    with torch.no_grad():
        if not torch.equal(model(x), wanted[0]) or not adapter.enabled:
            row.unequal["after the threads"] += 1


def training(kind: Kind, passes: int, row: Row) -> None:
    """Gradients from several threads are their sum, or the model says that this cannot be."""
    model, adapter, x = kind.made()

    def gradient(times: int) -> Tensor:
        adapter.theta_d.grad = None
        for _ in range(times):
            model(x).float().square().mean().backward()
        return adapter.theta_d.grad.clone()

    try:
        one = gradient(1)
    except RuntimeError as error:
        row.errors[f"training: {error!s:.90}"] += 1
        return
    adapter.theta_d.grad = None
    refused = []

    def run(_: int) -> None:
        for _ in range(passes):
            try:
                model(x).float().square().mean().backward()
            except unilora_core.UniLoraError as error:
                refused.append(error)

    in_threads(run, row)
    row.passes += THREADS * passes
    found = adapter.theta_d.grad
    if not refused and not torch.allclose(found / (THREADS * passes), one, rtol=1e-2, atol=1e-5):
        row.wrong += 1


def rows_of_a_bank(passes: int, row: Row, folder: Path) -> None:
    """Each thread names the rows of its own batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    for i in range(3):
        adapter = unilora_torch.attach(model, rank=2, d=32, seed=i, start="paper")
        with torch.no_grad():
            adapter.theta_d.normal_(0, 0.3)
        adapter.save(folder / f"{i}.safetensors")
        adapter.detach()
    bank, x = unilora_torch.Bank(model), torch.randn(3, 5, 32)
    for i in range(3):
        bank.add(str(i), folder / f"{i}.safetensors")
    named: list[list[Any]] = [["0", "1", "2"], ["1", None, "1"], ["2", "2", "0"], [None, None, "1"]]
    wanted = []
    with torch.no_grad():
        for names in named:
            with bank.rows(names):
                wanted.append(model(x))

    @torch.no_grad()
    def run(number: int) -> None:
        for _ in range(passes):
            try:
                with bank.rows(named[number]):
                    output = model(x)
            except Exception as error:
                row.errors[f"{type(error).__name__}: {error!s:.90}"] += 1
                continue
            row.wrong += not torch.allclose(output, wanted[number], rtol=1e-3, atol=1e-4)

    in_threads(run, row)
    row.passes += THREADS * passes


# ---- interrupts -----------------------------------------------------------------------------------------------------


class Countdown:
    """Raises at the n-th line of Python; with n = 0 it counts them."""

    def __init__(self, n: int, end: type[BaseException]):
        self.n, self.end, self.count, self.place = n, end, 0, ""

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_globals.get("__name__") != __name__:
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                self.place = (
                    f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
                )
                raise self.end
        return self.trace

    def __enter__(self) -> "Countdown":
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def interrupted(run: Callable[[], Any], rng: random.Random, places: int) -> Iterator[str]:
    """Run it so many times, each ended at another line; where that was."""
    with Countdown(0, KeyboardInterrupt) as whole:
        run()
    for n in sorted(rng.sample(range(1, whole.count + 1), min(places, whole.count))):
        end = rng.choice(ENDS)
        ending = Countdown(n, end)
        try:
            with ending:
                run()
        except BaseException as error:
            if not ending.place:
                raise
            if type(error) is not end and not isinstance(error, (RuntimeError, unilora_core.UniLoraError)):
                raise
        torch.set_grad_enabled(True)  # which an interrupt inside no_grad() itself leaves off
        yield f"{end.__name__} at {ending.place}"


def interrupts(kind: Kind, places: int, row: Row, rng: random.Random) -> None:
    """A forward pass, one with a gradient, one of the base, a merge and its end."""
    model, adapter, x = kind.made()
    with torch.no_grad():
        wanted = model(x)
        with adapter.disabled():
            base = model(x)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def backward() -> None:
        adapter.theta_d.grad = None
        model(x).float().square().sum().backward()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def off() -> None:
        with adapter.disabled():
            forward()

    def merged() -> None:
        adapter.merge()
        adapter.unmerge()

    def check(what: str, where: str) -> None:
        row.interrupts += 1
        with torch.no_grad():
            if what == "merge":
                adapter.unmerge()
            wrong = [
                *(["outputs"] if not torch.equal(model(x), wanted) else []),
                *(["weights"] if any(not torch.equal(v, weights[n]) for n, v in model.state_dict().items()) else []),
            ]
            with adapter.disabled():
                wrong += ["the base's outputs"] if not torch.equal(model(x), base) else []
        if wrong:
            row.unequal[f"{what}: {', '.join(wrong)} after {where}"] += 1
            raise StopIteration

    each = max(1, places // 4)
    for what, run in (("forward", forward), ("backward", backward), ("disabled", off), ("merge", merged)):
        for where in interrupted(run, rng, places - 3 * each if what == "forward" else each):
            try:
                check(what, where)
            except StopIteration:
                model, adapter, x = kind.made()
            except Exception as error:
                row.unequal[f"{what}: {type(error).__name__}: {error!s:.80} after {where}"] += 1
                model, adapter, x = kind.made()
    detached(kind, max(1, places // 4), row, rng)


def detached(kind: Kind, places: int, row: Row, rng: random.Random) -> None:
    """`detach` that was interrupted can be called again, and leaves the base."""
    torch.manual_seed(0)
    bare, x = kind.model().train(), kind.input()
    with torch.no_grad():
        base = bare(x)
    model, adapter, x = kind.made()
    with Countdown(0, KeyboardInterrupt) as whole:
        adapter.detach()
    for n in sorted(rng.sample(range(1, whole.count + 1), min(places, whole.count))):
        model, adapter, x = kind.made()
        ending = Countdown(n, KeyboardInterrupt)
        try:
            with ending:
                adapter.detach()
        except BaseException as error:
            if not isinstance(error, (KeyboardInterrupt, RuntimeError)):
                raise
        torch.set_grad_enabled(True)
        row.interrupts += 1
        try:
            with contextlib.suppress(AttributeError, unilora_core.UniLoraError):
                adapter.detach()
            with torch.no_grad():
                if not torch.equal(model(x), base) or unilora_torch.adapters(model):
                    row.unequal[f"detach, twice: not the base after {ending.place}"] += 1
        except Exception as error:
            row.unequal[f"detach, twice: {type(error).__name__}: {error!s:.80} after {ending.place}"] += 1


# ---- the whole ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="stress", description=__doc__)
    parser.add_argument("--passes", type=int, default=100, help="of each thread and kind")
    parser.add_argument("--places", type=int, default=24, help="of interrupts in each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[], help="only this one; may be repeated")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # checkpointing, without one
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    rows: dict[str, Row] = collections.defaultdict(Row)
    for name in arguments.kind or KINDS:
        row, kind = rows[name], KINDS[name]
        threads(kind, arguments.passes, row)
        training(kind, arguments.passes // 10, row)
        interrupts(kind, arguments.places, row, random.Random(f"{arguments.seed}/{name}"))
    if not arguments.kind:
        with tempfile.TemporaryDirectory() as folder:
            rows_of_a_bank(arguments.passes, rows["rows of a bank"], Path(folder))
    return report(rows)


def report(rows: dict[str, Row]) -> int:
    say(f"{'kind of target':28}{'passes':>8}{'wrong':>7}{'errors':>7}{'interrupts':>12}{'unequal':>9}")
    for name, row in rows.items():
        say(
            f"{name:28}{row.passes:8,}{row.wrong:7,}{row.errors.total():7,}{row.interrupts:12,}{row.unequal.total():9,}"
        )
    sums = [
        sum(f(row) for row in rows.values())
        for f in (lambda r: r.passes, lambda r: r.wrong, lambda r: r.errors.total())
    ]
    sums += [sum(f(row) for row in rows.values()) for f in (lambda r: r.interrupts, lambda r: r.unequal.total())]
    say("{:28}{:8,}{:7,}{:7,}{:12,}{:9,}".format("all", *sums))
    for name, row in rows.items():
        for what, count in [*row.errors.most_common(5), *row.unequal.most_common(8)]:
            say(f"  {name}: {count} × {what}")
    return 0 if all(row.good for row in rows.values()) else 1


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
