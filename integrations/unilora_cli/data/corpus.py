"""What a causal language model is trained on, before a tokenizer has seen it: whole texts, pairs, or chats."""

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data.chats import CHATS, OPTIONS, Chat, read_chat, without_none
from unilora_cli.data.records import load_tables, nfc
from unilora_cli.options.finetune import Lm
from unilora_core.schema import shown

__all__ = ["Corpus", "read_corpora"]

DIALOGUES = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("query", "response"),
)
"""Columns that hold a prompt and its response; ``input`` may stand beside ``instruction``."""

ALPACA = "### Instruction:\n{instruction}\n\n{context}### Response:\n"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Whole texts, pairs of a prompt and a response, or chats, from one source.

    Attributes:
        unused: the columns that none of them is made of.
    """

    where: str
    texts: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()
    chats: Sequence[Chat] = ()
    unused: Sequence[str] = ()


def read_corpora(options: Lm) -> tuple[Corpus, Corpus | None]:
    """What ``--data`` and ``--eval-data`` hold.

    Raises:
        CommandError: no such data, or no known columns; a record without text; a chat with an unknown role; whole texts
            where pairs or chats are wanted.
    """
    tables, elsewhere = load_tables(options), options.eval_data or options.data
    corpora = (
        _corpus(tables.train, options, options.data),
        None if tables.held_out is None else _corpus(tables.held_out, options, elsewhere),
    )
    for corpus in corpora:
        if corpus and corpus.texts and (what := _wants_dialogues(options)):
            raise CommandError(f"{corpus.where}: it holds whole texts, so there is no {what}.")
    return corpora


def _wants_dialogues(options: Lm) -> str | None:
    """The argument that makes no sense for whole texts."""
    if "exact-match" in (options.metric or ()):
        return "--metric exact-match"
    if options.packing:
        return "--packing"
    return "--response-only" if options.response_only else None


def _corpus(rows: Sequence[Row], options: Lm, where: str) -> Corpus:
    if options.prompt:
        pairs, used = _filled_in(rows, options.prompt, options.response_column, where)
        return Corpus(where, pairs=pairs, unused=_others(rows, used))
    columns = _columns(rows[0], options, where)
    if columns[0] in CHATS or isinstance(rows[0][columns[0]], list):
        dense = without_none if hasattr(rows, "features") else dict  # a table of `datasets`, or records as they were
        chats = [read_chat(dense(row), columns, f"{where}, record {i + 1}") for i, row in enumerate(rows)]
        return Corpus(where, chats=chats, unused=_others(rows, (*columns, *OPTIONS)))
    values = [_words(row, columns, f"{where}, record {i + 1}") for i, row in enumerate(rows)]
    if columns[0] == "instruction":
        for i, (row, parts) in enumerate(zip(rows, values, strict=True)):
            (given,) = _words({"input": row.get("input") or ""}, ("input",), f"{where}, record {i + 1}")
            parts[0] = ALPACA.format(instruction=parts[0], context=f"### Input:\n{given}\n\n" if given else "")
    unused = _others(rows, (*columns, *(("input",) if columns[0] == "instruction" else ())))
    if len(columns) == 1:
        return Corpus(where, texts=[text for (text,) in values], unused=unused)
    return Corpus(where, pairs=[(_closed(prompt, response), response) for prompt, response in values], unused=unused)


def _others(rows: Sequence[Row], used: Collection[str]) -> list[str]:
    """The columns that were not used and that hold something."""
    return [name for name in rows[0] if name not in used and any(row[name] not in (None, "", [], {}) for row in rows)]


def _columns(row: Row, options: Lm, where: str) -> tuple[str, ...]:
    """The columns that count, from those that there are."""
    chats = [(name,) for name in CHATS]
    known = ((nfc(options.text_column),),) if options.text_column else (*chats, *DIALOGUES, ("text",))
    for columns in known:
        if set(columns) <= row.keys():
            return columns
    if {"chosen", "rejected"} <= row.keys():
        raise CommandError(
            f"{where}: 'chosen' and 'rejected' are for learning from preferences, which this is not; to learn what was "
            "chosen, call that column 'messages' if it holds chats, else --prompt '{prompt}' --response-column chosen."
        )
    wanted = " or ".join("+".join(columns) for columns in known)
    raise CommandError(f"{where}: expected the columns {wanted}; it has {', '.join(map(repr, row))}.")


def _words(row: Row, columns: Sequence[str], where: str) -> list[str]:
    parts = [part for name in columns if isinstance(part := row[name], str)]
    if len(parts) < len(columns):
        other = next(row[name] for name in columns if not isinstance(row[name], str))
        raise CommandError(f"{where}: expected a text in {' and '.join(map(repr, columns))}, got {shown(other)}.")
    return parts


def _filled_in(
    rows: Sequence[Row], prompt: str, response: str | None, where: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of ``--prompt``, filled in from the columns that it names in braces, and the response; and those columns.

    ``{prompt}`` and the response are found by name where the data call them otherwise.
    """
    try:
        pieces = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise CommandError(f"--prompt: {error}; write {{column}}, and {{{{ for a plain brace.") from error
    if formatted := [name for _, name, format_, conversion in pieces if name is not None and (format_ or conversion)]:
        raise CommandError(f"--prompt: expected the name of a column alone in {{{formatted[0]}…}}, as {{column}}.")
    names = [nfc(name) for _, name, *_ in pieces if name is not None]
    usual = next((pair for pair in DIALOGUES if set(pair) <= rows[0].keys()), DIALOGUES[0])
    columns = [usual[0] if name == "prompt" else name for name in names]
    columns.append(nfc(response or usual[1]))
    if missing := [name for name in columns if name not in rows[0]]:
        raise CommandError(
            f"{where}: there is no column {missing[0]!r} for --prompt or --response-column; it has "
            f"{', '.join(map(repr, rows[0]))}."
        )
    found = []
    for i, row in enumerate(rows):
        *parts, answer = _words(row, columns, f"{where}, record {i + 1}")
        said: dict[str | None, str] = {**dict(zip(names, parts, strict=True)), None: ""}
        found.append(("".join(before + said[name and nfc(name)] for before, name, *_ in pieces), answer))
    return found, columns


def _closed(prompt: str, response: str) -> str:
    """The prompt, with a line break where nothing else would part it from the response."""
    return prompt if prompt[-1:].isspace() or response[:1].isspace() or not prompt else f"{prompt}\n"
