"""The page's sections of one card: a table for each part that has results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.tables import shown, table

Rows = list[dict[str, Any]]
"""Settings and figures of each, in one."""

VERSIONS = ("driver", "cuda", "torch", "triton", "transformers", "peft", "timm", "jax", "jaxlib", "bitsandbytes")


def on_card(folder: Path) -> Iterator[str]:
    """A section for each part that has been measured on a card."""
    for part, (title, text, lines_of) in PARTS.items():
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        yield from [f"## {found['machine']['card']}: {title}", "", f"`python benchmarks/gpu {part}`; {text}", ""]
        yield from [f"Made with {made_with(found['machine'])}.", ""]
        rows = [
            {**row["settings"], **row["outcome"]["figures"]} for row in found["rows"] if "figures" in row["outcome"]
        ]
        yield from lines_of(rows)
        if without := [line for row in found["rows"] for line in why_not(row)]:
            yield from [*without, ""]


def why_not(row: dict[str, Any]) -> Iterator[str]:
    """A line for a row that failed or was skipped."""
    for word in ("failed", "skipped"):
        if why := row["outcome"].get(word):
            yield f"* {settings_of(row)}: {word}, {' '.join(why.split())[:300]}"


def made_with(machine: dict[str, Any]) -> str:
    """The versions that matter."""
    return ", ".join(f"{name} {machine[name]}" for name in VERSIONS if machine.get(name))


def settings_of(row: dict[str, Any]) -> str:
    """In words."""
    return ", ".join(f"{name} = {value}" for name, value in row["settings"].items())


def gigabytes(size: int | None) -> float | None:
    """Bytes in 10⁹."""
    return None if size is None else size / 1e9


def of_correct(rows: Rows) -> Iterator[str]:
    """What was checked, and with which result."""
    checks = ("check", "files", "framework", "width", "dtype")
    for row in rows:
        what = ", ".join(str(row[name]) for name in checks if name in row)
        figures = {name: value for name, value in row.items() if name not in checks}
        yield f"* {what}: " + "; ".join(f"{name} {listed(value)}" for name, value in figures.items())
    yield ""


def listed(value: Any) -> str:
    """A figure in words."""
    return ", ".join(value) if isinstance(value, list) else shown(value)


def of_projection(rows: Rows) -> Iterator[str]:
    """Milliseconds, and how many times the copy's."""
    names = [name for name in rows[0] if name not in ("D", "d")] if rows else []
    cells = [
        [row["D"], row["d"], *(f"{shown(row[name]['ms'])} ({shown(row[name]['to_copy'])})" for name in names)]
        for row in rows
    ]
    yield from table(["D", "d", *names], cells)
    yield from table(["D", "d", *names], ([row["D"], row["d"], *(row[name]["GB/s"] for name in names)] for row in rows))


MODES = ("checkpointed", "plain")


def of_llama(rows: Rows) -> Iterator[str]:
    """A line a method: trained numbers; then milliseconds, their ratio to PEFT's LoRA, and gigabytes, of both modes."""
    header = [f"{figure}, {mode}" for mode in MODES for figure in ("ms", "to PEFT LoRA", "peak GB", "reserved GB")]
    lines = []
    for row in rows:
        line = [row["weights"], row["method"], row.get("rank"), row["trained"]]
        for mode in MODES:
            lora = next((each[mode] for each in rows if _is_lora_of(each, row)), {})
            line += _cost(row.get(mode, {}), lora)
        lines.append(line)
    yield from table(["weights", "method", "rank", "trained", *header], lines)


def _is_lora_of(each: dict[str, Any], row: dict[str, Any]) -> bool:
    return each["method"] == "peft-lora" and all(each.get(name) == row.get(name) for name in ("weights", "rank"))


def _cost(figures: dict[str, Any], lora: dict[str, Any]) -> list[Any]:
    """Four cells."""
    if "skipped" in figures:
        return [figures["skipped"], None, None, None]
    ratio = figures["ms"] / lora["ms"] if "ms" in figures and "ms" in lora else None
    sizes = [gigabytes(figures.get(name)) for name in ("allocated_bytes", "reserved_bytes")]
    return [figures.get("ms"), ratio, *sizes]


def of_vit(rows: Rows) -> Iterator[str]:
    """A line a method."""
    lines = []
    for row in rows:
        lora = next((each for each in rows if (each["model"], each["method"]) == (row["model"], "peft-lora")), {})
        lines.append([row["model"], row["method"], row["trained"], *_cost(row, lora)])
    yield from table(["model", "method", "trained", "ms", "to PEFT LoRA", "peak GB", "reserved GB"], lines)


def of_merge(rows: Rows) -> Iterator[str]:
    """Seconds."""
    names = ("method", "rank", "merge_s", "unmerge_s", "same_bits")
    header = ("method", "rank", "merge, s", "unmerge, s", "the same bits afterwards")
    yield from table(header, ([row[name] for name in names] for row in rows))


def of_bank(rows: Rows) -> Iterator[str]:
    """Requests a second."""
    for row in rows:
        yield f"{row['adapters']:,} adapters (d = {row['d']:,}) take {row['bank_bytes'] / 1e6:,.0f} MB."
        yield ""
        yield from table(["", "requests a second"], row["requests/s"].items())


def of_jax(rows: Rows) -> Iterator[str]:
    """Pᵀ, then the step."""
    transposes = [row for row in rows if row["what"] == "transpose"]
    if any(row["slow_scatter"] for row in rows):
        yield f"This jaxlib, {rows[0]['jaxlib']}, compiles a float32 scatter-add to a loop of compare-and-swap."
        yield ""
    if transposes:
        names = list(transposes[0]["ms"])
        yield from table(
            ["D", "d", *(f"{n}, ms" for n in names)], ([r["D"], r["d"], *r["ms"].values()] for r in transposes)
        )
    for row in rows:
        cases = {name: value for name, value in row.items() if row["what"] == "step" and isinstance(value, dict)}
        if cases:
            yield from table(
                ["step", "ms", "temporary MB"], ([n, c["ms"], c["temporary_bytes"] / 1e6] for n, c in cases.items())
            )


PARTS = {
    "correct": (
        "is it right?",
        "the tests that need a GPU; groups, members, θ_d⁰ and θ_D have NumPy's bits, Pᵀ and gradients are near.",
        of_correct,
    ),
    "projection": (
        "P and its transpose",
        """milliseconds, in parentheses how many copies of D floats, which move as many bytes; then GB/s at 8
bytes a position. PEFT's lines are what its UniLora computes, layer by layer. The goals: P within 1.5 copies, P and Pᵀ
within 2.5.""",
        of_projection,
    ),
    "llama": (
        "a training step of Llama-3.1-8B",
        """random weights of its shapes, every linear layer but the output, 4 × 1,024 tokens, AdamW, autocast to
bfloat16; activations checkpointed, or not (plain). The goals: 1.02 of PEFT's LoRA, and less memory.""",
        of_llama,
    ),
    "vit": (
        "a training step of ViT-B/16 and ViT-L/16",
        "query and value, r = 4, batches of 64 images, AdamW, autocast to bfloat16, the head trained in every case.",
        of_vit,
    ),
    "merge": ("merging 8B", "every linear layer but the output, bfloat16.", of_merge),
    "bank": (
        "many adapters in a batch",
        "a forward pass on the shapes of Llama-3.1-8B, query and value, r = 4, 32 tokens a row.",
        of_bank,
    ),
    "jax": ("JAX", "Pᵀ by scatter-add and by members, and the step of `benchmarks/jax_step.py`.", of_jax),
}
