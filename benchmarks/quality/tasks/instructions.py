"""Short instructions and their answers."""

import json

from quality.tasks import Data, data_folder, split
from quality.tasks._smollm import encoded, task


def read() -> Data:
    """1,100 instructions; 100 to choose on, 200 to judge on."""
    text = (data_folder("instruct_dev") / "rasbt_instruction_1100.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    asked = [f"{row['instruction']}\n\n{row['input']}".strip() for row in rows]
    return Data(*split(encoded(asked, [row["output"] for row in rows], 64), 100, 200))


TASK = task("Instructions, SmolLM2-135M", read, examples=400, epochs=1, batch=8)
