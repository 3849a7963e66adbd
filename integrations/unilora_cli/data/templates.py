"""A chat as tokens, by the tokenizer's own template: which of them are learnt, and what the template leaves out."""

import copy
import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from unilora_cli.console import CommandError
from unilora_cli.data.chats import Chat
from unilora_cli.tasks.models import readable_errors
from unilora_core.schema import shown

__all__ = ["chat_tokens", "check_template", "fitted", "for_training", "left_out"]

OWN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents"}
"""What a record may not set."""


def check_template(tokenizer: Any, name: str) -> None:
    """Chats need a template.

    Raises:
        CommandError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise CommandError(
            f"the tokenizer of {name} has no chat template, so it is not known how chats become a text; use a "
            "model made for chats, or set tokenizer.chat_template and save the tokenizer beside the model."
        )


def for_training(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer with the template that TRL has for training in place of its own, which marks what
    the assistant says and never changes an earlier turn; the tokenizer itself where TRL knows none, or none is needed.
    """
    from trl.chat_template_utils import get_training_chat_template

    if not isinstance(tokenizer.chat_template, str):  # templates by name, of which TRL has the default one alone
        return tokenizer
    try:
        template = get_training_chat_template(tokenizer)
    except Exception:  # a ValueError for one that it does not know; a template that it tries may raise anything
        return tokenizer
    if template is None:
        return tokenizer
    made = copy.copy(tokenizer)
    made.chat_template = template
    return made


def fitted(chat: Chat, tokenizer: Any) -> Chat:
    """The chat with the arguments of its calls as the template writes them: objects, or JSON text where it adds them to
    its own words.
    """
    calls = [call["function"] for turn in chat.turns for call in turn.get("tool_calls", ())]
    text = _tried(tokenizer, chat) if calls else ""
    if text is not None and not any(call["arguments"] and str(call["arguments"]) in text for call in calls):
        return chat
    made = copy.deepcopy(chat)
    for call in (call["function"] for turn in made.turns for call in turn.get("tool_calls", ())):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return made


def chat_tokens(
    chat: Chat, tokenizer: Any, where: str, response_only: bool
) -> tuple[list[int], list[bool], list[int], str]:
    """All tokens; which of them are silent (without loss); the tokens before the last turn of the assistant, with the
    words that let it begin; and what it says there.

    Raises:
        CommandError: the template refuses the chat, or does not tell which tokens are a turn's.
    """
    if own := OWN & chat.options.keys():
        raise CommandError(f"{where}: chat_template_kwargs: {min(own)!r} is not for a record to set.")
    last = chat.answers[-1]
    with readable_errors(f"{where}: the chat template cannot take {shown(chat.turns)}"):
        tokens = _tokens(tokenizer, chat)
        prompt = _tokens(tokenizer, chat, last, add_generation_prompt=True) if last else []
        silent = _silent(chat, tokens, tokenizer, where, response_only)
    return tokens, silent, prompt, chat.turns[last]["content"]


def left_out(chat: Chat, tokenizer: Any, where: str) -> Counter[tuple[str, str]]:
    """What the text of a chat lacks, in words before the number and after it; and the number.

    Raises:
        CommandError: with that, a turn of the assistant that is learnt would say nothing.
    """
    with readable_errors(f"{where}: the chat template cannot take {shown(chat.turns)}"):
        text = _text(tokenizer, chat)
    found: Counter[tuple[str, str]] = Counter()
    for name in sorted(chat.options):
        rest = {key: value for key, value in chat.options.items() if key != name}
        found[f"{name!r} of", "chats"] += _tried(tokenizer, dataclasses.replace(chat, options=rest)) == text
    for i, turn in enumerate(chat.turns):
        unheard = []
        for name in [n for n in turn if n != "role" and turn[n] not in ("", [], {}) and not _holds(text, turn[n])]:
            if _unheard(name, i, chat, tokenizer, text):
                unheard.append(name)
                found[("", f"turns of the {turn['role']}") if name == "content" else (f"{name!r} of", "turns")] += 1
            elif (name, turn["role"]) == ("content", "assistant"):
                found["a part of", "turns of the assistant"] += 1
        if unheard and i in chat.answers and not any(turn[name] for name in turn.keys() - {"role", *unheard}):
            raise CommandError(
                f"{where}, turn {i + 1}: the chat template leaves out {' and '.join(map(repr, unheard))}, and the "
                "assistant says nothing else there; use a model whose template takes it, or leave such chats out."
            )
    return +found


