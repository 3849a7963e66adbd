"""Is a customer pleased? Sentences made of the phrases in pleased.json, judged on phrases that were not trained on."""

import json
import random
from pathlib import Path

from quality.tasks import Data, _minilm


def read() -> Data:
    """2,000 sentences to draw from, 100 to choose on, 200 to judge on; no opinion and no subject is in two of them."""
    phrases = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    for name in ("subjects", "praise", "blame"):
        draw.shuffle(phrases[name])
    return Data(
        made(draw, phrases, slice(15, None), 2000),
        made(draw, phrases, slice(10, 15), 100),
        made(draw, phrases, slice(10), 200),
    )


def made(draw: random.Random, phrases: dict[str, list[str]], part: slice, n: int) -> list[_minilm.Example]:
    """Sentences of a part of the opinions and subjects, as many pleased ones as others."""
    some = phrases | {name: phrases[name][part] for name in ("subjects", "praise", "blame")}
    labels = [i % 2 for i in range(n)]
    return _minilm.encoded([[sentence(draw, some, label) for label in labels]], labels)


def sentence(draw: random.Random, phrases: dict[str, list[str]], label: int) -> str:
    """An opinion about a subject, in a frame that keeps its meaning or turns it round."""
    turned = draw.random() < 0.4
    opinion = draw.choice(phrases["praise" if label != turned else "blame"])
    frame = draw.choice(phrases["turned" if turned else "kept"])
    text = frame.format(subject=draw.choice(phrases["subjects"]), opinion=opinion)
    return text[0].upper() + text[1:]


# 5e-3, the rate of these tasks, is LoRA's best here: of 2.5e-3, 5e-3, 1e-2 on the validation part (0.88, 0.95, 0.92)
TASK = _minilm.task("Pleased customers, MiniLM", read, examples=640, epochs=4, batch=16)
