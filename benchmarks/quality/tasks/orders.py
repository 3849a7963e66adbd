"""Orders in plain words, to be answered with JSON; judged on names, things and cities that were not trained on."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from quality.tasks import Data
from quality.tasks._smollm import Example, answers, encoded, held_out, task, tokenizer

ASK = "Write the order as JSON with the keys name, count, item, city, day."
LONGEST = 48
"""Tokens that an answer may have; the right ones have 22 to 32."""

FRAMES = (
    "{name} wants {count} {item}s sent to {city} by {day}.",
    "Could you get {count} {item}s to {name} in {city}? {day} would be best.",
    "Please send {count} {item}s to {city}; {name} waits for them until {day}.",
    "On {day} we need {count} {item}s in {city}, for {name}.",
    "This is {name} from {city}. I would like {count} {item}s on {day}.",
)
COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow", "grey", "brown"]
FIRST = [
    "Anna",
    "Omar",
    "Lena",
    "Paul",
    "Ines",
    "Hugo",
    "Mara",
    "Ivan",
    "Nora",
    "Luca",
    "Ada",
    "Felix",
    "Rosa",
    "Amir",
    "Clara",
    "Jonas",
    "Sofia",
    "Peter",
    "Elsa",
    "Karim",
    "Julia",
    "Simon",
    "Vera",
    "Tomas",
    "Alice",
    "Marco",
    "Edith",
    "Bruno",
    "Leila",
    "Oscar",
]
LAST = [
    "Miller",
    "Haddad",
    "Novak",
    "Rossi",
    "Berg",
    "Moreau",
    "Lopez",
    "Weber",
    "Larsen",
    "Costa",
    "Khan",
    "Fischer",
    "Silva",
    "Dubois",
    "Jansen",
    "Kowalski",
    "Brown",
    "Tanaka",
    "Keller",
    "Popov",
    "Murphy",
    "Santos",
    "Vogel",
    "Lindgren",
    "Petrov",
    "Garcia",
    "Meyer",
    "Bianchi",
    "Wood",
    "Horvat",
]
THINGS = [
    "lamp",
    "cup",
    "chair",
    "towel",
    "plate",
    "pillow",
    "candle",
    "basket",
    "bottle",
    "blanket",
    "mirror",
    "clock",
    "vase",
    "bowl",
    "table",
    "ladder",
    "bucket",
    "kettle",
    "notebook",
    "umbrella",
    "carpet",
    "jacket",
    "helmet",
    "guitar",
    "drum",
    "rope",
    "tent",
    "broom",
    "curtain",
    "hammer",
]
CITIES = [
    "Lyon",
    "Turin",
    "Porto",
    "Bergen",
    "Vienna",
    "Dublin",
    "Prague",
    "Seville",
    "Ghent",
    "Krakow",
    "Bologna",
    "Leipzig",
    "Oslo",
    "Nantes",
    "Basel",
    "Zagreb",
    "Malaga",
    "Utrecht",
    "Graz",
    "Riga",
    "Bremen",
    "Naples",
    "Geneva",
    "Aarhus",
    "Toulouse",
    "Athens",
    "Cologne",
    "Bilbao",
    "Helsinki",
    "Verona",
]


def read() -> Data:
    """400 orders to draw from, 40 to choose on, 50 to judge on."""
    draw = random.Random(0)
    words = [draw.sample(each, len(each)) for each in (FIRST, LAST, THINGS, CITIES)]
    return Data(
        *(made(draw, [each[part] for each in words], n) for part, n in ((slice(12, None), 400), (slice(8, 12), 40))),
        made(draw, [each[:8] for each in words], 50),
    )


def made(draw: random.Random, words: Sequence[Sequence[str]], n: int) -> list[Example]:
    """Orders of these names, things and cities."""
    orders = [_order(draw, *words) for _ in range(n)]
    asked = [draw.choice(FRAMES).format(**order | {"count": COUNTS[order["count"] - 2]}) for order in orders]
    return encoded(asked, [json.dumps(order, separators=(",", ":")) for order in orders], 128, ASK)


def _order(
    draw: random.Random, first: Sequence[str], last: Sequence[str], things: Sequence[str], cities: Sequence[str]
) -> dict[str, Any]:
    return {
        "name": f"{draw.choice(first)} {draw.choice(last)}",
        "count": draw.randrange(len(COUNTS)) + 2,
        "item": f"{draw.choice(COLOURS)} {draw.choice(things)}",
        "city": draw.choice(cities),
        "day": draw.choice(DAYS),
    }


def figures(model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """The loss, and how many orders are right: exact where the answer is JSON and nothing else, else lenient."""
    said = answers(model, examples, LONGEST)
    wanted = [json.loads(tokenizer().decode(answer, skip_special_tokens=True)) for _, answer in examples]
    found = [re.search(r"\{.*?\}", text, re.DOTALL) for text in said]
    return {
        "loss": held_out(model, examples),
        "exact": sum(_json(text) == order for text, order in zip(said, wanted, strict=True)) / len(said),
        "lenient": sum(_json(part[0] if part else "") == order for part, order in zip(found, wanted, strict=True))
        / len(said),
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
    examples=160,
    epochs=1,
    batch=4,
)
