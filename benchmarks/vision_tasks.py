"""Does it learn on images? A small ViT that knows five classes of CIFAR-10, adapted to the rest and to digits.

    UNILORA_DATA=... python benchmarks/vision_tasks.py base --base FOLDER   # the base: once, into a folder of yours
    UNILORA_DATA=... python benchmarks/vision_tasks.py sweep --base FOLDER  # rates, on a seed outside the table
    UNILORA_DATA=... python benchmarks/vision_tasks.py run --base FOLDER    # five seeds, at the sweep's best rates
    UNILORA_DATA=... python benchmarks/vision_tasks.py why --base FOLDER    # other rates, d and r, and more epochs
    python benchmarks/vision_tasks.py table                                 # into docs/benchmarks-vision.md
    python benchmarks/vision_tasks.py plot                                  # into results/vision_tasks.png

Each run is one line of results/vision_tasks.jsonl; one that is there already is not repeated. The base is a ViT of 6
layers of width 128 on 4 × 4 patches of 8 × 8 pixels, trained for 12 epochs on 10,000 images of five classes. One
protocol for all that follows: 2,000 images drawn by the seed, 5 epochs in batches of 32 (310 steps), AdamW without
weight decay, linear schedule with 6 % warm-up, float32, one thread; query and value, r = 4 (D = 12,288). The head is
new; it trains at 1e-2 in every method, and alone at the best of its own sweep.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from common import RESULTS, SMOKE, machine, parser, write
from peft import UniLoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import unilora_timm

FILE = RESULTS / "vision_tasks.jsonl"
DOC = Path(__file__).parents[1] / "docs" / "benchmarks-vision.md"
BEGIN, END = "<!-- begin: vision_tasks.py table -->\n", "<!-- end -->\n"
WIDTH, DEPTH, RANK = 128, 6, 4
D = DEPTH * 2 * RANK * (WIDTH + WIDTH)
BASE_EPOCHS, BASE_RATE, BASE_BATCH = 12, 1e-3, 64
EXAMPLES, EPOCHS, BATCH = (64, 1, 32) if SMOKE else (2000, 5, 32)
SEEDS = range(5)
SWEEP_SEED, SWEEP_TASK = 100, "others"
RATES = {
    "head": [2e-3, 1e-2, 5e-2, 0.1],
    "lora": [5e-3, 1e-2, 2e-2],
    "full": [1e-4, 3e-4, 1e-3, 3e-3],
    "peft-unilora": [0.03, 0.1, 0.3],
}
HEAD_RATE = 1e-2  # of the head beside an adapter; alone it trains at its own best rate
PEFT_DEFAULT = {"method": "peft-unilora", "d": 256, "rate": 1e-4}  # its config's d, and the rate of PEFT's benchmarks


@dataclass(frozen=True)
class Images:
    """Pictures (n, 3, 32, 32), uint8, and their labels (n,), int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """What there is to draw from, what is measured on, and whether images are cropped and flipped in training."""

    pool: Images
    held_out: Images
    augmented: bool

    @property
    def classes(self) -> int:
        return int(self.pool.labels.max()) + 1


@functools.cache
def task(name: str) -> Task:
    if name == "others":
        return Task(cifar("train", 1), cifar("test", 1), augmented=True)
    images = digits()
    return Task(images[:8000], images[8000:], augmented=False)


TASKS = ("others", "digits")


def sweep() -> list[dict]:
    """Each method but ours at a few rates, the head alone first: one task, one seed that the table does not use."""
    return [
        {"task": SWEEP_TASK, "method": method, "rate": rate, "seed": SWEEP_SEED}
        for method, rates in RATES.items()
        for rate in rates
    ]


def table_jobs() -> list[dict]:
    """Every method on both tasks: Uni-LoRA at the rate that is LoRA's best, the others each at its own."""
    methods = [{"method": "unilora", "rate": best_rate("lora")}]
    methods += [{"method": method, "rate": best_rate(method)} for method in RATES]
    return [
        {"task": name, **method, "seed": seed}
        for group in (methods, [PEFT_DEFAULT])
        for seed in SEEDS
        for name in TASKS
        for method in group
    ]


