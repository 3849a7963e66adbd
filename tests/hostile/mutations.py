"""Hostile values, and mutations by structure: of JSON, of adapter files, of safetensors files; all from one `rng`.

A file is mutated by its contents, and whole around them: lengths, offsets, fingerprint and checksum are made anew, so
that what a reader meets is the lie and not a damaged file. Only a small share of the tries damages bytes.
"""

import copy
import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype as safetensors names it, shape, bytes."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I8": "int8"}
DTYPES |= {"U8": "uint8", "BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
JSON_FIELDS = ("spec", "targets", "modules_to_save", "base", "labels", "base_arguments")


class Raw(str):
    """JSON text as it stands, for what `json.dumps` would not write."""


DEEP = 100_000
TEXTS = [
    "",
    " ",
    "\0",
    "\x1b[2J\x1b[31mred\x07",
    "‮gnol",
    "a" * 10_000,
    "../../../etc/passwd",
    "/dev/zero",
    "~",
    ".",
    "..",
]
TEXTS += ["/etc/passwd", "a..b", "unilora", "unilora.theta_d", "__class__", "__dict__", "forward", "theta_d", "weight"]
TEXTS += ["%s%n{0}{x.__class__}", "'; touch owned; '", "$(touch owned)", "`touch owned`", "\ud800", "a\nunilora: done"]
TEXTS += [
    "(a+)+$",
    "([a-z._0-9]+)+!",
    "(?P<",
    "[",
    "*",
    "null",
    "NaN",
    "1",
    "é" * 100,
    "q.A",
    ".A",
    ".B",
    "layers.9" + "9" * 11,
]
TEXTS += [
    "model.layers.0",
    "http://localhost:9/x",
    "hf-hub:a/b",
    "local-dir:/",
    "\x9b31m",
    "  ",
    "-1",
    "True",
    "-",
    "--out",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    True,
    False,
    1.0,
    0.5,
    -0.0,
    1e308,
    1e-320,
    Raw("NaN"),
    Raw("Infinity"),
    Raw("1e999"),
]
NUMBERS += [Raw("-Infinity"), Raw("1" + "0" * 5000), 2**31, 2**31 - 1, 2**32, 2**48, 2**53 + 1, 2**63, 2**64, 2**64 - 1]
NUMBERS += [-(2**63), 10**30, 3, 7, 255, 65536]
STRUCTURES: list[Any] = [
    None,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0],
    ["a"],
    {"a": {"b": []}},
    [[["a", [1]]]],
    {"class": 1},
]
STRUCTURES += [Raw("[" * DEEP), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP)]
STRUCTURES += [Raw('{"a":1,"a":2}'), Raw("[1,]"), Raw(""), Raw("nul"), Raw("'a'"), Raw('"\\ud800"'), Raw('"\\u0000"')]


def hostile(rng: random.Random, words: tuple[str, ...] = ()) -> Any:
    """Any JSON value that a reader may not expect; ``words`` are names that the model knows."""
    kinds: list[list[Any]] = [TEXTS, NUMBERS, STRUCTURES]
    return copy.deepcopy(rng.choice(rng.choice([*kinds, list(words)] if words else kinds)))


def dumps(value: Any) -> str:
    """JSON text, with each `Raw` as it stands."""
    raws: list[str] = []

    def without(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, list):
            return [without(each) for each in value]
        return {key: without(each) for key, each in value.items()} if isinstance(value, dict) else value

    text = json.dumps(without(value))
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    return text


