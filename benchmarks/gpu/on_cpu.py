"""The page's section of figures on a processor, where committed results answer the same questions."""

import json
from collections.abc import Iterator
from typing import Any

from common import RESULTS

from gpu.tables import table

DECADES = (10**6, 10**7, 10**8)


def on_cpu() -> Iterator[str]:
    """What the same questions have for answers on a processor."""
    yield from ["## On two cores of a processor", ""]
    yield "Medians of cases that take turns on shared machines, which the results name; ratios are what counts."
    yield ""
    for title, section in SECTIONS.items():
        yield from [f"### {title}", "", *section()]


def loaded(name: str) -> dict[str, Any]:
    """The results of a script."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def steps() -> Iterator[str]:
    """Of a small Llama, and of ViT-B/16."""
    llama, vit = loaded("vs_peft_step"), loaded("vit_b16_cpu")
    yield "AdamW, float32. `python benchmarks/vs_peft.py step`: 8 layers of width 512, all linear, r = 16;"
    yield from ["`python benchmarks/vit_b16.py`: query and value, r = 4, batches of 8.", ""]
    names = {"unilora": "unilora", "peft_lora": "PEFT's LoRA", "peft_unilora": "PEFT's UniLora"}
    lines = [["small Llama", label, llama[n]["median_s"], llama[n]["median_s"] / llama["peft_lora"]["median_s"], None]
             for n, label in names.items()]  # fmt: skip
    names = {"unilora": "unilora", "peft-lora": "PEFT's LoRA", "lora": "the method lora", "full": "all weights"}
    lines += [["ViT-B/16", label, vit[n]["median_s"], vit[n]["to_peft_lora"], vit[n]["peak_bytes"] / 1e9]
              for n, label in names.items()]  # fmt: skip
    yield from table(["model", "method", "step, s", "to PEFT LoRA", "peak GB"], lines)


def projections() -> Iterator[str]:
    """P and Pᵀ."""
    found = loaded("vs_peft_projection")
    yield f"`python benchmarks/vs_peft.py projection`, D = {found['D']:,}, d = {found['d']:,}, forward and backward:"
    yield ""
    names = {
        "copy": "a fresh copy of D floats",
        "unilora": "P and Pᵀ",
        "unilora_factors": "the same, cut into the factors",
        "peft": "PEFT's lines",
    }
    copy = found["copy"]["median_s"]
    times = {label: found[name]["median_s"] for name, label in names.items()}
    yield from table(["", "ms", "to the copy"], ([label, 1000 * s, s / copy] for label, s in times.items()))
    yield "`python benchmarks/projection_cost.py`, the core in NumPy, float32, one thread, d = 256; O(D):"
    yield ""
    rows = [
        row
        for row in loaded("projection_cost")["over_D"]
        if row["method"] == "uni-lora" and row["D"] in (10**6, 10**7, 10**8)
    ]
    yield from table(["D", "P, ms", "Pᵀ, ms"], ([r["D"], 1000 * r["P_s"], 1000 * r["transpose_s"]] for r in rows))


def memories() -> Iterator[str]:
    """What attaching takes and keeps."""
    found, cases = loaded("vs_peft_memory"), loaded("attach_8b")["cases"]
    ours, peft = found["unilora_bytes_per_parameter"], found["peft_bytes_per_parameter"]
    yield f"Frozen bytes per LoRA parameter: {ours:.0f}; PEFT: {peft:.0f} (`python benchmarks/vs_peft.py memory`)."
    yield from ["The shapes of Llama-3.1-8B, d = D/16 (`python benchmarks/attach_8b.py`):", ""]
    lines = [
        [case, row["D"], library, row["seconds"], row["bytes"] / 1e6, row["peak_growth_bytes"] / 1e6]
        for case, libraries in cases.items()
        for library, row in libraries.items()
    ]
    yield from table(["targets", "D", "", "attach, s", "kept MB", "peak growth MB"], lines)


def others() -> Iterator[str]:
    """Banks, and JAX."""
    found, jax = loaded("many_adapters")["all-linear"], loaded("jax_step")
    yield f"32 of {found['adapters']:,} adapters in a batch, all linear layers (`python benchmarks/many_adapters.py`):"
    yield ""
    timed = found["forward_32x64"]
    yield from table(["", "ratio of times"], ([name, value] for name, value in timed.items() if "/" in name))
    yield "A step in JAX beside one with qwix's LoRA (`python benchmarks/jax_step.py step`):"
    yield ""
    ratios = ("time/qwix", "temporary/qwix", "flops/qwix")
    yield from table(["groups", *ratios], ([name, *(jax[name][r] for r in ratios)] for name in ("computed", "cached")))


SECTIONS = {
    "A training step": steps,
    "The projection": projections,
    "Attaching, and what it keeps": memories,
    "Many adapters, and JAX": others,
}
