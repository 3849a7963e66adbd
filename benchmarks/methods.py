"""Every method on a language model, a ViT and a plain module: attach, 20 steps, save, a new process, merge.

    python benchmarks/methods.py               # a minute or two, no GPU, no network; `nox -s figures` runs it
    python benchmarks/methods.py --write       # benchmarks/results/methods.json
    python benchmarks/methods.py --write-doc   # its table into docs/framework.md

A row says d and D, the bytes of the file, the loss before and after, the largest difference of the logits in a new
process, and of the merged model's. It ends with an error where one of them is not as it should be.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import common  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import unilora_torch  # noqa: E402
from unilora_core.methods import METHODS  # noqa: E402

WIDTH, STEPS, LORA_RATE = 64, 5 if common.SMOKE else 20, 2e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 64},
    "lora-xs": {"rank": 8},
    "vb-lora": {"vectors": 32, "length": 16},
    "fourierft": {"frequencies": 100},
    "gaussian": {"d": 256},
}
"""What models of width 64 need, or a minute allows, in place of the methods' defaults."""
MODELS = ("llama", "plain") if common.SMOKE else ("llama", "vit", "plain")
CHOSEN = ["uni-lora", "vera", "gpart"] if common.SMOKE else list(METHODS)
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def build(kind: str) -> tuple[nn.Module, Any]:
    """A random model, the same in each process, and the module that attaches to it."""
    torch.manual_seed(0)
    if kind == "plain":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 16)), unilora_torch
    if kind == "vit":
        import timm

        import unilora_timm

        shape = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "num_classes": 10}
        return timm.create_model("vit_tiny_patch16_224", **shape), unilora_timm
    import transformers

    import unilora_transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config), unilora_transformers


def batch(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, the same each time."""
    generator = torch.Generator().manual_seed(1)
    if kind == "llama":
        ids = torch.randint(0, 256, (8, 16), generator=generator)
        return ids, ids
    shape = (32, WIDTH) if kind == "plain" else (32, 3, 32, 32)
    return torch.randn(shape, generator=generator), torch.arange(32) % 10


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    """Of the batch."""
    output = model(batch(kind)[0])
    return output.logits if kind == "llama" else output


def loss(model: nn.Module, kind: str) -> torch.Tensor:
    """Cross entropy, of the next token for a language model."""
    found, labels = logits(model, kind), batch(kind)[1]
    if kind == "llama":
        found, labels = found[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(found, labels)


def run(method: str, kind: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    model, library = build(kind)
    model.eval()
    with torch.no_grad():
        base = logits(model, kind)
    heads = {} if kind == "plain" else {"modules_to_save": ()}
    adapter = library.attach(model, method=method, **heads, **OPTIONS.get(method, {}))
    with torch.no_grad():
        start = (logits(model, kind) - base).abs().max().item()
    optimiser, losses = torch.optim.Adam(adapter.parameter_groups(LORA_RATE)), []
    for _ in range(STEPS):
        value = loss(model, kind)
        losses.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    adapter.save(folder / f"{method}.safetensors")
    with torch.no_grad():
        losses.append(loss(model, kind).item())
        adapted = logits(model, kind)
        torch.save(adapted, folder / f"{method}.pt")
        adapter.merge()
        merged = (logits(model, kind) - adapted).abs().max().item()
        adapter.detach()
        unmerged = torch.equal(logits(model, kind), base)
    return {
        "d": adapter.spec.d,
        "D": adapter.spec.D,
        "bytes": (folder / f"{method}.safetensors").stat().st_size,
        "at the start": start,
        "losses": losses,
        "merged": merged,
        "unmerged exactly": unmerged,
        "moved": (adapted - base).abs().max().item(),
    }


def run_all(methods: list[str], kind: str) -> dict[str, dict[str, Any]]:
    """Every method on one model; their files are loaded in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = {method: run(method, kind, Path(folder)) for method in methods}
        again = json.loads(common.again(__file__, "--reload", folder, kind))
    return {method: row | {"new process": again[method]} for method, row in rows.items()}


def reload(folder: Path, kind: str) -> dict[str, float]:
    """In a new process: method → the largest difference of the loaded adapter's logits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        model, library = build(kind)
        model.eval()
        (library if kind == "llama" else unilora_torch).load(model, path)
        with torch.no_grad():
            found[path.stem] = (logits(model, kind) - torch.load(path.with_suffix(".pt"))).abs().max().item()
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | model | d | D | file | loss | new process | merged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        method, kind = name.rsplit(" ", 1)
        lines.append(
            f"| `{method}` | {kind} | {row['d']:,} | {row['D']:,} | {row['bytes']:,} | "
            f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f} | {row['new process']:.0e} | {row['merged']:.0e} |"
        )
    return "\n".join(lines)


def write_doc(rows: dict[str, dict[str, Any]]) -> None:
    """The table between its marks in docs/framework.md."""
    page = common.DOCS / "framework.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run, or reload what a run has saved."""
    parser = common.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=CHOSEN, metavar="NAME")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/methods.json")
    parser.add_argument("--write-doc", action="store_true", help="write the committed results into the page")
    parser.add_argument(
        "--reload", nargs=2, metavar=("FILE", "KIND"), help="load what a run has saved, in this process"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reload:
        print(json.dumps(reload(Path(arguments.reload[0]), arguments.reload[1])))
        return
    if arguments.write_doc:
        write_doc(json.loads((common.RESULTS / "methods.json").read_text(encoding="utf-8"))["rows"])
        return
    kinds = {kind: run_all(arguments.methods, kind) for kind in MODELS}
    rows = {f"{method} {kind}": kinds[kind][method] for method in arguments.methods for kind in MODELS}
    print(table(rows))
    if bad := [name for name, row in rows.items() if not holds(row)]:
        sys.exit(f"the loss did not fall, or loading or merging gave other logits: {', '.join(bad)}")
    if arguments.write or common.SMOKE:
        common.write("methods", {"steps": STEPS, "lora_rate": LORA_RATE, "rows": rows})
    if common.SMOKE:
        write_doc(rows)


def holds(row: dict[str, Any]) -> bool:
    """Whether a row shows what the page says."""
    fell = row["losses"][-1] < row["losses"][0]
    return fell and row["new process"] == 0 and row["merged"] < 1e-5 and row["unmerged exactly"]


if __name__ == "__main__":
    main()