def mutate_json(rng: random.Random, value: Any, words: tuple[str, ...] = ()) -> Any:
    """The same value with one place changed."""
    box = [copy.deepcopy(value)]
    holder, key = rng.choice(_places(box))
    old = holder[key]
    tweaks: list[Callable[[], Any]] = [lambda: hostile(rng, words)] * 3
    if isinstance(old, bool) or old is None:
        tweaks += [lambda: int(bool(old)), lambda: not old]
    elif isinstance(old, (int, float)):
        tweaks += [lambda: rng.choice(NUMBERS)] * 3
        tweaks += [
            lambda: -old,
            lambda: old + 1,
            lambda: old - 1,
            lambda: old * 2,
            lambda: float(old),
            lambda: str(old),
        ]
    elif isinstance(old, str):
        tweaks += [lambda: rng.choice(TEXTS), lambda: old + rng.choice(TEXTS), lambda: rng.choice(TEXTS) + old]
        tweaks += [lambda: [old], lambda: rng.choice(words or ("x",)), lambda: old.upper(), lambda: old[:-1]]
    elif isinstance(old, list):
        tweaks += [lambda: old[:-1], lambda: old[1:], lambda: old + old[:1], lambda: old[::-1], lambda: [old]]
        tweaks += [lambda: [*old, hostile(rng, words)], lambda: old * 50, lambda: dict(enumerate(map(str, old)))]
    elif isinstance(old, dict):
        tweaks += [lambda: _less(rng, old), lambda: _less(rng, old), lambda: list(old.items()), lambda: [old]]
        tweaks += [lambda: old | {rng.choice(TEXTS): hostile(rng, words)}] * 2
    holder[key] = rng.choice(tweaks)()
    return box[0]


def _places(box: Any) -> list[tuple[Any, Any]]:
    found, queue = [], [box]
    while queue:
        holder = queue.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                queue.append(holder[key])
    return found


def _less(rng: random.Random, old: dict) -> dict:
    gone = rng.choice([*old, None])
    return {key: value for key, value in old.items() if key != gone}


# ---- safetensors ----------------------------------------------------------------------------------------------------


def tensor(array: np.ndarray) -> Tensor:
    kind = next(name for name, numpy in DTYPES.items() if numpy == str(array.dtype))
    return kind, array.shape, array.tobytes()


