"""All that a file's header says beside its spec: which layers the factors belong to, and which base model.

A file may come from anybody, so each entry has a schema. What it says of its base is a name, a class and a closed list
of harmless settings; code, tokens, devices, quantisation and further paths are for the caller to give.
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unilora_core.errors import CorruptFileError, SpecError
from unilora_core.frames import Sizes, frame_layout
from unilora_core.schema import parse_json, shown, typed
from unilora_core.serialisation import AdapterFile
from unilora_core.spec import ProjectionSpec

__all__ = [
    "FROZEN",
    "SETTINGS",
    "BaseArguments",
    "BaseIdentity",
    "ClassName",
    "Header",
    "TargetRow",
    "read_header",
    "read_identity",
    "write_identity",
    "write_targets",
]

FROZEN = "frozen."
"""The prefix of the extra tensors that a frame made of a weight: ``frozen.TARGET.ARRAY``."""

SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "dropout"), float),
    **dict.fromkeys(("embd_pdrop", "hidden_dropout_prob", "resid_pdrop"), float),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate", "drop_rate", "patch_drop_rate", "proj_drop_rate"), float),
    **dict.fromkeys(("depth", "in_chans", "num_classes", "num_labels"), int),
    "global_pool": Literal["", "avg", "avgmax", "map", "max", "token"],
    "ignore_mismatched_sizes": bool,
    "img_size": int | tuple[int, int],
    "pad_token_id": int,
    "problem_type": Literal["multi_label_classification", "regression", "single_label_classification"],
}
"""The settings of a base model that a file may state, with their types: arguments of timm's `create_model` and of
transformers' `from_pretrained`."""

SIZES = {"depth": 64, "in_chans": 256, "img_size": 4096, "num_classes": 2**16, "num_labels": 2**16}
"""The largest value of each setting that decides a model's size; ImageNet-21k has 21,841 classes."""


ClassName = str | int | float | bool | None
"""The types that transformers takes for the name of a class, or for its number."""


@dataclass(frozen=True)
class TargetRow:
    """One target of a frame; a pair has the factors ``name.A`` (rank, in_features) and ``name.B`` (out_features, rank).

    Attributes:
        rank: the rank; 0 where the frame has none.
        module: the layer's name.
        first_row: where the adapted outputs start among the layer's outputs.
        transposed: whether the weight is stored (in, out), as in transformers' Conv1D.
        parameter: the name of the parameter inside ``module`` that B·A is added to; None for a layer.
        experts: the number of matrices that the factors stack along a first axis; 0 for none.
    """

    name: str
    module: str
    rank: int
    in_features: int
    out_features: int
    first_row: int = 0
    transposed: bool = False
    parameter: str | None = None
    experts: int = 0


@dataclass(frozen=True)
class BaseIdentity:
    """The facts that identify a base model, as the PyTorch backend writes them.

    Attributes:
        kind: the name of its class.
        name: its name or path; None where it has none.
        embeddings: the shapes of its embeddings.
        values: some of its values, bfloat16 in base64.
        ends: some of the values in the last rows of its embeddings; empty in older files.
        fresh: name → some of the values of each weight that comes from no checkpoint and is not in the file.
    """

    kind: str
    name: str | None
    embeddings: tuple[tuple[int, int], ...]
    values: str
    ends: str = ""
    fresh: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseArguments:
    """The arguments with which the command `unilora` built the base model.

    Attributes:
        arguments: settings, among them those in `SETTINGS`; see `Header.settings`.
        pretrained: for timm: whether the weights are pretrained; else they are random, and ``seed`` fixes them.
        checkpoint: for timm: the file that the weights came from.
        seed: the seed of all that is random in the base model, such as a new head; 0 ≤ seed < 2^64.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    checkpoint: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Header:
    """The contents of a file beside its spec and its tensors.

    Attributes:
        targets: which layer each pair of factors belongs to.
        modules_to_save: the modules that were trained in full.
        base: what identifies the base model; None where the file does not say.
        base_model: its name or path; None likewise.
        base_class: its class in transformers; None likewise.
        task: what it does; None likewise.
        labels: the names of its classes, in the order of its outputs.
        id2label, label2id: these fields of a config of transformers, where `labels` cannot hold them; None likewise.
        base_arguments: how the base model was built.
        where: the file, for messages.
    """

    targets: tuple[TargetRow, ...]
    modules_to_save: tuple[str, ...]
    base: BaseIdentity | None
    base_model: str | None
    base_class: str | None
    task: Literal["vit", "text", "lm"] | None
    labels: tuple[str, ...]
    base_arguments: BaseArguments
    where: str
    id2label: dict[str, ClassName] | None = None
    label2id: dict[str, ClassName] | None = None

    def settings(self, given: Iterable[str] = ()) -> dict[str, Any]:
        """Return the settings of the base model that the file states, without those that the caller gives.

        Args:
            given: the names that the caller gives a value for; the file's values are left out.

        Raises:
            CorruptFileError: only the caller may give a setting, or a value has another type or size.
        """
        said = {name: value for name, value in self.base_arguments.arguments.items() if name not in set(given)}
        if strange := sorted(said.keys() - SETTINGS.keys()):
            raise CorruptFileError(
                f"{self.where}: it asks for {strange[0]} = {shown(said[strange[0]])} of its base model. A file from a "
                f"stranger could do harm by that, so it is not taken from a file. If you want it, give {strange[0]} "
                f"yourself: --model-arg {strange[0]}=… to the command, or {strange[0]}=… to from_pretrained."
            )
        return {name: _setting(f"{self.where}: base_arguments.{name}", name, value) for name, value in said.items()}


Entry = tuple[str, str, int, bool] | tuple[str, str, int, bool, str]
"""A target in the file: name, module, first row, transposed, and the parameter's name if it is one."""

