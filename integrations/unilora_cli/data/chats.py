"""A chat of a record, as a tokenizer's template takes it: OpenAI's form, ShareGPT's, or TRL's prompt and completion."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unilora_cli.console import CommandError
from unilora_core.schema import shown

__all__ = ["CHATS", "OPTIONS", "Chat", "read_chat", "without_none"]

CHATS = ("messages", "conversations", "conversation")
"""Columns that hold a chat."""

OPTIONS = ("system", "tools", "functions", "documents", "chat_template_kwargs")
"""Columns that may stand beside it."""

MEDIA = ("image", "images", "audio", "audios", "video", "videos")

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
SPEAKERS |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
"""Who speaks in ShareGPT's form, beside the roles themselves."""

CALLS = ("function_call", "tool_call")
"""Speakers that are the assistant, calling a function."""

Turn = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Turns, and what a template gets beside them.

    Attributes:
        turns: ``{"role": ..., "content": ...}`` and whatever else a turn has, such as ``tool_calls``.
        options: ``tools``, ``documents``, and what the record's ``chat_template_kwargs`` hold.
        silent: the indices of turns of ``"weight": 0``, from which nothing is learnt.
        start: the first turn that ``--response-only`` learns from.
    """

    turns: list[Turn]
    options: dict[str, Any] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()
    start: int = 0

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's turns that are learnt."""
        return [i for i in self.said if i >= self.start and i not in self.silent]

    @property
    def said(self) -> list[int]:
        """The indices of the assistant's turns."""
        return [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]


def read_chat(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Chat:
    """The chat in one column of a record, or in two: a prompt and its completion.

    Raises:
        CommandError: no list of turns, an unknown role, a turn that says nothing, one that is no text, no turn of the
            assistant to learn from.
    """
    if media := [name for name in MEDIA if row.get(name)]:
        raise CommandError(f"{where}: it has {media[0]!r}, and this is for models of text; leave such records out.")
    given = [_listed(row.get(name), f"{where}: expected a list of turns in {name!r}") for name in columns]
    if not all(given):
        raise CommandError(f"{where}: expected a list of turns in {columns[given.index([])]!r}, got [].")
    turns = [_turn(turn, f"{where}, turn {i + 1}") for i, turn in enumerate(turn for part in given for turn in part)]
    start = len(given[0]) if len(given) > 1 else 0
    if system := row.get("system"):
        if not isinstance(system, str) or turns[0]["role"] == "system":
            raise CommandError(f"{where}: expected a text in 'system', and no turn of the system beside it.")
        turns.insert(0, {"role": "system", "content": system})
        start += bool(start)
    silent = frozenset(i for i, turn in enumerate(turns) if turn.pop("weight", 1) == 0)  # no template has a use for it
    chat = Chat(turns, _options(row, where), silent, start)
    if not chat.said:
        raise CommandError(f"{where}: there is no turn of the assistant, so there is nothing to learn.")
    if not chat.answers:
        what = "after the prompt" if start else "of a weight above 0"
        raise CommandError(f"{where}: there is no turn of the assistant {what}, so there is nothing to learn.")
    return chat


def without_none(value: Any) -> Any:
    """A record of a table without the keys that only other records have: Arrow gives these the value None."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def _turn(given: Any, where: str) -> Turn:
    if not isinstance(given, Mapping):
        raise CommandError(f"{where}: expected a turn {{'role': ..., 'content': ...}}, got {shown(given)}.")
    turn = {key: value for key, value in given.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, where)
    if turn.get("role") == "function":  # OpenAI's older word
        turn["role"] = "tool"
    if turn.get("role") not in ROLES:
        raise CommandError(f"{where}: the role {shown(turn.get('role'))} is none of {', '.join(ROLES)}.")
    if "function_call" in turn:
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    if calls := turn.pop("tool_calls", None):
        calls = _listed(calls, f"{where}: expected a list in 'tool_calls'")
        turn["tool_calls"] = [_call(call, where) for call in calls]
    turn["content"] = _content(turn, where)
    if turn.get("weight", 1) not in (0, 1):
        raise CommandError(f"{where}: expected the weight 0 or 1, got {shown(turn['weight'])}.")
    return turn


def _from_sharegpt(turn: Turn, where: str) -> Turn:
    """``{"from": ..., "value": ...}`` as role and content, whatever else it has beside."""
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker, value = turn["from"], turn.get("value")
    if speaker not in CALLS:
        return {"role": SPEAKERS.get(str(speaker), speaker), "content": value} | rest
    calls = _parsed(value, f"{where}: expected the call of a function as JSON")
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]} | rest


def _call(call: Any, where: str) -> Any:
    """A call whose arguments are an object, as templates want them; OpenAI's are JSON text."""
    if not isinstance(call, Mapping):
        raise CommandError(f"{where}: expected a call as an object {{...}}, got {shown(call)}.")
    call = dict(call)
    inner = call.pop("function", None) or {key: call.pop(key) for key in ("name", "arguments") if key in call}
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise CommandError(f"{where}: expected a call with the name of a function, got {shown(call)}.")
    wanted = f"{where}: expected the arguments of {shown(inner['name'])} as JSON"
    arguments = _parsed(inner.get("arguments") or {}, wanted)
    return {"type": "function"} | call | {"function": {**inner, "arguments": arguments}}


def _content(turn: Turn, where: str) -> str:
    """A turn's text; that of parts is joined. The assistant may say nothing but what other keys hold."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    if content is None and turn["role"] == "assistant" and any(turn[key] for key in turn.keys() - {"role", "weight"}):
        return ""
    if not isinstance(content, str):
        raise CommandError(f"{where}: expected a text as the content, got {shown(content)}.")
    return content


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else part
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    raise CommandError(
        f"{where}: a part of the content is of the type {shown(kind)}, and this is for models of text: expected "
        '{"type": "text", "text": ...}; leave such chats out.'
    )


def _options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("tools", "functions", "documents"):
        if row.get(name):
            found[name] = _listed(row[name], f"{where}: expected a list in {name!r}")
            if strange := [value for value in found[name] if not isinstance(value, Mapping)]:
                raise CommandError(f"{where}: expected objects {{...}} in {name!r}, got {shown(strange[0])}.")
    if functions := found.pop("functions", None):
        found["tools"] = [{"type": "function", "function": function} for function in functions]
    if more := row.get("chat_template_kwargs"):
        more = _parsed(more, f"{where}: expected an object {{...}} in 'chat_template_kwargs'")
        if not isinstance(more, Mapping) or "chat_template" in more:
            raise CommandError(f"{where}: chat_template_kwargs: expected names and values for the template.")
        found |= more
    return found


def _listed(value: Any, wanted: str) -> list[Any]:
    """A list, as such or as JSON text (in which tables keep what differs from record to record)."""
    found = _parsed(value, wanted) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise CommandError(f"{wanted}, got {shown(value)}.")
    return list(found)


def _parsed(value: Any, wanted: str) -> Any:
    """An object or a list, from JSON text if it is one."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{wanted}, got {shown(value)} ({error}).") from error
    if not isinstance(found, (Mapping, list)):
        raise CommandError(f"{wanted}, got {shown(value)}.")
    return found
