"""Orders in the words of orders.json, to be answered with JSON; judged on names, things and cities that are new."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quality.tasks import Data
from quality.tasks._smollm import Example, answers, encoded, held_out, task, tokenizer

ASK = "Write the order as JSON with the keys name, count, item, city, day."
KEPT = ("first", "last", "things", "cities")
"""The words that are shared out between training, choosing and judging."""

LONGEST = 48
"""Tokens that an answer may have; the right ones have 22 to 32."""


def read() -> Data:
    """400 orders to draw from, 40 to choose on, 40 to judge on."""
    words = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    for name in KEPT:
        words[name] = draw.sample(words[name], len(words[name]))
    parts = (slice(12, None), 400), (slice(8, 12), 40), (slice(8), 40)
    return Data(*(made(draw, words | {name: words[name][part] for name in KEPT}, n) for part, n in parts))


def made(draw: random.Random, words: dict[str, list[str]], n: int) -> list[Example]:
    """Orders in these words."""
    orders = [order(draw, words) for _ in range(n)]
    asked = [
        draw.choice(words["frames"]).format(**each | {"count": words["counts"][each["count"] - 2]}) for each in orders
    ]
    return encoded(asked, [json.dumps(each, separators=(",", ":")) for each in orders], 128, ASK)


def order(draw: random.Random, words: dict[str, list[str]]) -> dict[str, Any]:
    """What the answer says."""
    return {
        "name": f"{draw.choice(words['first'])} {draw.choice(words['last'])}",
        "count": draw.randrange(len(words["counts"])) + 2,
        "item": f"{draw.choice(words['colours'])} {draw.choice(words['things'])}",
        "city": draw.choice(words["cities"]),
        "day": draw.choice(words["days"]),
    }


def figures(model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """The loss, and how many orders are right: exact where the answer is JSON and nothing else, else lenient."""
    said = answers(model, examples, LONGEST)
    wanted = [json.loads(tokenizer().decode(answer, skip_special_tokens=True)) for _, answer in examples]
    within = [re.search(r"\{.*?\}", text, re.DOTALL) for text in said]
    found = [part[0] if part else "" for part in within]
    return {
        "loss": held_out(model, examples),
        "exact": sum(_json(text) == each for text, each in zip(said, wanted, strict=True)) / len(said),
        "lenient": sum(_json(text) == each for text, each in zip(found, wanted, strict=True)) / len(said),
    }


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


TASK = task(
    "Orders to JSON, SmolLM2-135M",
    read,
    metric="exact",
    higher=True,
    figures=figures,
    examples=120,
    epochs=1,
    batch=4,
    rate=3e-3,  # LoRA's better one of 1e-3 and 3e-3 on GSM8K; 0.95 of the validation orders here, no other tried
)