Sized = tuple[str, str, int, bool, str | None, int, int, int]
"""A target of another frame, whose factors do not tell its sizes: the entries above, then inputs, outputs, experts."""


def write_targets(rows: Iterable[Entry | Sized], modules_to_save: Iterable[str] = ()) -> dict[str, str]:
    """Return the header's entries for the targets and for the modules that were trained in full."""
    return {"targets": json.dumps([list(row) for row in rows]), "modules_to_save": json.dumps(list(modules_to_save))}


def read_header(path: str | os.PathLike, file: AdapterFile) -> Header:
    """Read what a file's header says; without an entry for the targets, there is one target per pair of factors.

    Raises:
        CorruptFileError: an entry has another structure, or does not fit the layout; the error names it.
    """
    said = file.metadata

    def entry(name: str, kind: Any, default: Any) -> Any:
        return typed(kind, parse_json(said[name], f"{path}: {name}"), f"{path}: {name}") if name in said else default

    task, base_arguments = said.get("task"), entry("base_arguments", BaseArguments, BaseArguments())
    if not 0 <= base_arguments.seed < 2**64:
        raise CorruptFileError(f"{path}: base_arguments.seed: expected 0 ≤ seed < 2^64, got {base_arguments.seed}.")
    return Header(
        targets=_targets(path, file),
        modules_to_save=_names(f"{path}: modules_to_save", entry("modules_to_save", tuple[str, ...], ())),
        base=read_identity(said["base"], f"{path}: base", said.get("base_more")) if "base" in said else None,
        base_model=said.get("base_model"),
        base_class=said.get("base_class"),
        task=None if task is None else typed(Literal["vit", "text", "lm"], task, f"{path}: task"),
        labels=entry("labels", tuple[str, ...], ()),
        base_arguments=base_arguments,
        where=str(path),
        id2label=entry("id2label", dict[str, ClassName] | None, None),
        label2id=entry("label2id", dict[str, ClassName] | None, None),
    )


def _targets(path: str | os.PathLike, file: AdapterFile) -> tuple[TargetRow, ...]:
    where = f"{path}: its targets do not fit its layout"
    said = parse_json(file.metadata.get("targets", "null"), where)
    return _pairs(where, file.spec, said) if file.spec.frame == "pair" else _sized(where, file.spec, said)


def _pairs(where: str, spec: ProjectionSpec, said: Any) -> tuple[TargetRow, ...]:
    """Return the targets of pairs, whose shapes tell their sizes; each may have a rank of its own."""
    shapes, entries = spec.layout.shapes, typed(tuple[Entry, ...] | None, said, where)
    names = [name.removesuffix(".A") for name in shapes if name.endswith(".A")]
    rows = []
    for name, *entry in [(name, name, 0, False) for name in names] if entries is None else entries:
        if f"{name}.A" not in shapes or f"{name}.B" not in shapes:
            raise CorruptFileError(f"{where}: it has no factors A and B called {shown(name)}.")
        rows.append(_row(where, shapes[f"{name}.A"], shapes[f"{name}.B"], name, *entry))
    if len(shapes) != 2 * len(rows) or len({row.name for row in rows}) < len(rows):
        raise CorruptFileError(
            f"{where}: {len(shapes)} factors, but {len(rows)} targets; expected two for each, and each once."
        )
    return tuple(rows)


