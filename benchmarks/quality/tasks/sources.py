"""Ten words: which of six sources are they from?"""

import json
import re

import numpy as np

from quality.tasks import Data, _minilm, data_folder, split, unpacked

FILES = ("abc_rural", "abc_science", "brown_detagged", "tinyshakespeare", "wikitext2-valid", "c4_demo")
WORDS, EACH = 10, 1500


def read() -> Data:
    """As many places of each source; in lower case, letters only; 1,000 to choose on, 2,000 to judge on."""
    rng, pieces, labels = np.random.default_rng(0), [], []
    for label, name in enumerate(FILES):
        words = re.findall(r"[a-z]+", text(name).lower())
        starts = rng.permutation(len(words) // WORDS)[:EACH] * WORDS
        pieces += [" ".join(words[start : start + WORDS]) for start in starts]
        labels += [label] * len(starts)
    return Data(*split(_minilm.encoded([pieces], labels), 1000, 2000))


def text(name: str) -> str:
    """A source, whole."""
    (path,) = data_folder("corpus").glob(f"{name}.*.gz")
    if path.name.endswith(".jsonl.gz"):
        return " ".join(json.loads(line)["text"] for line in unpacked(path).split("\n") if line)
    return unpacked(path)


TASK = _minilm.task("Six sources, MiniLM", read, classes=6, examples=2560, epochs=1, batch=16)