def _unheard(name: str, i: int, chat: Chat, tokenizer: Any, text: str) -> bool:
    """Whether the text would be the same without something of a turn."""
    turn = chat.turns[i]
    rest = {key: value for key, value in turn.items() if key != name} | ({"content": ""} if name == "content" else {})
    return _tried(tokenizer, dataclasses.replace(chat, turns=[*chat.turns[:i], rest, *chat.turns[i + 1 :]])) == text


def _holds(text: str, words: Any) -> bool:
    """Whether words are in a text, but for white space."""
    return isinstance(words, str) and (words.strip() in text or "".join(words.split()) in "".join(text.split()))


def _silent(chat: Chat, tokens: list[int], tokenizer: Any, where: str, response_only: bool) -> list[bool]:
    """Which tokens have no loss: all but those of the answers, or those of the turns of weight 0 alone."""
    turns = chat.answers if response_only else sorted(chat.silent)
    silent = [response_only] * len(tokens)
    for start, end in _spans(chat, turns, tokens, tokenizer, where) if turns else ():
        silent[start:end] = [not response_only] * (end - start)
    return silent


def _spans(chat: Chat, turns: Sequence[int], tokens: list[int], tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Where the tokens of some turns are: by the template's own marks, if it has them, else by what each adds."""
    marked: dict[int, tuple[int, int]] = {}
    if re.search(r"{%[-+]?\s*generation", tokenizer.get_chat_template(tools=chat.options.get("tools"))):
        marks = _applied(tokenizer, chat, return_assistant_tokens_mask=True)["assistant_masks"]
        runs = [[i for i, _ in run] for mark, run in groupby(enumerate(marks), lambda pair: pair[1]) if mark]
        spans = [(run[0], run[-1] + 1) for run in runs]
        if list(turns) == chat.said:
            return spans
        if len(spans) == len(chat.said):
            marked = dict(zip(chat.said, spans, strict=True))
    return [marked[i] if i in marked else _span(chat, i, tokens, tokenizer, where) for i in turns]


def _span(chat: Chat, i: int, tokens: list[int], tokenizer: Any, where: str) -> tuple[int, int]:
    begins = {"add_generation_prompt": True} if chat.turns[i]["role"] == "assistant" else {}
    before = _tokens(tokenizer, chat, i, **begins) if i else []
    after = _tokens(tokenizer, chat, i + 1)
    if tokens[: len(before)] != before or tokens[: len(after)] != after:
        what = "--response-only" if i not in chat.silent else "turns of weight 0"
        raise CommandError(
            f"{where}: the chat template changes earlier turns when later ones follow, so it is not known "
            f"which tokens are those of turn {i + 1}; leave {what} out, or use a template with {{% generation %}}."
        )
    return len(before), len(after)


def _text(tokenizer: Any, chat: Chat) -> str:
    return tokenizer.apply_chat_template(chat.turns, tokenize=False, **chat.options)


def _tried(tokenizer: Any, chat: Chat) -> str | None:
    try:
        return _text(tokenizer, chat)
    except Exception:  # a template may raise anything; `chat_tokens` says it where it matters
        return None


def _tokens(tokenizer: Any, chat: Chat, end: int | None = None, **options: Any) -> list[int]:
    """The tokens of a chat, or of its turns before ``end``."""
    return list(_applied(tokenizer, dataclasses.replace(chat, turns=chat.turns[:end]), **options)["input_ids"])


def _applied(tokenizer: Any, chat: Chat, **options: Any) -> Any:
    return tokenizer.apply_chat_template(chat.turns, tokenize=True, return_dict=True, **chat.options, **options)
