"""A vision transformer adapted by one vector: Uni-LoRA beside LoRA and a trained head; no network, no GPU.

A timm ViT learns the digits 0-4 of scikit-learn's bundled images, is frozen, and is adapted to the digits 5-9 from 150
images. Then the saved adapter is loaded in a new process, and read with NumPy alone.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import unilora_timm
from unilora_core import save_adapter
from unilora_torch import Target

SEED, BATCH = 0, 64
PRETRAINING_STEPS, PRETRAINING_IMAGES = 400, 700
STEPS, IMAGES = 200, 150
RANK = 4
LORA_RATE, HEAD_RATE = 2e-2, 3e-2
"""The same for every method, and near LoRA's best; Uni-LoRA turns the first into θ_d's rate by its default factor."""


@dataclass
class Result:
    """What one method gave."""

    method: str
    accuracy: float
    trained: int
    """Numbers that train beside the head."""
    head: int
    adapter_bytes: int
    """On disk, without the head; `file_bytes` is with it."""
    file_bytes: int
    seconds: float
    losses: list[float] = field(repr=False)


# ---- data and model -------------------------------------------------------------------------------------------------


def digits(first: int) -> tuple[Tensor, Tensor]:
    """Five digits from ``first`` on, shuffled: images (n, 1, 32, 32), labels (n,) from 0 to 4."""
    from sklearn.datasets import load_digits  # slow to import, and the check needs no data set

    bundle = load_digits()
    images = torch.tensor(bundle.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - 0.3) / 0.35, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(bundle.target) - first
    mine = torch.nonzero((labels >= 0) & (labels < 5)).squeeze(1)
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(SEED))]
    return images[mine], labels[mine]


def vit() -> nn.Module:
    """A small timm ViT: 16 patches of 8×8, four blocks of width 96, 0.45 million parameters."""
    torch.manual_seed(SEED)
    return timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        patch_size=8,
        in_chans=1,
        embed_dim=96,
        depth=4,
        num_heads=4,
        num_classes=5,
    )


def base_vit(folder: Path) -> nn.Module:
    """The pretrained ViT with a new head."""
    model = vit()
    model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned (±14°), scaled (±15 %) and shifted (±2 pixels): (n, 1, 32, 32)."""
    turn, size, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    cos, sin = (1 + 0.15 * size) * torch.cos(turn / 4), (1 + 0.15 * size) * torch.sin(turn / 4)
    rows = torch.stack([cos, -sin, right / 8, sin, cos, down / 8], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ---- training -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, groups: list[dict], images: Tensor, labels: Tensor, steps: int, title: str) -> list[float]:
    """AdamW with a short warm-up and a cosine decay; the same batches for every method. Returns the losses."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    losses = []
    for _ in (progress := tqdm(range(steps), desc=f"{title:16}", mininterval=0.5, leave=True)):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(n, 5), in eval mode."""
    return model.eval()(images)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    return (logits(model, images).argmax(1) == labels).double().mean().item()


def pretrain(folder: Path) -> float:
    """Train every weight on the digits 0-4, write them without the head; returns the accuracy on held-out images."""
    images, labels = digits(0)
    model = vit()
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.05}]
    train(model, groups, images[:PRETRAINING_IMAGES], labels[:PRETRAINING_IMAGES], PRETRAINING_STEPS, "pretraining")
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    save_file(body, folder / "base.safetensors")
    return accuracy(model, images[PRETRAINING_IMAGES:], labels[PRETRAINING_IMAGES:])


