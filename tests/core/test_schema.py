"""What a file says is read by declared types: each other value is one clear error, short and in linear time."""

import dataclasses
import json
import sys
import tracemalloc
from typing import Any, Literal

import pytest

from unilora_core import CorruptFileError
from unilora_core.errors import printable
from unilora_core.schema import parse_json, read_json, shown, typed


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b", 1] = "a"
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    size: int | tuple[int, int] | None = None
    any: Any = None


# ---- JSON -----------------------------------------------------------------------------------------------------------


DEEP = 100_000
NO_JSON = {
    "": "Expecting value",
    "[1,]": "Expecting value|Illegal trailing comma",
    "{'a': 1}": "Expecting property name",
    "nul": "Expecting value",
    "[" * DEEP: "recursion",
    "[" * DEEP + "]" * DEEP: "recursion",
    '{"a":' * DEEP + "1" + "}" * DEEP: "recursion",
    '{"a": 1, "b": 2, "a": 3}': "the name 'a' occurs twice in one object",
    '[{"b": {"a": 1, "a": 1}}]': "the name 'a' occurs twice in one object",
    "1" + "0" * 5000: "digits",
    r'"\ud800"': "surrogates not allowed",
    r'{"\uDFFF": 1}': "surrogates not allowed",
    '"a\nb"': "control character",
}


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_text_that_is_refused(text):
    with pytest.raises(CorruptFileError, match=f"^here: not JSON that can be read .*{NO_JSON[text]}") as caught:
        parse_json(text, "here")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "",
        "ä\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        2**64,
        -0.5,
        {"a": {"b": [1]}},
    ],
)
def test_text_that_is_read(value):
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only), "here") == value


def test_numbers_that_are_none_pass_until_a_type_is_asked_for():
    """A config.json of transformers may hold Infinity in a field that nobody here reads."""
    for text in ("Infinity", "-Infinity", "NaN", "1e999"):
        with pytest.raises(CorruptFileError, match=r"^here: expected a finite number, got"):
            typed(float, parse_json(text, "here"), "here")


@pytest.mark.parametrize("data", [b"\xff{}", b"[1]", b"null", b"\xef\xbb\xbf{}", b"{", b""])
def test_a_file_that_holds_no_object(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"config\.json: "):
        read_json(path)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


# ---- types ----------------------------------------------------------------------------------------------------------


REFUSED = [
    (str, 1, "a string, got 1"),
    (str, None, "a string, got None"),
    (int, True, "an integer, got True"),
    (int, 1.0, "an integer, got 1.0"),
    (int, "1", "an integer, got '1'"),
    (int, 2**64, r"an integer below 2\^64, got 18446744073709551616"),
    (int, -(10**4299), r"an integer below 2\^64, got -1000"),
    (bool, 1, "true or false, got 1"),
    (float, True, "a finite number, got True"),
    (float, float("nan"), "a finite number, got nan"),
    (float, float("-inf"), "a finite number, got -inf"),
    (float, 10**400, "a finite number, got 1000"),
    (type(None), 0, "null, got 0"),
    (Literal["a", 1], "b", "'a' or 1, got 'b'"),
    (Literal["a", 1], True, "'a' or 1, got True"),
    (Literal["a", 1], [], r"'a' or 1, got \[\]"),
    (int | None, "a", "an integer or null, got 'a'"),
    (tuple[int, ...], {"a": 1}, "a list of an integer, got {'a': 1}"),
    (tuple[int, ...], "12", "a list of an integer, got '12'"),
    (tuple[int, int], [1], r"\[an integer, an integer\], got \[1\]"),
    (dict[str, int], [1], r"an object of an integer, got \[1\]"),
    (dict[str, int], None, "an object of an integer, got None"),
]


@pytest.mark.parametrize(("kind", "value", "message"), REFUSED)
def test_a_value_of_another_type(kind, value, message):
    with pytest.raises(CorruptFileError, match=f"^here: expected {message}"):
        typed(kind, value, "here")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^here: expected the fields \['inner'\], got \[\]"),
        (None, r"^here: expected the fields \['inner'\], got None"),
        ({}, r"^here: expected the fields \['inner'\], got \[\]"),
        ({"inner": {"width": 1}, "other": 1}, r"^here: expected the fields \['inner'\], got \['inner', 'other'\]"),
        ({"inner": {"width": "1"}}, "^here.inner.width: expected an integer, got '1'"),
        ({"inner": {"width": 1, "names": ["a", 2]}}, r"^here.inner.names\[1\]: expected a string, got 2"),
        ({"inner": {"width": 1}, "rates": {"x": None}}, "^here.rates.x: expected a finite number, got None"),
        ({"inner": {"width": 1}, "size": [1]}, r"^here.size: expected an integer or \[.*\] or null, got \[1\]"),
    ],
)
def test_an_object_with_another_structure(value, message):
    with pytest.raises(CorruptFileError, match=message):
        typed(Outer, value, "here")


def test_what_fits_becomes_what_is_declared():
    said = {"inner": {"width": 3, "names": ["a"]}, "kind": 1, "rates": {"x": 1}, "size": [1, 2], "any": [[{}]]}
    found = typed(Outer, said, "here")
    assert found == Outer(Inner(3, ("a",)), 1, {"x": 1.0}, (1, 2), [[{}]])
    assert type(found.rates["x"]) is float
    assert typed(Outer, {"inner": {"width": 3}}, "here") == Outer(Inner(3))


# ---- messages and bounds --------------------------------------------------------------------------------------------


def nested(depth, width):
    value = "x"
    for _ in range(depth):
        value = [value] * width
    return value


LONG = [nested(900, 1), nested(6, 16), "a" * 10**6, 10**4400, {"k" * 10**6: nested(6, 16)}, [10**4400]]


@pytest.mark.parametrize("value", LONG, ids=range(len(LONG)))
def test_messages_are_short_whatever_a_value_is(value):
    assert len(shown(value)) < 3000
    with pytest.raises(CorruptFileError) as caught:
        typed(bool, value, "here")
    assert len(str(caught.value)) < 3000


def test_control_characters_are_escaped():
    text = "\x1b[2J\x07\x9b31m\u202e\ud800 ä"
    assert printable(text) == r"\x1b[2J\x07\x9b31m\u202e\ud800 ä"
    assert printable(printable(text) + "\n") == printable(text) + "\n"
    with pytest.raises(CorruptFileError) as caught:
        typed(int, text, f"a file called {text}")
    assert all(c.isprintable() for c in str(caught.value))
    assert str(CorruptFileError(text)) == printable(text)


def calls_of(action):
    """How many functions of this library's are called."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "call" and "unilora_core" in frame.f_code.co_filename

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


Entry = tuple[str, int] | tuple[str, int, str]


@pytest.mark.parametrize("row", [["a", 1], ["a", 1, "b"]])
def test_work_and_memory_are_linear_in_the_text(row):
    def read(rows):
        text = json.dumps({"rows": [row] * rows, **{f"name{i}": i for i in range(rows)}})
        tracemalloc.start()
        calls = calls_of(lambda: typed(tuple[Entry, ...], parse_json(text, "here")["rows"], "here"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return calls / len(text), peak / len(text)

    (calls, peak), (more_calls, more_peak) = read(1000), read(8000)
    assert more_calls < 1.1 * calls < 2
    assert more_peak < 1.5 * peak < 60