def unpack(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's strings and the tensors of a whole safetensors file."""
    size = int.from_bytes(data[:8], "little")
    fields, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    header = fields.pop("__metadata__", {})
    return header, {n: (f["dtype"], tuple(f["shape"]), rest[slice(*f["data_offsets"])]) for n, f in fields.items()}


def pack(header: dict[str, str] | None, tensors: dict[str, Tensor], rng: random.Random | None = None) -> bytes:
    """A safetensors file; with ``rng`` one whose own header lies somewhere."""
    fields: dict[str, Any] = {} if header is None else {"__metadata__": header}
    start = 0
    for name, (kind, shape, data) in tensors.items():
        fields[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, start + len(data)]}
        start += len(data)
    if rng is not None:
        fields = mutate_json(rng, fields)
    text = dumps(fields).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def mutate_tensor(rng: random.Random, old: Tensor) -> Tensor:
    """Another dtype, shape or other values."""
    kind, shape, data = old
    count = math.prod(shape)

    def cast() -> Tensor:
        other = rng.choice(list(SIZES))
        return other, shape, bytes(count * SIZES[other]) if rng.random() < 0.5 else (data * 8)[: count * SIZES[other]]

    def filled() -> Tensor:
        value = rng.choice([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0.0, 1e20])
        return "F32", shape, struct.pack("<f", value) * count

    def one() -> Tensor:
        at = 4 * rng.randrange(max(1, len(data) // 4))
        return (
            kind,
            shape,
            data[:at] + rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff"]) + data[at + 4 :] if data else data,
        )

    def shaped() -> Tensor:
        news = [(*shape, 1), (1, *shape), (count,), shape[::-1], (), (0,), (0, 2**40), (2, *shape), shape[:-1]]
        new = rng.choice(news)
        return kind, new, (data * 2 + bytes(64))[: math.prod(new) * SIZES.get(kind, 1)]

    kind_, shape_, data_ = rng.choice([cast, filled, one, shaped])()
    return kind_, shape_, data_.ljust(math.prod(shape_) * SIZES.get(kind_, 1), b"\0")


def mutate_tensors(rng: random.Random, tensors: dict[str, Tensor], words: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """One tensor changed, renamed, removed, or one more."""
    new, name = dict(tensors), rng.choice(list(tensors) or [""])
    kind = rng.randrange(5)
    if kind <= 1 and name in new:
        new[name] = mutate_tensor(rng, new[name])
    elif kind == 2:
        new.pop(name, None)
    elif kind == 3 and name in new:
        value = new.pop(name)
        text = str(rng.choice([*TEXTS, *words, name + ".x", name[1:], name.upper()]))
        new[text.encode("utf-8", "replace").decode()] = value
    else:
        text = str(rng.choice([*TEXTS, *words, *(f"{word}.weight" for word in words), name + "x"]))
        new[text.encode("utf-8", "replace").decode()] = mutate_tensor(rng, tensor(np.ones((2, 3), np.float32)))
    return new


def damage(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, cut off, put in, or the file cut."""
    kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.choice([1, 8, 100])) + data[at:]
    if kind == 2:
        return rng.choice([0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1, len(data)]).to_bytes(8, "little") + data[8:]
    new = bytearray(data)
    for _ in range(rng.choice([1, 2, 10])):
        if new:
            new[rng.randrange(min(len(new), 600 if kind == 3 else len(new)))] = rng.choice([0, 1, 34, 44, 91, 93, 255])
    return bytes(new)


# ---- adapter files --------------------------------------------------------------------------------------------------


@dataclass
class File:
    """An adapter file in parts: JSON fields as values, the others as strings."""

    header: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> "File":
        header, tensors = unpack(data)
        for name in ("checksum", "fingerprint"):
            header.pop(name)
        return cls({key: json.loads(v) if key in JSON_FIELDS else v for key, v in header.items()}, tensors)

    @property
    def spec(self) -> dict[str, Any]:
        spec = self.header.get("spec")
        return spec if isinstance(spec, dict) else {}

    def pack(self, rng: random.Random | None = None) -> bytes:
        """The bytes of a file whose fingerprint and checksum are right wherever they can be."""
        header = {}
        for key, value in self.header.items():
            text = dumps(value) if key in JSON_FIELDS else str(value)
            header[str(key).encode("utf-8", "replace").decode()] = text.encode("utf-8", "replace").decode()
        if "fingerprint" not in header:
            header["fingerprint"] = _sha(self.spec.get("layout"))
        if "checksum" not in header:
            header["checksum"] = checksum(header, self.tensors)
        return pack(header, self.tensors, rng)


def _sha(layout: Any) -> str:
    try:
        plain = json.loads(dumps(layout))
        return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()
    except (ValueError, RecursionError):
        return "0" * 64


def checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """As docs/format.md has it."""
    digest = hashlib.sha256(json.dumps(sorted(header.items()), separators=(",", ":")).encode())
    for name, (kind, shape, data) in sorted(tensors.items()):
        row = [name, DTYPES.get(kind, kind), list(shape)]
        digest.update(json.dumps(row, separators=(",", ":")).encode() + data)
    return digest.hexdigest()


def mutate_file(rng: random.Random, seed: File, words: tuple[str, ...], extra: dict[str, list[Any]]) -> bytes:
    """The bytes of a file that lies in one to three places.

    Args:
        words: module names of the model, and others that it knows.
        extra: header field → values that a stranger may try there.
    """
    file = copy.deepcopy(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choices([_field, _lie, _strings, _tensors, _extra, _many], [300, 350, 80, 150, 120, 3])[0](
            rng, file, words, extra
        )
    if rng.random() < 0.8:
        _repair(rng, file)
    if rng.random() < 0.05:
        file.header[rng.choice(["checksum", "fingerprint"])] = rng.choice(TEXTS)
    if rng.random() < 0.03:
        return file.pack(rng)
    return damage(rng, file.pack()) if rng.random() < 0.05 else file.pack()


def _field(rng: random.Random, file: File, words: tuple[str, ...], _extra: Any) -> None:
    known = [key for key in JSON_FIELDS if key in file.header]
    weights = [3 if key in ("spec", "targets") else 1 for key in known]
    if known:
        key = rng.choices(known, weights)[0]
        file.header[key] = mutate_json(rng, file.header[key], words)


def _strings(rng: random.Random, file: File, words: tuple[str, ...], _extra: Any) -> None:
    key = rng.choice(list(file.header) or [""])
    if rng.random() < 0.3:
        file.header.pop(key, None)
    elif rng.random() < 0.5:
        file.header[key] = Raw(rng.choice(TEXTS)) if key in JSON_FIELDS else rng.choice([*TEXTS, *words])
    else:
        file.header[rng.choice([*TEXTS[1:], "task", "labels", "base", "base_class"])] = hostile(rng, words)


def _tensors(rng: random.Random, file: File, words: tuple[str, ...], _extra: Any) -> None:
    file.tensors = mutate_tensors(rng, file.tensors, words)


def _extra(rng: random.Random, file: File, words: tuple[str, ...], extra: dict[str, list[Any]]) -> None:
    if extra:
        key = rng.choice(list(extra))
        file.header[key] = copy.deepcopy(rng.choice(extra[key]))


def _pairs(file: File) -> list[tuple[list, list]]:
    """The rows of A and B of each target in the layout, where it still is one."""
    layout = file.spec.get("layout")
    if not isinstance(layout, list):
        return []
    rows = {row[0]: row for row in layout if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)}
    pairs = [(row, rows.get(f"{name[:-2]}.B")) for name, row in rows.items() if name.endswith(".A")]
    return [(A, B) for A, B in pairs if B and all(isinstance(r[1], list) and len(r[1]) > 1 for r in (A, B))]


def _rows(file: File) -> list[list]:
    rows = file.header.get("targets")
    return [row for row in rows if isinstance(row, list) and len(row) >= 4] if isinstance(rows, list) else []


def _lie(rng: random.Random, file: File, words: tuple[str, ...], _extra: Any) -> None:
    """A file that fits together and not the model."""
    pairs, rows, spec = _pairs(file), _rows(file), file.spec
    if isinstance(spec, dict) and ("options" in spec or not pairs):
        _lie_of_frame(rng, spec, rows)
        return
    if not pairs or not spec:
        return
    kind, (A, B) = rng.randrange(12), rng.choice(pairs)
    if kind <= 2:  # the rank
        rank = rng.choice([0, 1, 2, 7, 33, 1000, 2**14, 2**20, 2**27, 2**40, -1, True, 2.0])
        for a, b in pairs if kind else [(A, B)]:
            a[1][-2] = b[1][-1] = rank
        spec["d"] = rng.choice([1, spec.get("d"), 2, 1000])
    elif kind == 3:  # d
        spec["d"] = rng.choice([1, 2, 3, 40, 1000, 4096, 2**20, 2**31, 0, -1, 1.0, True])
    elif kind == 4:
        spec[rng.choice(["grouping", "start", "seed", "bound"])] = rng.choice(
            ["iid", "numpy-shuffle", "balanced", "paper", "identity", 0, 2**64 - 1, 1e-30, 3e38, True, 0.5]
        )
    elif kind == 5 and rows:
        rng.choice(rows)[2] = rng.choice([-1, -8, 1, 2, 8, 2**31, 2**40, 2**70, True, 1.5, "0", None])
    elif kind == 6 and rows:
        rng.choice(rows)[1] = rng.choice([*words, *TEXTS])
    elif kind == 7 and rows:
        row = rng.choice(rows)
        row[3:] = rng.choice(
            [[True], [False], [1], ["yes"], [None], [False, "weight"], [True, "weight"], [False, "bias"]]
        )
        if rng.random() < 0.3:
            row[4:] = [rng.choice([*words, *TEXTS, 1, None, "in_proj_weight"])]
    elif kind == 8:  # another pair on the same layer
        name = rng.choice(["again", A[0][:-2] + "2", "\x1b[31m", "x" * 1000])
        spec["layout"] += [[f"{name}.A", copy.copy(A[1])], [f"{name}.B", copy.copy(B[1])]]
        if rows:
            old = next((row for row in rows if row[0] == A[0][:-2]), rows[0])
            file.header["targets"].append([name, *old[1:]])
    elif kind == 9:
        rng.shuffle(spec["layout"])
        if rng.random() < 0.5 and rows:
            rng.shuffle(file.header["targets"])
    elif kind == 10:  # a stack of matrices
        number = rng.choice([0, 1, 2, 2**20, 2**40])
        A[1].insert(0, number)
        B[1].insert(0, number)
    elif kind == 11:
        file.header["modules_to_save"] = [rng.choice([*words, *TEXTS]) for _ in range(rng.choice([1, 2, 1000]))]


def _lie_of_frame(rng: random.Random, spec: dict[str, Any], rows: list[list]) -> None:
    """Options, names and sizes of another frame or map than Uni-LoRA's."""
    kind, options = rng.randrange(5), spec.get("options")
    options = options if isinstance(options, dict) else {}
    numbers = [0, 1, 2, 3, 7, 64, 1000, 2**20, 2**31, 2**40, -1, True, 1.5, 1e300]
    if kind == 0 and options:
        options[rng.choice(list(options))] = rng.choice(numbers)
    elif kind == 1 and "rank" in options:  # in the shapes, too
        old, options["rank"] = options["rank"], rng.choice(numbers)
        for _, shape in (entry for entry in spec.get("layout", []) if isinstance(entry, list) and len(entry) == 2):
            if isinstance(shape, list):
                shape[:] = [options["rank"] if size == old else size for size in shape]
        spec["d"] = rng.choice([spec.get("d"), 1, 1000])
    elif kind == 2 and rows and len(rows[0]) == 8:
        rng.choice(rows)[rng.randrange(5, 8)] = rng.choice(numbers)
    elif kind == 3:
        spec["frame"] = rng.choice(["pair", "rows", "scaled", "tied", "core", "dense", "spectrum"])
        spec["grouping"] = rng.choice([spec.get("grouping"), "identity", "fastfood", "codebook", "local", "balanced"])
    elif kind == 4:
        spec["d"] = rng.choice(numbers)


def _many(rng: random.Random, file: File, words: tuple[str, ...], _extra: Any) -> None:
    """Long lists: what is done for each pair of two is felt here."""
    count, spec = rng.choice([1000, 1000, 3000, 10000]), file.spec
    if not spec:
        return
    names = [f"t{i}" for i in range(count)]
    if rng.random() < 0.5:
        names[-1] = names[-2]
    module = rng.choice([*words, "t"])
    spec["layout"] = [[f"{name}.{f}", [1, 1]] for name in names for f in "AB"]
    spec["d"] = 1
    file.header["targets"] = [[name, module if rng.random() < 0.5 else name, i, False] for i, name in enumerate(names)]
    if rng.random() < 0.3:
        file.header["modules_to_save"] = [rng.choice([*words, name]) for name in names]


def _repair(rng: random.Random, file: File) -> None:
    """θ_d of the shape that the spec says, so that the lie is met further in."""
    d = file.spec.get("d")
    if isinstance(d, (int, float)) and not isinstance(d, Raw) and 0 < d <= 2**20 and int(d) == d:
        old = file.tensors.get("theta_d")
        if old is None or old[0] == "F32":
            data = (old[2] if old and old[2] else b"\0\0\0\0") * (int(d) + 1)
            if old is None or old[1] != (int(d),):
                file.tensors["theta_d"] = ("F32", (int(d),), data[: 4 * int(d)])
