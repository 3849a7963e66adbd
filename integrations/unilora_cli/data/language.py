"""Texts for a causal language model as tokens: one stream cut into blocks, or prompts with responses."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data.corpus import Corpus
from unilora_cli.data.packing import pack
from unilora_cli.data.records import draw, seen, split_off
from unilora_cli.data.templates import chat_tokens, fitted, for_training, left_out
from unilora_cli.options.finetune import Lm

__all__ = ["IGNORED", "Language", "Prompt", "encode_corpora"]

IGNORED = -100
"""The label of a token that has no loss."""

PIECE = r"(?s:.){1,1048576}[^\n]*\n?"
"""What is tokenised at once: so many characters, and on to the end of a line."""

Example = dict[str, list[int]]
Notes = list[tuple[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and the response that the data have for it."""

    tokens: list[int]
    response: str


@dataclass(frozen=True)
class Language:
    """Examples: ``input_ids``, ``attention_mask`` (or ``position_ids``, where packed) and ``labels``, of equal length.

    Attributes:
        prompts: those of the held-out examples; none for whole texts.
        unpacked: the training examples before they were packed.
        notes: lines about the data for the printed plan.
    """

    train: list[Example]
    held_out: list[Example]
    prompts: list[Prompt] = field(default_factory=list)
    unpacked: list[Example] = field(default_factory=list)
    notes: Notes = field(default_factory=list)


def encode_corpora(train: Corpus, held_out: Corpus | None, options: Lm, tokenizer: Any, length: int) -> Language:
    """Tokenise, split off what is held out, and pack.

    Args:
        length: tokens of a block, or of a prompt and its response at the most.

    Raises:
        CommandError: a text too short for two blocks; no response left; a tokenizer without a chat template.
    """
    for corpus in (train, held_out):
        if corpus and bool(corpus.texts) != bool(train.texts):
            raise CommandError(f"{corpus.where}: expected whole texts or none, as in {options.data}.")
    notes: Notes = [
        ("columns left out", f"{', '.join(map(repr, corpus.unused))} of {corpus.where}")
        for corpus in (train, held_out)
        if corpus and corpus.unused
    ]
    if train.texts:
        return _texts(train, held_out, options, tokenizer, length, notes)
    chats = [chat for corpus in (train, held_out) if corpus for chat in corpus.chats]
    if any(options.response_only or chat.silent for chat in chats):
        own, tokenizer = tokenizer, for_training(tokenizer)
        if tokenizer is not own:
            notes.append(("chat template", "TRL's for training this model, which marks what the assistant says"))
    learnt = _dialogues(train, tokenizer, length, options, notes)
    if held_out is not None:
        apart = _dialogues(held_out, tokenizer, length, options, notes)
    else:
        kept, others = split_off(len(learnt), options.holdout, options.seed)
        learnt, apart = [learnt[i] for i in kept], [learnt[i] for i in others]
    examples = [learnt[i][0] for i in draw(len(learnt), options.limit, options.seed)]
    tested, prompts = [example for example, _ in apart], [prompt for _, prompt in apart]
    keys = [[tuple(example["input_ids"]) for example in part] for part in (examples, tested)]
    notes += seen(keys[0], keys[1], len(tested))
    if not options.packing:
        return Language(examples, tested, prompts, notes=notes)
    packed = pack(examples, length, IGNORED)
    notes.append(("packed", f"{len(examples):,} examples in {len(packed):,} blocks of at most {length} tokens"))
    return Language(packed, pack(tested, length, IGNORED), prompts, examples, notes)


def _texts(train: Corpus, held_out: Corpus | None, options: Lm, tokenizer: Any, length: int, notes: Notes) -> Language:
    """Blocks; without held-out texts the last are held out, as neighbours in a text know too much of each other to draw
    them at random.
    """
    blocks = _blocks(train, tokenizer, length)
    if held_out is not None:
        apart = _blocks(held_out, tokenizer, length)
        notes += seen(train.texts, held_out.texts, len(held_out.texts))
    elif len(blocks) < 2:
        raise CommandError(
            f"{options.data}: it fills one block of {length} tokens only, so nothing is left to hold out; "
            "use a smaller --length, or give --eval-data."
        )
    else:
        count = min(len(blocks) - 1, max(1, round(len(blocks) * options.holdout)))
        blocks, apart = blocks[:-count], blocks[-count:]
    return Language([blocks[i] for i in draw(len(blocks), options.limit, options.seed)], apart, notes=notes)


def _blocks(corpus: Corpus, tokenizer: Any, length: int) -> list[Example]:
    """All texts as one stream of tokens, the end-of-text token after each, cut into blocks; the rest is dropped."""
    stream: list[int] = []
    for text in corpus.texts:
        for piece in re.findall(PIECE, text):
            stream += tokenizer(piece, add_special_tokens=False)["input_ids"]
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(stream) < length:
        raise CommandError(
            f"{corpus.where}: {len(stream)} tokens do not fill a block of {length}; use a smaller --length."
        )
    starts = range(0, len(stream) - length + 1, length)
    return [_example(tokens, tokens) for tokens in (stream[start : start + length] for start in starts)]


def _dialogues(corpus: Corpus, tokenizer: Any, length: int, options: Lm, notes: Notes) -> list[tuple[Example, Prompt]]:
    """Prompts with their responses, without those that leave no room for a response."""
    found, count, cut = [], 0, 0
    for tokens, silent, prompt, response in _tokenised(corpus, tokenizer, options.response_only, notes):
        labels = [IGNORED if skip else token for token, skip in zip(tokens, silent, strict=True)][:length]
        count += 1
        if len(prompt) < length and any(label != IGNORED for label in labels[1:]):
            found.append((_example(tokens[:length], labels), Prompt(prompt, response)))
            cut += len(tokens) > length
    if not found:
        raise CommandError(f"{corpus.where}: every prompt fills the {length} tokens of --length; use a greater one.")
    if lost := count - len(found):
        notes.append(("left out", f"{lost:,} of {corpus.where}: the prompt alone fills {length} tokens (--length)"))
    if cut:
        notes.append(("cut off", f"the ends of {cut:,} of {corpus.where}, after {length} tokens (--length)"))
    return found


def _tokenised(
    corpus: Corpus, tokenizer: Any, response_only: bool, notes: Notes
) -> Iterator[tuple[list[int], list[bool], list[int], str]]:
    """Of each pair or chat: tokens, which of them are silent, those of the prompt, and the response."""
    yield from (_pair(pair, tokenizer, response_only) for pair in corpus.pairs)
    lost: Counter[tuple[str, str]] = Counter()
    for i, chat in enumerate(corpus.chats):
        where = f"{corpus.where}, record {i + 1}"
        chat = fitted(chat, tokenizer)
        yield chat_tokens(chat, tokenizer, where, response_only)
        lost += left_out(chat, tokenizer, where)
    if lost:
        what = ", ".join(f"{before} {count:,} {after}".strip() for (before, after), count in lost.items())
        notes.append(("left out", f"by the chat template, of {corpus.where}: {what}"))


def _pair(source: tuple[str, str], tokenizer: Any, response_only: bool) -> tuple[list[int], list[bool], list[int], str]:
    """Prompt, response and the end-of-text token; which tokens are silent; the prompt's tokens; the response."""
    prompt, response = source
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = tokenizer(prompt)["input_ids"]
    if end and before[-1:] == end:
        before = before[:-1]
    after = tokenizer(response, add_special_tokens=False)["input_ids"] + end
    return before + after, [bool(response_only)] * len(before) + [False] * len(after), before, response


def _example(tokens: list[int], labels: list[int]) -> Example:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
