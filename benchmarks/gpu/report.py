"""docs/performance.md, made from the files of results alone."""

from pathlib import Path

from common import DOCS, RESULTS

from gpu.on_card import on_card
from gpu.on_cpu import on_cpu

PAGE = DOCS / "performance.md"
GPU = RESULTS / "gpu"

HEAD = """# Performance

What a step, the projection, attaching and merging cost, in time and memory. This page is made by
`python benchmarks/gpu report` from `benchmarks/results/`; what is changed here by hand is lost.
"""

NO_GPU = """## On a GPU

No figure on a GPU has been made yet. These commands make them, on a machine with a card, in a checkout, with torch,
transformers, timm and PEFT, and with JAX and bitsandbytes where they are installed:

```bash
export PYTHONPATH=.:backends:integrations:benchmarks   # where the packages are not installed
python benchmarks/gpu correct        # right first: the tests that need a GPU, the same bits as NumPy
python benchmarks/gpu projection jax # P and its transpose beside a copy of the same bytes, and PEFT's lines
python benchmarks/gpu llama          # steps and peak memory on the shapes of Llama-3.1-8B
python benchmarks/gpu vit            # and of ViT-B/16 and ViT-L/16
python benchmarks/gpu merge bank     # merging 8B, 1,000 adapters in a batch
python benchmarks/gpu report         # this page
```

Each call ends within ten minutes and keeps every row that it has; the same call again goes on where it stopped.
"""


def write() -> Path:
    """Make the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return PAGE


def is_current() -> bool:
    """Whether the page is what the results say."""
    return PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()


def page() -> str:
    """The page's text."""
    cards = sorted(path for path in GPU.glob("*") if path.is_dir())
    of_gpus = [line for card in cards for line in on_card(card)] or NO_GPU.splitlines()
    return "\n".join([*HEAD.splitlines(), "", *of_gpus, "", *on_cpu()]) + "\n"
