"""Questions of primary-school arithmetic, answered step by step; the answer stands behind ####."""

import json
import re
from collections.abc import Sequence

from torch import nn

from quality.tasks import Data, data_folder, split, unpacked
from quality.tasks._smollm import Example, answers, encoded, held_out, task, tokenizer

LONGEST, ASKED = 128, 20


def read() -> Data:
    """The training file's questions, without the calculator's marks; 100 to choose on, 200 to judge on."""
    lines = unpacked(data_folder("gsm8k_train") / "train.jsonl.gz").split("\n")
    rows = [json.loads(line) for line in lines if line]
    told = [re.sub(r"<<.*?>>", "", row["answer"]) for row in rows]
    return Data(*split(encoded([row["question"] for row in rows], told, LONGEST), 100, 200))


def figures(model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """The loss; of the first questions, how many answers keep the format, and how many are right.

    strict: the number behind ####; lenient: the last number of the answer.
    """
    asked = examples[:ASKED]
    said = answers(model, asked, LONGEST // 2)
    wanted = [_strict(tokenizer().decode(answer, skip_special_tokens=True)) for _, answer in asked]
    strict, numbers = [_strict(text) for text in said], [re.findall(r"-?[\d,]*\d", text) for text in said]
    lenient = [found[-1].replace(",", "") if found else None for found in numbers]
    return {
        "loss": held_out(model, examples),
        "format": sum(each is not None for each in strict) / len(asked),
        "strict": sum(a == b for a, b in zip(strict, wanted, strict=True)) / len(asked),
        "lenient": sum(a == b for a, b in zip(lenient, wanted, strict=True)) / len(asked),
    }


def _strict(text: str) -> str | None:
    found = re.search(r"#### (-?[\d,]*\d)", text)
    return found[1].replace(",", "") if found else None


TASK = task("GSM8K, SmolLM2-135M", read, figures=figures, examples=160, epochs=1, batch=4)
