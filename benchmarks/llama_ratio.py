"""How few numbers are enough? A small Llama, pretrained here on plain text, is taught GSM8K: D/d from 4 to 256.

    UNILORA_DATA=... python benchmarks/llama_ratio.py run --base FOLDER   # pretrains into FOLDER unless it is there
    python benchmarks/llama_ratio.py plot
    python benchmarks/llama_ratio.py table

The base: 4 layers of width 256, a byte-level BPE of 2,048 tokens, both trained on the corpora of UNILORA_DATA. The
task: questions and answers of GSM8K's training file, packed; 100 of them, never trained on, give the perplexity.
Every linear layer but the output is adapted at r = 4, by Uni-LoRA with the rate that it derives from LoRA's, and by
PEFT's LoRA at each rate of a sweep. AdamW without weight decay, linear schedule with 6 % warm-up, gradients clipped at
1, bfloat16 autocast, one thread. Each run is one line of results/llama_ratio.jsonl; one that is there already is not
repeated.
"""

import gzip
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, SMOKE, machine, parser, write
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_transformers

FILE = RESULTS / "llama_ratio.jsonl"
VOCABULARY, LENGTH, BATCH = 2048, 128, 4
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_RATE = 2 if SMOKE else 400, 8, 3e-3
STEPS = 2 if SMOKE else 60
HELD_OUT = 100
RANK = 4
RATIOS = [4, 8, 16, 32, 64, 128, 256]
LORA_RATES = [5e-3, 1e-2, 2e-2, 5e-2]
SWEEP_SEED = 100
SEEDS = range(2)


def jobs() -> Iterator[dict]:
    """The base and LoRA's sweep on a seed of its own; each seed: LoRA at its best rate, and Uni-LoRA at each D/d.

    Last, Uni-LoRA at half and twice that rate, only to see whether the derived one is at the top.
    """
    yield {"method": "base"}
    yield from ({"method": "lora", "rate": rate, "seed": SWEEP_SEED} for rate in LORA_RATES)
    for seed in SEEDS:
        yield {"method": "lora", "rate": best_rate(), "seed": seed}
        yield from ({"method": "unilora", "ratio": ratio, "rate": best_rate(), "seed": seed} for ratio in RATIOS)
    for factor, ratio in itertools.product((0.5, 2), (16, 256)):
        yield {"method": "unilora", "ratio": ratio, "rate": factor * best_rate(), "seed": SWEEP_SEED}


def best_rate() -> float:
    """LoRA's rate with the lowest held-out perplexity of its sweep. Uni-LoRA has no sweep: its rate follows from it."""
    return min(_sweep("lora"), key=lambda row: row["perplexity"])["rate"]


def run_one(job: dict, base: Path, train: torch.Tensor, held_out: torch.Tensor) -> dict:
    """Adapt the base and measure; returns the job with its figures."""
    model = LlamaForCausalLM.from_pretrained(base)
    if job["method"] == "base":
        return {**job, "perplexity": round(perplexity(model, held_out), 3), "trained": 0}
    torch.manual_seed(job["seed"])
    if job["method"] == "unilora":
        layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
        D = RANK * sum(layer.in_features + layer.out_features for layer in layers)
        adapter = unilora_transformers.attach(model, "all-linear", rank=RANK, d=D // job["ratio"], seed=job["seed"])
        assert adapter.spec.D == D
        groups = adapter.parameter_groups(job["rate"])
    else:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": job["rate"]}]
    rng = np.random.default_rng(job["seed"])
    started = time.perf_counter()
    batches = (train[rng.integers(len(train), size=BATCH)] for _ in range(STEPS))
    losses = _train(model, groups, batches, STEPS, desc=None)
    return {
        **job,
        "perplexity": round(perplexity(model, held_out), 3),
        "train_loss": round(statistics.mean(losses[-25:]), 4),
        "theta_rate": groups[0]["initial_lr"],
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def pretrain(base: Path) -> None:
    """Tokenizer and model of the corpora, into ``base``."""
    folder = Path(os.environ["UNILORA_DATA"]) / "corpus"
    texts = [_text(path) for path in sorted(folder.glob("*.gz"))]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (line for text in texts for line in text.splitlines()), VOCABULARY, show_progress=False
    )
    stream = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    batches = (
        torch.stack([stream[i : i + LENGTH] for i in rng.integers(len(stream) - LENGTH, size=PRETRAIN_BATCH)])
        for _ in range(PRETRAIN_STEPS)
    )
    started = time.perf_counter()
    groups = [{"params": list(model.parameters()), "lr": PRETRAIN_RATE}]
    losses = _train(model, groups, batches, PRETRAIN_STEPS, desc="pretraining")
    base.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(base))
    model.save_pretrained(base)
    write(
        "llama_ratio_base",
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "corpus_tokens": len(stream),
            "steps": PRETRAIN_STEPS,
            "tokens_seen": PRETRAIN_STEPS * PRETRAIN_BATCH * LENGTH,
            "loss": round(statistics.mean(losses[-50:]), 4),
            "seconds": round(time.perf_counter() - started),
        },
    )