def _sized(where: str, spec: ProjectionSpec, said: Any) -> tuple[TargetRow, ...]:
    """Return the targets of any other frame; the layout must be the one that the frame makes of them."""
    rank = int(spec.chosen.get("rank", 0))
    rows = []
    for name, module, first_row, transposed, parameter, *sizes in typed(tuple[Sized, ...], said, where):
        if parameter is None and sizes[2]:
            raise CorruptFileError(
                f"{where}: expected 0 experts for the layer {shown(name)}, got {sizes[2]}; only a parameter has them."
            )
        rows.append(TargetRow(name, module, rank, sizes[0], sizes[1], first_row, transposed, parameter, sizes[2]))
    if len({row.name for row in rows}) < len(rows):
        raise CorruptFileError(f"{where}: a target occurs twice.")
    sizes_of = ((row.name, Sizes(row.in_features, row.out_features, row.experts)) for row in rows)
    try:
        made = frame_layout(spec.form, sizes_of, spec.chosen)
    except SpecError as error:
        raise CorruptFileError(f"{where}: {error}") from error
    if made != spec.layout:
        raise CorruptFileError(f"{where}: the frame {spec.frame!r} makes other factors of them, or in another order.")
    return tuple(rows)


def _row(
    where: str,
    A: tuple[int, ...],
    B: tuple[int, ...],
    name: str,
    module: str,
    first_row: int,
    transposed: bool,
    parameter: str | None = None,
) -> TargetRow:
    """Make the target of A (*experts, rank, in) and B (*experts, out, rank) from an entry of the header."""
    most = 2 + (parameter is not None)
    if not 2 <= len(A) <= most or (*A[:-2], B[-2] if len(B) > 1 else 0, A[-2]) != B:
        raise CorruptFileError(f"{where}: the factors of {shown(name)} have the shapes {shown(A)} and {shown(B)}.")
    experts = A[0] if len(A) == 3 else 0
    return TargetRow(name, module, A[-2], A[-1], B[-2], first_row, transposed, parameter, experts)


def _names(where: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names) or "" in names:
        raise CorruptFileError(f"{where}: expected the names of different modules, got {shown(names)}.")
    return names


def _setting(where: str, name: str, value: Any) -> Any:
    value = typed(SETTINGS[name], value, where)
    least, most = (1, SIZES[name]) if name in SIZES else (0, 1 if SETTINGS[name] is float else 2**31)
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(least <= number <= most for number in numbers if not isinstance(number, str)):
        raise CorruptFileError(f"{where}: expected {least} to {most}, got {shown(value)}.")
    return value


def write_identity(base: BaseIdentity | None) -> dict[str, str]:
    """Return the header's entries for what identifies the base model; empty for None.

    What older readers do not know is an entry of its own, which they skip.
    """
    if base is None:
        return {}
    facts = {"class": base.kind, "name": base.name, "embeddings": base.embeddings, "values": base.values}
    more = {"ends": base.ends, "fresh": base.fresh}
    return {"base": json.dumps(facts)} | ({"base_more": json.dumps(more)} if any(more.values()) else {})


def read_identity(text: str, where: str, more: str | None = None) -> BaseIdentity:
    """Read the entry ``base``, as the PyTorch backend writes it, and the entry ``base_more``.

    Raises:
        CorruptFileError: it has another structure.
    """
    said = typed(dict[str, Any], parse_json(text, where), where)
    rest = typed(dict[str, Any], parse_json(more, f"{where}_more"), f"{where}_more") if more is not None else {}
    names = {"class": "kind", "kind": "class"}  # "class" is a keyword of Python
    identity = typed(BaseIdentity, {names.get(key, key): value for key, value in (said | rest).items()}, where)
    if not all(map(_in_pairs, (identity.values, identity.ends, *identity.fresh.values()))):
        raise CorruptFileError(f"{where}: its values are not pairs of bytes in base64.")
    return identity


def _in_pairs(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) % 2 == 0
    except ValueError:
        return False
