"""The classes of a head, their number and their names, between a model's config and an adapter file.

transformers takes, saves and loads any numbers and names: from 1, with gaps, as text, more or fewer than the outputs. A
file has a list of names in the order of the outputs (``labels``) where they are numbered so, and else the config's own
dictionaries, so that a file can be written whatever they are.
"""

import json
import re
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from unilora_core import CorruptFileError
from unilora_core.header import SETTINGS, SIZES, ClassName, Header
from unilora_core.schema import parse_json, shown, typed

__all__ = ["Classes", "read_classes", "write_classes"]

Names = dict[Any, Any]

TELLS_APART = re.compile("Classification|Detection|Segmentation|XVector")
"""The classes of transformers whose outputs have names in the config."""

NUMBERS, NUMBER = "id2label", "label2id"


@dataclass(frozen=True)
class Classes:
    """The classes of a head, as a file states them.

    Attributes:
        count: the number of outputs of the head; None where the file does not say.
        id2label, label2id: the config's fields of these names; None likewise.
    """

    count: int | None
    id2label: Names | None
    label2id: Names | None

    def put_in(self, config: PreTrainedConfig) -> None:
        """Put the names into the config of a model that has the outputs."""
        if self.id2label is not None:
            config.id2label = dict(self.id2label)
        if self.label2id is not None:
            config.label2id = dict(self.label2id)


def read_classes(header: Header) -> Classes:
    """Read the classes of a file.

    Raises:
        CorruptFileError: the file asks for more outputs than a file may.
    """
    if labels := header.labels:
        return Classes(len(labels), dict(enumerate(labels)), _inverse(dict(enumerate(labels))))
    names: Names | None = {_number(key): name for key, name in header.id2label.items()} if header.id2label else None
    by_name = _inverse(names) if header.label2id is None and names is not None else header.label2id
    others = header.base_arguments.arguments.keys() - {"num_labels"}
    return Classes(header.settings(others).get("num_labels"), names, by_name)


def write_classes(model: PreTrainedModel) -> dict[str, str]:
    """Return the entries of a file for the classes of a model; empty for a model without classes.

    What cannot be stored is left out with a warning, so that what was trained is not lost.
    """
    if not TELLS_APART.search(type(model).__name__):
        return {}
    config = model.config
    names = {_number(key): name for key, name in _items(config, NUMBERS)}
    count, problem = getattr(model, "num_labels", len(names)), getattr(config, "problem_type", None)
    settings = dict(_settings(problem_type=problem))
    by_name = dict(_items(config, NUMBER))
    usual = not by_name or by_name == _inverse(names)
    if list(names) == list(range(count or 0)) and names and problem != "regression" and usual and _texts(names):
        written = {"labels": json.dumps(list(names.values()))}
    else:
        settings |= dict(_settings(num_labels=count))
        settings |= {"ignore_mismatched_sizes": True} if "num_labels" in settings else {}
        fields = ({NUMBERS: names} if names else {}) | ({} if usual else {NUMBER: by_name})
        written = {field: text for field, values in fields.items() for text in _dictionary(field, values)}
    return written | ({"base_arguments": json.dumps({"arguments": settings})} if settings else {})


def _items(config: PreTrainedConfig, field: str) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a field that should be a dictionary, and may be a list, or nothing."""
    value = getattr(config, field, None)
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _inverse(names: Names) -> Names:
    return {name: number for number, name in names.items() if isinstance(name, ClassName)}


def _texts(names: Names) -> bool:
    return all(isinstance(name, str) for name in names.values())


def _number(key: Any) -> int | str:
    """Return the number of a class as an integer, as transformers makes it whenever it loads a config."""
    try:
        return int(key)
    except (TypeError, ValueError):
        return str(key)


def _settings(**values: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a reader of the file would take."""
    for name, value in values.items():
        count = name == "num_labels" and isinstance(value, int) and 0 < value <= SIZES[name]
        if count or value in typing.get_args(SETTINGS[name]):
            yield name, value
        elif value is not None:
            warnings.warn(f"{name} = {shown(value)} is left out of the adapter file, which cannot say it", stacklevel=2)


def _dictionary(name: str, values: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the text of a dictionary, if it can be read again."""
    try:
        text = json.dumps({str(key): value for key, value in values.items()})
        typed(dict[str, ClassName], parse_json(text, name), name)
        yield text
    except (TypeError, ValueError, CorruptFileError) as error:
        warnings.warn(f"{name} is left out of the adapter file, which cannot say it: {error!s:.200}", stacklevel=2)