def variants() -> list[dict]:
    """Where the distance to LoRA comes from: the rate, d and r, or the number of steps."""
    rates = [
        {"task": "digits", "method": method, "rate": rate, "seed": SWEEP_SEED}
        for rate in RATES["lora"]
        for method in ("lora", "unilora")
    ]
    cases = [(name, {"method": "unilora", "rank": rank, "d": D // 16}) for rank in (16, 1) for name in reversed(TASKS)]
    cases += [("digits", {"method": "unilora", "d": D // 4}), ("digits", {"method": "unilora", "rank": 8})]
    cases += [("others", {"method": "unilora", "d": D // 4})]
    cases += [("digits", {"method": method, "epochs": 15}) for method in ("unilora", "lora")]
    rate = best_rate("lora")
    return rates + [{"task": name, "rate": rate, **case, "seed": seed} for name, case in cases for seed in SEEDS]


def best_rate(method: str) -> float:
    """The rate with the best figure of the sweep; the smaller one where two are equal."""
    rows = [
        row for row in _rows() if _case(row) == (SWEEP_TASK, method, None, None, None) and row["seed"] == SWEEP_SEED
    ]
    return max(sorted(rows, key=lambda row: row["rate"]), key=lambda row: row["accuracy"])["rate"]


# ---- one run ----------------------------------------------------------------------------------------------------


def run_one(job: dict, base: Path) -> dict:
    """Train, evaluate and save one job; returns it with its figures.

    The sweep is judged on images of the pool that it does not train on, the table on the held-out ones.
    """
    given, seed = task(job["task"]), job["seed"]
    order = torch.randperm(len(given.pool), generator=torch.Generator().manual_seed(seed))
    judge = given.pool[order[EXAMPLES : EXAMPLES + 2000]] if seed == SWEEP_SEED else given.held_out
    torch.manual_seed(seed)
    model = new_model()
    model.load_state_dict(load_file(base / "base.safetensors"))
    model.reset_classifier(given.classes)
    model, groups, save = _adapt(model, job, job["rate"] if job["method"] == "head" else HEAD_RATE)
    chosen, epochs = given.pool[order[:EXAMPLES]], job.get("epochs", EPOCHS)
    seconds, losses = fit(model, groups, chosen, epochs, BATCH, seed=seed, augmented=given.augmented)
    adapter, head = (sum(p.numel() for p in group["params"]) for group in groups)
    return {
        **job,
        "accuracy": round(accuracy(model, judge), 4),
        "losses": [round(statistics.mean(losses[i : i + 62]), 4) for i in range(0, len(losses), 62)],
        "rates": [group["initial_lr"] for group in groups],
        "adapter": adapter,
        "head": head,
        "bytes": _bytes(save),
        "steps": len(losses),
        "seconds": round(seconds, 1),
    }


def _adapt(model: nn.Module, job: dict, head_rate: float) -> tuple[nn.Module, list[dict], Callable[[Path], None]]:
    """The adapted model, the optimiser's two groups (adapter and head), and what saves both into a folder."""
    method, rate = job["method"], job["rate"]
    if method == "unilora":
        adapter = unilora_timm.attach(model, rank=job.get("rank", RANK), d=job.get("d", "auto"), seed=job["seed"])
        assert "rank" in job or adapter.spec.D == D
        return model, adapter.parameter_groups(rate, head_rate), lambda folder: adapter.save(folder / "a.safetensors")
    if method == "peft-unilora":
        d = job.get("d", D // 16)
        config = UniLoraConfig(
            r=RANK, theta_d_length=d, proj_seed=job["seed"], target_modules=["qkv"], modules_to_save=["head"]
        )
        model = get_peft_model(model, config)
        save = model.save_pretrained
    else:
        model.requires_grad_(method == "full")
        model.head.requires_grad_(True)
        if method == "lora":
            for block in model.blocks:
                block.attn.qkv = Lora(block.attn.qkv, job.get("rank", RANK))

        def save(folder: Path) -> None:
            save_file(
                {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, folder / "a.safetensors"
            )

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if "head." in name]
    rest = [p for name, p in trained if "head." not in name]
    return model, [{"params": rest, "lr": rate}, {"params": head, "lr": head_rate}], save


class Lora(nn.Module):
    """Plain LoRA on q and v of a fused qkv: A uniform in ±1/√in, B zero, scale 1."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, width = base, base.in_features
        self.A = nn.Parameter(torch.empty(2, rank, width).uniform_(-1, 1) / width**0.5)
        self.B = nn.Parameter(torch.zeros(2, width, rank))

    def forward(self, x: Tensor) -> Tensor:
        q, v = (x @ A.T @ B.T for A, B in zip(self.A, self.B, strict=True))
        return self.base(x) + torch.cat([q, torch.zeros_like(q), v], -1)


def fit(
    model: nn.Module, groups: list[dict], images: Images, epochs: int, batch: int, *, seed: int, augmented: bool
) -> tuple[float, list[float]]:
    """Train; the processor's seconds (other programs share the machine), and the loss of every step."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    per_epoch = len(images) // batch
    steps = epochs * per_epoch
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    started, losses = time.process_time(), []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch)[:per_epoch]:
            pixels, labels = images.pixels[chosen], images.labels[chosen]
            if augmented:
                pixels = crop_and_flip(pixels, generator)
            loss = cross_entropy(model(normal(pixels)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    return time.process_time() - started, losses


def accuracy(model: nn.Module, images: Images) -> float:
    model.eval()
    with torch.inference_mode():
        parts = zip(images.pixels.split(250), images.labels.split(250), strict=True)
        hits = sum((model(normal(pixels)).argmax(-1) == labels).sum().item() for pixels, labels in parts)
    return hits / len(images)


def _bytes(save: Callable[[Path], None]) -> int:
    """Bytes of the weights that the method saves, the head included."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


# ---- the base ---------------------------------------------------------------------------------------------------


def new_model() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=5
    )


def train_base(folder: Path) -> None:
    """All training images of every second class, from the first."""
    torch.manual_seed(0)
    model = new_model()
    groups = [{"params": list(model.parameters()), "lr": BASE_RATE, "weight_decay": 0.05}]
    seconds, losses = fit(model, groups, cifar("train", 0), BASE_EPOCHS, BASE_BATCH, seed=0, augmented=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "base.safetensors")
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(model, cifar("test", 0)),
        "loss": round(statistics.mean(losses[-len(losses) // BASE_EPOCHS :]), 4),
        "steps": len(losses),
        "seconds": round(seconds),
        "sha256": hashlib.sha256((folder / "base.safetensors").read_bytes()).hexdigest(),
    }
    print(write("vision_base", figures), figures)


# ---- images -----------------------------------------------------------------------------------------------------


def normal(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels (reflected at the border), and half of them mirrored."""
    n, _, height, width = pixels.shape
    padded = pad(pixels.float(), (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    down, right = torch.randint(0, 9, (2, n, 1), generator=generator)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns, columns.flip(1)) + right
    rows = torch.arange(height) + down
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cifar(part: str, first: int) -> Images:
    """Every second class in alphabetical order, from the ``first``, 0 or 1."""
    classes = [images for (where, _), images in _archive().items() if where == part][first::2]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(images) for images in classes]))
    return Images(torch.cat(classes), labels)


@functools.cache
def _archive() -> dict[tuple[str, str], Tensor]:
    """(train or test, class) → pictures (n, 3, 32, 32)."""
    path = Path(os.environ["UNILORA_DATA"]) / "cifar10_a" / "cifar10_a.tar.xz"
    found: dict[tuple[str, str], list] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                part, label, _ = member.name.split("/")
                image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                found.setdefault((part, label), []).append(np.asarray(image))
    return {key: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) for key, images in sorted(found.items())}


def digits() -> Images:
    """10,000 digits in a fixed random order, with a border of 2 pixels and three equal channels."""
    folder = Path(os.environ["UNILORA_DATA"]) / "mnist_t10k"
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, axis=1)
    return Images(torch.from_numpy(pixels[order]), torch.from_numpy(labels[order]))


# ---- results ----------------------------------------------------------------------------------------------------


def run(jobs: list[dict], base: Path, part: str) -> None:
    """Run what is not in the results file yet; ``part`` "i/n" takes every n-th of it, for parallel processes."""
    first, step = map(int, part.split("/"))
    (RESULTS / "vision_tasks_machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    done = {_key(row) for row in _rows()}
    for job in tqdm([job for job in jobs if _key(job) not in done][first::step], desc="runs"):
        row = run_one(job, base)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table() -> None:
    """The sweeps, and means and standard deviations over seeds, as Markdown, into the page."""
    main, others = summary()
    lines = [*_sweeps(SWEEP_TASK, list(RATES)), "", *_means(main, TASKS)]
    lines += ["", *_sweeps("digits", ["lora", "unilora"]), "", *_means(others, ("digits",))]
    text = DOC.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOC.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")


def _sweeps(name: str, methods: list[str]) -> list[str]:
    lines = [f"| method | {name}, seed {SWEEP_SEED}: rate → accuracy |", "|---|---|"]
    for method in methods:
        rows = [row for row in _rows() if _case(row)[:2] == (name, method) and row["seed"] == SWEEP_SEED]
        figures = [f"{row['rate']:g} → {row['accuracy']:.3f}" for row in sorted(rows, key=lambda row: row["rate"])]
        lines.append(f"| {method} | {', '.join(figures)} |")
    return lines


def _means(cases: dict[tuple, list[dict]], tasks: tuple[str, ...]) -> list[str]:
    lines = [f"| method | rate | {' | '.join(tasks)} | adapter | head | bytes | seconds of CPU |"]
    lines.append("|---|---|" + "---|" * (len(tasks) + 4))
    for case, rows in cases.items():
        parts = [[row for row in rows if row["task"] == name] for name in tasks]
        figures = [_spread([row["accuracy"] for row in part]) for part in parts]
        seconds = [f"{statistics.median(row['seconds'] for row in part):.0f}" for part in parts]
        heads, sizes = ([f"{part[0][field]:,}" for part in parts] for field in ("head", "bytes"))
        lines.append(
            f"| {_title(case)} | {rows[0]['rate']:g} | {' | '.join(figures)} | {rows[0]['adapter']:,} "
            f"| {' / '.join(heads)} | {' / '.join(sizes)} | {' / '.join(seconds)} |"
        )
    return lines


def plot() -> None:
    """Accuracy over trained numbers and the loss of every epoch, a column for each task, into results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(TASKS), figsize=(10, 7.5), layout="constrained")
    for (above, below), name in zip(axes.T, TASKS, strict=True):
        for number, (case, every) in enumerate(summary()[0].items()):
            rows = [row for row in every if row["task"] == name]
            values = [row["accuracy"] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else None
            mean, style = statistics.mean(values), {"color": f"C{number}"}
            if rows[0]["adapter"]:
                above.errorbar(rows[0]["adapter"], mean, spread, fmt="o", capsize=3, label=_title(case), **style)
            else:
                above.axhline(mean, linestyle="--", label=_title(case), **style)
            curve = [statistics.mean(losses) for losses in zip(*(row["losses"] for row in rows), strict=True)]
            below.plot(range(1, len(curve) + 1), curve, ".-", label=_title(case), **style)
        above.set(title=name, xscale="log", xlabel="trained numbers beside the head", ylabel="held-out accuracy")
        below.set(xlabel="epoch", ylabel="training loss, mean of seeds", xticks=range(1, EPOCHS + 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(RESULTS / "vision_tasks.png", dpi=110)


def summary() -> tuple[dict[tuple, list[dict]], dict[tuple, list[dict]]]:
    """(method, rank, d, epochs) → its runs, by trained numbers; first the cases of both tasks, then the others."""
    cases: dict[tuple, list[dict]] = {}
    for row in sorted(_rows(), key=lambda row: row["adapter"]):
        if row["seed"] in SEEDS:
            cases.setdefault(_case(row)[1:], []).append(row)
    both = {case for case, rows in cases.items() if {row["task"] for row in rows} == set(TASKS)}
    main = {case: rows for case, rows in cases.items() if case in both}
    return main, {case: rows for case, rows in cases.items() if case not in both}


def _title(case: tuple) -> str:
    method, rank, d, epochs = case
    parts = {"r": rank, "d": d, "epochs": epochs}
    return ", ".join([method, *(f"{name} = {value}" for name, value in parts.items() if value)])


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation, and how many seeds it is of, where some are missing."""
    if len(values) < 2:
        return ", ".join(f"{value:.3f} (1 seed)" for value in values) or "-"
    count = "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}{count}"


def _case(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("task", "method", "rank", "d", "epochs"))


def _key(row: dict) -> tuple:
    return (*_case(row), row["rate"], row["seed"])


def _rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def smoke() -> None:
    """Every method on 64 images, beside a base that was not trained."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(new_model().state_dict(), Path(folder, "base.safetensors"))
        for method, rates in {"unilora": [HEAD_RATE], **RATES}.items():
            print(run_one({"task": "digits", "method": method, "rate": rates[0], "seed": 0}, Path(folder)))


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("what", choices=["base", "sweep", "run", "why", "table", "plot"], nargs="?" if SMOKE else None)
    made.add_argument("--base", type=Path, help="folder of the base's weights, outside the repository")
    made.add_argument("--part", default="0/1", metavar="I/N", help="every N-th run, from the I-th (default: all)")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    if SMOKE and "UNILORA_DATA" not in os.environ:
        print("left out: the data are in the folder that UNILORA_DATA names, which is unset")
    elif SMOKE:
        smoke()
    elif arguments.what in ("table", "plot"):
        {"table": table, "plot": plot}[arguments.what]()
    elif arguments.base is None:
        made.error(f"{arguments.what} needs --base FOLDER, outside the repository")
    elif arguments.what == "base":
        train_base(arguments.base)
    else:
        jobs = {"sweep": sweep, "run": table_jobs, "why": variants}[arguments.what]()
        run(jobs, arguments.base, arguments.part)
