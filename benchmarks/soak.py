"""A bank under load: 10,000 adapters in one process, then random requests while threads add, replace and remove.

    python benchmarks/soak.py              # ten minutes of requests, and some minutes before
    python benchmarks/soak.py --minutes 2

Adapters of four specs (another rank, d, seed and grouping) lie as files; the bank may keep a tenth of their bytes, so
most requests read some again. Every row of every tenth request is compared with its adapter alone, and the memory of
the process is noted before and after: it must not grow.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from common import SMOKE, parser, write
from many_adapters import base_model, resident

import unilora_core
import unilora_torch
import unilora_transformers
from unilora_core.header import write_targets

ADAPTERS, LIVE, ROWS, LENGTH = (40, 30, 4, 8) if SMOKE else (10_000, 9_500, 8, 16)
KINDS = [
    {"rank": 4},
    {"rank": 8, "seed": 1},
    {"rank": 4, "d": 512, "grouping": "iid"},
    {"rank": 2, "d": 300, "targets": "all-linear"},
]


def files(folder: Path) -> dict[str, Path]:
    """Every adapter's file, by name."""
    made, rng, found = [], np.random.default_rng(0), {}
    for kind in KINDS:
        adapter = unilora_transformers.attach(base_model(), **kind)
        made.append(
            (adapter.spec, write_targets([(t.name, t.module, t.first_row, t.transposed) for t in adapter.targets]))
        )
    for i in range(ADAPTERS):
        spec, metadata = made[i % len(made)]
        theta_d = spec.init() + 0.02 * rng.standard_normal(spec.d, dtype=np.float32)
        found[str(i)] = folder / f"{i}.safetensors"
        unilora_core.save_adapter(found[str(i)], spec, theta_d, metadata=metadata)
    return found


class Load:
    """What the threads share: the bank, the files, and counts of what has happened."""

    def __init__(self, bank: unilora_torch.Bank, paths: dict[str, Path]):
        self.bank, self.paths, self.over = bank, paths, threading.Event()
        self.requests = self.checked = self.changes = self.unknown = 0
        self.worst, self.errors = 0.0, []

    def serve(self) -> None:
        """Random requests, of which every tenth is compared row by row."""
        choice, names = random.Random(0), list(self.paths)
        reference = base_model()
        while not self.over.is_set():
            rows = [choice.choice(names) for _ in range(ROWS)]
            tokens = torch.randint(3, 2048, (ROWS, LENGTH))
            try:
                with torch.no_grad(), self.bank.rows(rows):
                    logits = self.bank.model(input_ids=tokens, use_cache=False).logits
            except unilora_core.ValuesError as error:  # a row names what another thread has removed
                self.unknown += 1
                if "no adapter is named" not in str(error):
                    self.errors.append(repr(error))
                continue
            except Exception as error:
                self.errors.append(repr(error))
                continue
            self.requests += 1
            if self.requests % 10 == 0:
                self.compare(reference, rows, tokens, logits)

    def compare(self, reference, rows: list[str], tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Each row beside its adapter alone, attached to another copy of the base."""
        for i, name in enumerate(rows):
            adapter = unilora_torch.load(reference, self.paths[name])
            with torch.no_grad():
                wanted = reference(input_ids=tokens[i : i + 1], use_cache=False).logits[0]
            adapter.detach()
            self.worst = max(self.worst, float((wanted - logits[i]).abs().max()))
            self.checked += 1

    def change(self) -> None:
        """Random additions, replacements and removals: about LIVE adapters are there."""
        choice, names = random.Random(1), list(self.paths)
        while not self.over.is_set():
            name = choice.choice(names)
            try:
                if len(self.bank.names) > LIVE and choice.random() < 0.5:
                    self.bank.remove(name)
                else:
                    self.bank.add(name, self.paths[name], replace=True)
                self.changes += 1
            except unilora_core.ValuesError:
                pass  # it is not there
            except Exception as error:
                self.errors.append(repr(error))
            time.sleep(0.02)


def soak(load: Load, seconds: float) -> dict:
    """Let it run, and note the memory of the process four times."""
    threads = [threading.Thread(target=work) for work in (load.serve, load.change)]
    for thread in threads:
        thread.start()
    memory, begin = [], time.perf_counter()
    for _ in range(5):
        time.sleep(seconds / 5)
        memory.append(resident())
    load.over.set()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - begin
    return {
        "seconds": round(passed, 1),
        "requests": load.requests,
        "requests_per_second": load.requests / passed,
        "rows_compared": load.checked,
        "largest_difference_of_logits": load.worst,
        "changes": load.changes,
        "refused_as_removed": load.unknown,
        "errors": load.errors,
        "resident_bytes": memory,
    }


def main() -> None:
    """Add, then serve."""
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=0.05 if SMOKE else 10.0)
    minutes = arguments.parse_args().minutes
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        paths = files(Path(name))
        size = (
            sum(4 * unilora_core.read_adapter(paths[str(i)]).spec.d for i in range(len(KINDS))) * ADAPTERS // len(KINDS)
        )
        bank, before, begin = unilora_torch.Bank(base_model(), memory=size // 10), resident(), time.perf_counter()
        for each, path in paths.items():
            bank.add(each, path)
        adding = time.perf_counter() - begin
        added = {
            "adapters": ADAPTERS,
            "adds_per_second": ADAPTERS / adding,
            "bytes_of_files": sum(path.stat().st_size for path in paths.values()),
            "bytes_of_all_theta_d": size,
            "bank_bytes": bank.nbytes,
            "resident_bytes_grown": resident() - before,
        }
        print(added, file=sys.stderr, flush=True)
        result = {"added": added, "soak": soak(Load(bank, paths), 60 * minutes), "bank_bytes_after": bank.nbytes}
    print(result["soak"], file=sys.stderr)
    print(write("soak", result))
    assert not result["soak"]["errors"]


if __name__ == "__main__":
    main()