def _train(model: nn.Module, groups: list[dict], batches: Iterable[torch.Tensor], steps: int, desc: str | None) -> list:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))
    )
    model.train()
    losses = []
    for batch in tqdm(batches, total=steps, desc=desc, disable=desc is None):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def perplexity(model: nn.Module, blocks: torch.Tensor) -> float:
    """exp of the mean loss per token of ``blocks`` (n, LENGTH)."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(16)]
    return math.exp(sum(losses) / len(blocks))


def gsm8k(base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed blocks (n, LENGTH) to train on and held out; an example is "question\\nanswer\\n\\n"."""
    tokenizer = ByteLevelBPETokenizer(str(base / "vocab.json"), str(base / "merges.txt"))
    path = Path(os.environ["UNILORA_DATA"]) / "gsm8k_train" / "train.jsonl.gz"
    rows = [json.loads(line) for line in _text(path).splitlines()]
    texts = [f"{row['question']}\n{row['answer']}\n\n" for row in rows]
    order = np.random.default_rng(0).permutation(len(texts))
    parts = []
    for part in (order[HELD_OUT:], order[:HELD_OUT]):
        stream = torch.tensor([token for i in part for token in tokenizer.encode(texts[i]).ids])
        parts.append(stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH))
    return parts[0], parts[1]


def run(base: Path) -> None:
    """Pretrain unless ``base`` is there, then run what is not in the results file yet."""
    torch.set_num_threads(1)
    if not (base / "config.json").exists():
        pretrain(base)
    (RESULTS / "llama_ratio_machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    train, held_out = gsm8k(base)
    for job in tqdm(jobs(), total=5 + len(LORA_RATES) + len(SEEDS) * (1 + len(RATIOS)), desc="runs"):
        if _key(job) in {_key(row) for row in _rows()}:
            continue
        row = run_one(job, base, train, held_out)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def summary() -> list[dict]:
    """One row a case of the seeds in SEEDS: method, D/d, rates, trained numbers, perplexities."""
    cases: dict[tuple, list[dict]] = {}
    for row in _rows():
        if row.get("seed") != SWEEP_SEED:
            cases.setdefault((row["method"], row.get("ratio", 0)), []).append(row)
    return [{**rows[0], "perplexities": [row["perplexity"] for row in rows]} for _, rows in sorted(cases.items())]


def table() -> None:
    """LoRA's sweep and the means over seeds, as Markdown."""
    for method in ("lora", "unilora"):
        figures = [f"{row.get('ratio', '')} {row['rate']:g} → {row['perplexity']:.1f}" for row in _sweep(method)]
        print(f"{method}, sweep: {', '.join(figures)}")
    print("\n| method | D/d | rate | trained | held-out perplexity | seconds |\n|---|---|---|---|---|---|")
    for case in summary():
        values = case["perplexities"]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        rate = f"{case['theta_rate']:.3g}" if "theta_rate" in case else "-"
        print(
            f"| {case['method']} | {case.get('ratio', '-')} | {rate} | {case['trained']:,} "
            f"| {statistics.mean(values):.2f}{spread} | {case.get('seconds', '-')} |"
        )


def plot() -> None:
    """Perplexity over trained numbers, with LoRA and the base as lines, into results/llama_ratio.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = summary()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    curve = sorted((case for case in cases if case["method"] == "unilora"), key=lambda case: case["trained"])
    means = [statistics.mean(case["perplexities"]) for case in curve]
    axes.plot([case["trained"] for case in curve], means, "o-", label="Uni-LoRA, its rate derived from LoRA's")
    for case in curve:
        axes.plot([case["trained"]] * len(case["perplexities"]), case["perplexities"], ".", color="C0", alpha=0.5)
    for case, mean in zip(curve, means, strict=True):
        axes.annotate(
            f"{case['ratio']}", (case["trained"], mean), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    lora = next(case for case in cases if case["method"] == "lora")
    level = statistics.mean(lora["perplexities"])
    axes.axhline(level, color="C1", label=f"PEFT LoRA, r = {RANK}, best rate: {lora['trained']:,} numbers")
    base = next(case for case in cases if case["method"] == "base")["perplexities"][0]
    axes.axhline(base, color="0.5", linestyle="--", label="no adapter")
    axes.set(
        xscale="log", yscale="log", xlabel="trained numbers d (above each point: D/d)", ylabel="held-out perplexity"
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "llama_ratio.png", dpi=130)


def _text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def _sweep(method: str) -> list[dict]:
    return [row for row in _rows() if row.get("seed") == SWEEP_SEED and row["method"] == method]


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("method", "ratio", "rate", "seed"))


def _rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def smoke() -> None:
    """The base and both methods, two steps each."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(Path(folder))
        train, held_out = gsm8k(Path(folder))
        ways = {"base": {}, "lora": {"rate": LORA_RATES[0]}, "unilora": {"rate": LORA_RATES[0], "ratio": RATIOS[0]}}
        for method, chosen in ways.items():
            print(run_one({"method": method, "seed": 0, **chosen}, Path(folder), train, held_out))


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("what", choices=["run", "plot", "table"], nargs="?" if SMOKE else None)
    made.add_argument("--base", type=Path, help="folder of the pretrained base; made unless it is there")
    arguments = made.parse_args()
    if SMOKE and "UNILORA_DATA" not in os.environ:
        print("left out: the data are in the folder that UNILORA_DATA names, which is unset")
    elif SMOKE:
        smoke()
    elif arguments.what != "run":
        {"plot": plot, "table": table}[arguments.what]()
    elif arguments.base is None:
        made.error("run needs --base FOLDER, outside the repository")
    else:
        run(arguments.base)
