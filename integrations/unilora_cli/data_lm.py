"""Texts for a causal language model: one stream cut into blocks, or prompts with responses."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data_records import draw, load_tables, opened, split_off, suffix

__all__ = ["IGNORED", "Language", "load_language"]

IGNORED = -100
"""The label of a token that has no loss."""

PIECE = 2**20
"""Characters that are tokenised at once, up to the end of a line."""

DIALOGUES = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
"""Columns that hold a prompt and its response; ``input`` may stand beside ``instruction``."""

ALPACA = "### Instruction:\n{instruction}\n\n{context}### Response:\n"

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Language:
    """Examples: ``input_ids``, ``attention_mask`` and ``labels``, lists of equal length.

    Attributes:
        notes: lines about the data for the printed plan.
    """

    train: list[Example]
    held_out: list[Example]
    notes: list[tuple[str, Any]] = field(default_factory=list)


def load_language(arguments: argparse.Namespace, tokenizer: Any, length: int) -> Language:
    """Read and tokenise what ``--data`` and ``--eval-data`` name.

    Args:
        length: tokens of a block, or of a prompt and its response at the most.

    Raises:
        CommandError: no such data, or no known columns; a text too short for two blocks; no response left.
    """
    train, held_out = _corpora(arguments)
    if arguments.response_only and not train.pairs:
        raise CommandError(f"{arguments.data}: it holds whole texts, so there is no --response-only.")
    examples, notes = train.examples(tokenizer, length, arguments.response_only)
    if held_out is not None:
        apart, more = held_out.examples(tokenizer, length, arguments.response_only)
        notes += more
    elif train.pairs:
        kept, others = split_off(len(examples), arguments.holdout, arguments.seed)
        examples, apart = [examples[i] for i in kept], [examples[i] for i in others]
    else:
        examples, apart = _cut(examples, arguments, length)
    return Language([examples[i] for i in draw(len(examples), arguments.limit, arguments.seed)], apart, notes)


@dataclass(frozen=True)
class Corpus:
    """Whole texts, or pairs of a prompt and a response, from one source."""

    where: str
    texts: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()

    def examples(self, tokenizer: Any, length: int, response_only: bool) -> tuple[list[Example], list[tuple[str, Any]]]:
        """The examples, and notes on what was left out."""
        if not self.pairs:
            return _blocks(self, tokenizer, length), []
        kept = _dialogues(self, tokenizer, length, response_only)
        if lost := len(self.pairs) - len(kept):
            return kept, [("left out", f"{lost:,} of {self.where}: the prompt alone fills {length} tokens (--length)")]
        return kept, []


def _corpora(arguments: argparse.Namespace) -> tuple[Corpus, Corpus | None]:
    if suffix(Path(arguments.data)) == ".txt":
        if arguments.eval_data and suffix(Path(arguments.eval_data)) != ".txt":
            raise CommandError(f"{arguments.eval_data}: expected a .txt file, as {arguments.data} is one.")
        held_out = _read(arguments.eval_data) if arguments.eval_data else None
        return _read(arguments.data), held_out
    tables = load_tables(arguments)
    columns = _columns(tables.train[0], arguments)
    apart = tables.held_out
    train = _corpus(tables.train, columns, arguments.data)
    return train, None if apart is None else _corpus(apart, columns, arguments.eval_data or arguments.data)


def _columns(row: Mapping[str, Any], arguments: argparse.Namespace) -> tuple[str, ...]:
    """The columns that count, from those that there are."""
    known = ((arguments.text_column,),) if arguments.text_column else (*DIALOGUES, ("text",))
    for columns in known:
        if set(columns) <= row.keys():
            return columns
    wanted = " or ".join("+".join(columns) for columns in known)
    raise CommandError(f"{arguments.data}: expected the columns {wanted}; it has {', '.join(map(repr, row))}.")


def _corpus(rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...], where: str) -> Corpus:
    values = []
    for i, row in enumerate(rows):
        parts = [part for name in columns if isinstance(part := row.get(name), str)]
        if len(parts) < len(columns):
            raise CommandError(f"{where}, record {i + 1}: expected a text in {' and '.join(map(repr, columns))}.")
        if columns[0] == "instruction":
            context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
            parts[0] = ALPACA.format(instruction=parts[0], context=context)
        values.append(parts)
    if len(columns) == 1:
        return Corpus(where, texts=[text for (text,) in values])
    return Corpus(where, pairs=[(_closed(prompt, response), response) for prompt, response in values])


def _closed(prompt: str, response: str) -> str:
    """The prompt, with a line break where nothing else would part it from the response."""
    return prompt if prompt[-1:].isspace() or response[:1].isspace() or not prompt else f"{prompt}\n"


def _read(source: str) -> Corpus:
    path = Path(source).expanduser()
    if not path.is_file():
        raise CommandError(f"{source}: no such file.")
    with opened(path) as file:
        return Corpus(source, texts=[file.read()])


def _blocks(corpus: Corpus, tokenizer: Any, length: int) -> list[Example]:
    """All texts as one stream of tokens, the end-of-text token after each, cut into blocks; the rest is dropped."""
    stream: list[int] = []
    for text in corpus.texts:
        for piece in _pieces(text):
            stream += tokenizer(piece, add_special_tokens=False)["input_ids"]
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    starts = range(0, len(stream) - length + 1, length)
    if not starts:
        raise CommandError(
            f"{corpus.where}: {len(stream)} tokens do not fill a block of {length}; use a smaller --length."
        )
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


def _dialogues(corpus: Corpus, tokenizer: Any, length: int, response_only: bool) -> list[Example]:
    """Prompt, response and the end-of-text token; without the pairs whose prompt leaves no room for a response."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for prompt, response in corpus.pairs:
        before = tokenizer(prompt)["input_ids"]
        if end and before[-1:] == end:
            before = before[:-1]
        after = tokenizer(response, add_special_tokens=False)["input_ids"] + end
        if len(before) < length and after:
            examples.append(_example((before + after)[:length], len(before) if response_only else 0))
    if not examples:
        raise CommandError(f"{corpus.where}: every prompt fills the {length} tokens of --length; use a greater one.")
    return examples


def _example(tokens: list[int], silent: int = 0) -> Example:
    labels = [IGNORED] * silent + tokens[silent:]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