# ---- three ways to adapt --------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Plain LoRA beside some rows of a linear layer: B·A·x, A as in its paper's code, B = 0, scaling 1."""

    def __init__(self, model: nn.Module, target: Target):
        super().__init__()
        self.A = nn.Parameter(torch.empty(RANK, target.in_features))
        self.B = nn.Parameter(torch.zeros(target.out_features, RANK))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.first_row = target.first_row
        model.get_submodule(target.module).register_forward_hook(self.add)

    def add(self, _module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """The layer's output with B·A·x added to its rows."""
        update = F.linear(F.linear(args[0], self.A), self.B)
        return output + F.pad(update, (self.first_row, output.shape[-1] - self.first_row - update.shape[-1]))


Save = Callable[[Path, bool], None]


def adapt_head(model: nn.Module) -> tuple[list[dict], Save]:
    """Only the head trains."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)

    def save(path: Path, with_head: bool) -> None:
        save_file(head_of(model) if with_head else {}, path)

    return [{"params": list(model.head.parameters()), "lr": HEAD_RATE}], save


def adapt_lora(model: nn.Module) -> tuple[list[dict], Save]:
    """LoRA at the same layers and of the same rank as Uni-LoRA, and the head."""
    groups, _ = adapt_head(model)
    loras = {target.name: LoRA(model, target) for target in unilora_timm.find_targets(model)}
    factors = {f"{name}.{key}": p for name, lora in loras.items() for key, p in lora.named_parameters()}

    def save(path: Path, with_head: bool) -> None:
        save_file({name: p.detach() for name, p in factors.items()} | (head_of(model) if with_head else {}), path)

    return [{"params": list(factors.values()), "lr": LORA_RATE, "weight_decay": 0.0}, *groups], save


def adapt_unilora(model: nn.Module) -> tuple[list[dict], Save]:
    """One vector, by default, and the head."""
    adapter = unilora_timm.attach(model, rank=RANK)
    tqdm.write(adapter.summary())
    tqdm.write(f"learning rate of θ_d: {adapter.learning_rate(LORA_RATE):g}, from {LORA_RATE:g} for LoRA")

    def save(path: Path, with_head: bool) -> None:
        if with_head:
            adapter.save(path)
        else:
            save_adapter(path, adapter.spec, adapter.theta_d.detach())

    return adapter.parameter_groups(LORA_RATE, HEAD_RATE), save


METHODS = {"head only": adapt_head, "LoRA": adapt_lora, "Uni-LoRA": adapt_unilora}


def head_of(model: nn.Module) -> dict[str, Tensor]:
    """The head's tensors by name."""
    return {f"head.{name}": tensor.detach() for name, tensor in model.head.named_parameters()}


def compare(method: str, folder: Path) -> tuple[Result, nn.Module]:
    """Adapt the frozen ViT to the digits 5-9 and save what was trained."""
    images, labels = digits(5)
    model = base_vit(folder)
    torch.manual_seed(SEED)
    groups, save = METHODS[method](model)
    began = time.perf_counter()
    losses = train(model, groups, images[:IMAGES], labels[:IMAGES], STEPS, method)
    seconds = time.perf_counter() - began
    path = folder / f"{method.replace(' ', '-').lower()}.safetensors"
    save(path, False)
    adapter_bytes = path.stat().st_size if method != "head only" else 0
    save(path, True)
    head = sum(parameter.numel() for parameter in model.head.parameters())
    trained = sum(parameter.numel() for group in groups for parameter in group["params"]) - head
    right = accuracy(model, images[IMAGES:], labels[IMAGES:])
    return Result(method, right, trained, head, adapter_bytes, path.stat().st_size, seconds, losses), model


# ---- the saved file -------------------------------------------------------------------------------------------------


def keep_for_checks(model: nn.Module, folder: Path) -> None:
    """Write what the checks compare with: held-out images (n, 1, 32, 32), their logits (n, 5), and θ_D (D,)."""
    images = digits(5)[0][IMAGES:]
    np.savez(folder / "predictions.npz", images=images, logits=logits(model, images))
    factors = model.unilora.factors().values()
    np.save(folder / "theta_D.npy", torch.cat([factor.detach().flatten() for factor in factors]))


def check(folder: Path) -> None:
    """In a new process: load the adapter onto the base model, and compare the predictions."""
    model = base_vit(folder)
    nn.init.zeros_(model.head.weight)  # the head comes from the file
    unilora_timm.load(model, folder / "uni-lora.safetensors")
    kept = np.load(folder / "predictions.npz")
    found = logits(model, torch.from_numpy(kept["images"])).numpy()
    if not np.array_equal(found, kept["logits"]):
        sys.exit(
            f"the reloaded adapter predicts otherwise: logits differ by {np.abs(found - kept['logits']).max():.2g}."
        )


def run_checks(folder: Path) -> None:
    """Both checks, each in a process of its own; exits with their message where one fails."""
    here = Path(__file__).resolve()
    adapter = str(folder / "uni-lora.safetensors")
    checks = {
        "reloaded in a new process: the same predictions": [str(here), "--check", "--out", str(folder.parent)],
        "read by NumPy alone: the same θ_D, bit for bit": [
            str(here.with_name("vision_numpy.py")),
            adapter,
            str(folder / "theta_D.npy"),
        ],
    }
    for what, command in checks.items():
        if subprocess.run([sys.executable, *command], check=False).returncode:
            sys.exit(f"FAILED: {what}")
        tqdm.write(f"ok: {what}")


# ---- the report -----------------------------------------------------------------------------------------------------


def report(results: list[Result], base_accuracy: float, folder: Path) -> None:
    """metrics.json, metrics.csv and losses.png in ``folder``; the table on the terminal."""
    rows = [asdict(result) for result in results]
    setting = {"seed": SEED, "rank": RANK, "steps": STEPS, "images": IMAGES, "lora_rate": LORA_RATE}
    metrics = {"setting": setting, "base_accuracy": base_accuracy, "results": rows}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "losses"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(results, folder / "losses.png")
    held_out = len(digits(5)[0]) - IMAGES
    tqdm.write(f"\nA ViT trained on the digits 0-4 ({base_accuracy:.1%} of held-out images), adapted to 5-9")
    tqdm.write(f"from {IMAGES} images; accuracy on the {held_out} others (one standard error: 1 point).\n")
    tqdm.write(f"{'':10}{'accuracy':>10}{'trained':>9}{'+ head':>8}{'bytes':>9}{'with head':>11}{'seconds':>9}")
    for r in results:
        tqdm.write(
            f"{r.method:10}{r.accuracy:>10.1%}{r.trained:>9,}{r.head:>8,}{r.adapter_bytes:>9,}{r.file_bytes:>11,}"
            f"{r.seconds:>9.1f}"
        )
    tqdm.write(f"\nplot, metrics and files: {folder}\n")


def plot(results: list[Result], path: Path) -> None:
    """The loss curves, each averaged over 10 steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        smooth = np.convolve(result.losses, np.ones(10) / 10, mode="valid")
        label = f"{result.method}: {result.trained + result.head:,} numbers, {result.accuracy:.1%}"
        axes.plot(range(10, len(result.losses) + 1), smooth, label=label)
    axes.set(xlabel="step", ylabel="loss", title="A ViT of the digits 0-4 adapted to 5-9")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Pretrain, adapt in three ways, check, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for tensors this small; and the same numbers on any machine's cores
    folder = arguments.out / "vision"
    if arguments.check:
        check(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    base_accuracy = pretrain(folder)
    results = []
    for method in METHODS:
        result, model = compare(method, folder)
        results.append(result)
    keep_for_checks(model, folder)
    report(results, base_accuracy, folder)
    run_checks(folder)
    head, lora, unilora = (result.accuracy for result in results)
    if unilora < (head + lora) / 2:
        sys.exit(
            f"FAILED: Uni-LoRA ({unilora:.1%}) should be nearer to LoRA ({lora:.1%}) than to the head ({head:.1%})."
        )


if __name__ == "__main__":
    main()
