"""A chat as tokens, by the tokenizer's own template, and which of them the assistant says."""

import re
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data_corpus import Chat
from unilora_cli.models import readable_errors
from unilora_core.schema import shown

__all__ = ["chat_tokens", "check_template"]


def check_template(tokenizer: Any, name: str) -> None:
    """Chats need a template.

    Raises:
        CommandError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise CommandError(
            f"the tokenizer of {name} has no chat template, so it is not known how 'messages' become a text; use a "
            "model made for chats, or set tokenizer.chat_template and save the tokenizer beside the model."
        )


def chat_tokens(
    chat: Chat, tokenizer: Any, where: str, response_only: bool
) -> tuple[list[int], list[bool], list[int], str]:
    """All tokens; which of them are silent (without loss); the tokens before the last turn of the assistant, with the
    words that let it begin; and what it says there.

    Raises:
        CommandError: the template refuses the chat, or does not tell which tokens are the assistant's.
    """
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    with readable_errors(f"{where}: the chat template cannot take {shown(chat)}"):
        tokens = _tokens(tokenizer, chat)
        prompt = _tokens(tokenizer, chat[:last], add_generation_prompt=True) if last else []
        silent = _silent(chat, tokens, tokenizer, where) if response_only else [False] * len(tokens)
    return tokens, silent, prompt, chat[last]["content"]


def _silent(chat: Chat, tokens: list[int], tokenizer: Any, where: str) -> list[bool]:
    """By the template's own marks, if it has them; else by what each turn of the assistant adds to the tokens."""
    if re.search(r"{%-?\s*generation", tokenizer.chat_template):
        return [not mark for mark in _applied(tokenizer, chat, return_assistant_tokens_mask=True)["assistant_masks"]]
    silent = [True] * len(tokens)
    for i, turn in enumerate(chat):
        if turn["role"] == "assistant":
            before = _tokens(tokenizer, chat[:i], add_generation_prompt=True) if i else []
            after = _tokens(tokenizer, chat[: i + 1])
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                raise CommandError(
                    f"{where}: the chat template changes earlier turns when later ones follow, so it is not known "
                    "which tokens are the assistant's; leave --response-only out, or use a template with "
                    "{% generation %}."
                )
            silent[len(before) : len(after)] = [False] * (len(after) - len(before))
    return silent


def _tokens(tokenizer: Any, chat: Chat, **options: Any) -> list[int]:
    return list(_applied(tokenizer, chat, **options)["input_ids"])


def _applied(tokenizer: Any, chat: Chat, **options: Any) -> Any:
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
