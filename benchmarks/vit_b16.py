"""A training step of ViT-B/16 at 224: Uni-LoRA beside LoRA, PEFT's methods and full fine-tuning; time and peak memory.

    python benchmarks/vit_b16.py                  # on the processor, about eight minutes on two cores
    python benchmarks/vit_b16.py --device cuda

Query and value, r = 4, batches of 8 random images, float32, random weights, AdamW, ten classes, the head trained in
every case. PEFT cannot adapt blocks of a fused qkv, so its LoRA and its UniLora adapt qkv whole; ``lora`` is the method
of that name here, of q and v, the outputs that ours adapts. Forward, backward and optimiser of each case take turns in
one process, and the order turns round after round. Peak memory: each case in a process of its own, VmHWM after three
steps on the processor, torch.cuda.max_memory_allocated on a GPU. Writes results/vit_b16_cpu.json or vit_b16_cuda.json.
"""

import json
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from common import SMOKE, again, machine, parser, peak, write
from peft import LoraConfig, UniLoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import unilora_timm

RANK, BATCH, CLASSES = 4, 1 if SMOKE else 8, 10
MODEL, WIDTH = ("vit_tiny_patch16_224", 192) if SMOKE else ("vit_base_patch16_224", 768)
D = 12 * 2 * RANK * (WIDTH + WIDTH)


def unilora(model: nn.Module) -> nn.Module:
    unilora_timm.attach(model, rank=RANK)
    return model


def lora(model: nn.Module) -> nn.Module:
    unilora_timm.attach(model, method="lora", rank=RANK)
    return model


def peft_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"], modules_to_save=["head"]))


def peft_unilora(model: nn.Module) -> nn.Module:
    config = UniLoraConfig(r=RANK, theta_d_length=D // 16, target_modules=["qkv"], modules_to_save=["head"])
    return get_peft_model(model, config)


def full(model: nn.Module) -> nn.Module:
    return model


CASES = {"unilora": unilora, "peft-lora": peft_lora, "lora": lora, "peft-unilora": peft_unilora, "full": full}
if SMOKE:
    CASES = {name: CASES[name] for name in ("unilora", "peft-lora")}


def stepper(name: str, device: str) -> tuple[Callable[[], None], int]:
    """A function that makes one training step of a case, and how many numbers it trains."""
    torch.manual_seed(0)
    model = CASES[name](timm.create_model(MODEL, num_classes=CLASSES)).to(device).train()
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    labels = torch.randint(0, CLASSES, (BATCH,), device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, sum(parameter.numel() for parameter in trained)


def times(device: str, repeats: int, warmup: int) -> dict[str, dict]:
    """Case → medians and extremes of a step's seconds, and the median ratio to PEFT LoRA's step of the same round."""
    cases = {name: stepper(name, device) for name in CASES}
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    names = list(CASES)
    for round_ in tqdm(range(warmup + repeats), desc="rounds"):
        for name in names:
            started = time.perf_counter()
            cases[name][0]()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - started)
        names = names[1:] + names[:1]
    base = seconds["peft-lora"]
    return {
        name: {
            "trained": cases[name][1],
            "median_s": round(median(taken), 4),
            "min_s": round(min(taken), 4),
            "max_s": round(max(taken), 4),
            "to_peft_lora": round(median(taken) / median(base), 4),
            "to_peft_lora_by_round": round(median(a / b for a, b in zip(taken, base, strict=True)), 4),
        }
        for name, taken in seconds.items()
    }


def most_memory(name: str, device: str) -> int:
    """Peak bytes of this process after three steps of one case."""
    step, _ = stepper(name, device)
    for _ in range(3):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak()


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--repeats", type=int, default=1 if SMOKE else 15, help="rounds that count")
    command.add_argument("--warmup", type=int, default=0 if SMOKE else 2, help="rounds before them")
    command.add_argument("--peak", choices=list(CASES), help="the memory of one case, in this process")
    arguments = command.parse_args()
    if arguments.peak:
        print(json.dumps(most_memory(arguments.peak, arguments.device)))
        return
    results = times(arguments.device, arguments.repeats, arguments.warmup)
    for name in tqdm(CASES, desc="memory"):
        results[name]["peak_bytes"] = json.loads(again(__file__, "--device", arguments.device, "--peak", name))
    header = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else machine()["cpu"],
        "threads": torch.get_num_threads(),
        "rounds": arguments.repeats,
    }
    path = write(f"vit_b16_{arguments.device}", {**header, **results})
    print("| case | trained | step, median s | to PEFT LoRA | by round | peak GB |\n|---|---|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['trained']:,} | {row['median_s']:.3f} | {row['to_peft_lora']:.3f} "
            f"| {row['to_peft_lora_by_round']:.3f} | {row['peak_bytes'] / 1e9:.2f} |"
        )
    print(path)


if __name__ == "__main__":
    main()
