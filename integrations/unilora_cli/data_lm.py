"""Texts for a causal language model: one stream cut into blocks, or prompts with responses."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data_records import draw, load_tables, opened, split_off, suffix

__all__ = ["IGNORED", "load_language"]

IGNORED = -100
"""The label of a token that has no loss."""

PIECE = 2**20
"""Characters that are tokenised at once, up to the end of a line."""

ALPACA = "### Instruction:\n{instruction}\n\n{context}### Response:\n"
Example = dict[str, list[int]]


def load_language(arguments: argparse.Namespace, tokenizer: Any, length: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and held out: ``input_ids``, ``attention_mask`` and ``labels``, lists of equal length.

    Args:
        length: tokens of a block, or of a prompt and its response at the most.

    Raises:
        CommandError: no such data, or no known columns; a text too short for two blocks; no response left.
    """
    train, held_out = _sources(arguments)
    if isinstance(train, list):
        examples = _dialogues(train, tokenizer, length, arguments.response_only, arguments.data)
        if held_out is None:
            kept, apart = split_off(len(examples), arguments.holdout, arguments.seed)
            examples, others = [examples[i] for i in kept], [examples[i] for i in apart]
        else:
            others = _dialogues(held_out, tokenizer, length, arguments.response_only, arguments.eval_data)
    else:
        if arguments.response_only:
            raise CommandError(f"{arguments.data}: it holds whole texts, so there is no --response-only.")
        examples = _blocks(train.texts, tokenizer, length, arguments.data)
        if held_out is None:
            examples, others = _cut(examples, arguments, length)
        else:
            others = _blocks(held_out.texts, tokenizer, length, arguments.eval_data or arguments.data)
    return [examples[i] for i in draw(len(examples), arguments.limit, arguments.seed)], others


class _Texts:
    """Whole texts, to be joined."""

    def __init__(self, texts: Iterable[str]):
        self.texts = list(texts)


def _sources(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Two of `_Texts`, or two lists of (prompt, response); the second None where nothing is held out."""
    if suffix(Path(arguments.data)) == ".txt":
        held_out = _Texts([_read(arguments.eval_data)]) if arguments.eval_data else None
        return _Texts([_read(arguments.data)]), held_out
    tables = load_tables(arguments)
    shape = _shape(tables.train[0], arguments)
    where = arguments.eval_data or arguments.data
    held_out = None if tables.held_out is None else _records(tables.held_out, shape, where)
    return _records(tables.train, shape, arguments.data), held_out


def _shape(row: Mapping[str, Any], arguments: argparse.Namespace) -> tuple[str, ...]:
    """The columns that count, from those that there are."""
    shapes = [("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer")]
    if arguments.text_column:
        shapes = [(arguments.text_column,)]
    for shape in [*shapes, *([] if arguments.text_column else [("text",)])]:
        if set(shape) <= row.keys():
            return shape
    wanted = " or ".join("+".join(shape) for shape in shapes) + ("" if arguments.text_column else " or text")
    raise CommandError(f"{arguments.data}: expected the columns {wanted}; it has {', '.join(map(repr, row))}.")


def _records(rows: Sequence[Mapping[str, Any]], shape: tuple[str, ...], where: str) -> Any:
    values = []
    for i, row in enumerate(rows):
        parts = [row.get(name) for name in shape]
        if not all(isinstance(part, str) for part in parts):
            raise CommandError(f"{where}, record {i + 1}: expected a text in {' and '.join(map(repr, shape))}.")
        if shape[0] == "instruction":
            context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
            parts[0] = ALPACA.format(instruction=parts[0], context=context)
        values.append(tuple(parts))
    return values if len(shape) == 2 else _Texts(text for (text,) in values)


def _read(source: str) -> str:
    path = Path(source).expanduser()
    if not path.is_file():
        raise CommandError(f"{source}: no such file.")
    with opened(path) as file:
        return file.read()


def _blocks(texts: list[str], tokenizer: Any, length: int, where: str) -> list[Example]:
    """All texts as one stream of tokens, the end-of-text token after each, cut into blocks; the rest is dropped."""
    stream: list[int] = []
    for text in texts:
        for piece in _pieces(text):
            stream += tokenizer(piece, add_special_tokens=False)["input_ids"]
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    starts = range(0, len(stream) - length + 1, length)
    if not starts:
        raise CommandError(f"{where}: {len(stream)} tokens do not fill a block of {length}; use a smaller --length.")
    return [_example(stream[start : start + length]) for start in starts]


def _cut(blocks: list[Example], arguments: argparse.Namespace, length: int) -> tuple[list[Example], list[Example]]:
    """The last blocks are held out: neighbours in a text know too much of each other to draw them at random."""
    if len(blocks) < 2:
        raise CommandError(
            f"{arguments.data}: it fills one block of {length} tokens only, so nothing is left to hold out; "
            "use a smaller --length, or give --eval-data."
        )
    count = min(len(blocks) - 1, max(1, round(len(blocks) * arguments.holdout)))
    return blocks[:-count], blocks[-count:]


def _pieces(text: str) -> Iterable[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _dialogues(
    pairs: list[tuple[str, str]], tokenizer: Any, length: int, response_only: bool, where: str
) -> list[Example]:
    """Prompt, response and the end-of-text token; without the records whose prompt leaves no room for a response."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for prompt, response in pairs:
        before = tokenizer(prompt)["input_ids"]
        if end and before[-1:] == end:
            before = before[:-1]
        after = tokenizer(response, add_special_tokens=False)["input_ids"] + end
        if len(before) < length and after:
            examples.append(_example((before + after)[:length], len(before) if response_only else 0))
    if not examples:
        raise CommandError(f"{where}: every prompt fills the {length} tokens of --length; use a greater one.")
    return examples


def _example(tokens: list[int], silent: int = 0) -> Example:
    labels = [IGNORED] * silent + tokens[silent:]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
