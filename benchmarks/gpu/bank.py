"""1,000 adapters in one batch on the shapes of Llama-3.1-8B: a forward pass of 1,000 rows of 32 tokens.

Query and value, r = 4. Beside the bank run the base alone, and one adapter attached in the ordinary way for all rows.
"""

import copy
from typing import Any

import numpy as np
import torch
from common import SMOKE

import unilora_torch
import unilora_transformers
from gpu.llama import SHAPES, base
from gpu.rows import DEVICE, Row
from gpu.timing import milliseconds
from unilora_core import AdapterFile
from unilora_core.header import write_targets

ADAPTERS, LENGTH, RANK = (10, 4, 4) if SMOKE else (1000, 32, 4)


def rows() -> list[Row]:
    """The one."""
    return [Row({"adapters": ADAPTERS, "tokens": LENGTH, "rank": RANK}, batch)]


@torch.no_grad()
def batch() -> dict[str, Any]:
    """Requests a second of each case, and what the bank holds."""
    plain = base().eval()
    attached, banked = copy.deepcopy(plain), unilora_torch.Bank(plain)
    adapter = unilora_transformers.attach(attached, rank=RANK)
    names = fill(banked, adapter)
    tokens = torch.randint(0, SHAPES["vocab_size"], (ADAPTERS, LENGTH), device=DEVICE)

    def run(model: torch.nn.Module) -> object:
        return model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    def by_rows(chosen: list[str]) -> object:
        with banked.rows(chosen):
            return run(plain)

    ms = milliseconds(
        {
            "base": lambda: run(plain),
            "one attached": lambda: run(attached),
            "bank, one adapter": lambda: by_rows(names[:1] * ADAPTERS),
            "bank, an adapter a row": lambda: by_rows(names),
        },
        repeats=10,
    )
    requests = {name: ADAPTERS / time * 1000 for name, time in ms.items()}
    return {"requests/s": requests, "bank_bytes": banked.nbytes, "d": adapter.spec.d, "D": adapter.spec.D}


def fill(bank: unilora_torch.Bank, adapter: unilora_torch.Adapter) -> list[str]:
    """Adapters like one that is attached, each with numbers of its own."""
    rng, spec, names = np.random.default_rng(0), adapter.spec, [str(i) for i in range(ADAPTERS)]
    targets = write_targets([(t.name, t.module, t.first_row, t.transposed) for t in adapter.targets])
    for name in names:
        theta_d = spec.init() + 0.01 * rng.standard_normal(spec.d, dtype=np.float32)
        bank.add(name, AdapterFile(spec, theta_d, metadata=targets))
    return names
