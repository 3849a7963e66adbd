"""Files of records as people have them: line ends, encodings, headers, spellings; and how they are parted."""

import codecs
import gzip
import json
import re

import pytest

pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
records = pytest.importorskip("unilora_cli.data.records")
CommandError = records.CommandError

pytestmark = pytest.mark.usefixtures("data_cache")
COMPOSED, APART = "caf\u00e9", "cafe\u0301"
TABLE = "text,label\na b,x\nc,y\ne,x\nf,y\n"


@pytest.fixture
def read(parsed, tmp_path):
    """read(name, contents, *words): the texts of a language model, or, of ``label`` too, the labelled texts."""
    from unilora_cli.data.corpus import read_corpora
    from unilora_cli.data.texts import load_texts

    def run(name, contents, *words, kind="lm"):
        path = tmp_path / name
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        arguments = parsed("finetune", kind, "--model", "m", "--data", path, *words)
        return list(read_corpora(arguments)[0].texts) if kind == "lm" else load_texts(arguments)

    return run


def labelled(found):
    """What was read, whether it is to train on or held out."""
    return sorted((texts[0], found.classes[label]) for texts, label in [*found.train, *found.held_out])


# ---- line ends and encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=["CRLF", "CR"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV", "a.csv.gz"])
def test_line_ends_of_tables(read, name, end):
    contents = TABLE.replace("\n", end)
    contents = contents.replace(",", "\t") if "tsv" in name else contents
    data = gzip.compress(contents.encode()) if name.endswith("gz") else contents
    assert labelled(read(name, data, kind="text")) == [("a b", "x"), ("c", "y"), ("e", "x"), ("f", "y")]


def test_line_ends_within_a_text(read):
    assert labelled(read("a.csv", TABLE.replace("a b", '"a\r\nb"'), kind="text"))[0] == ("a\nb", "x")
    assert read("a.txt", "a\r\nb\rc\n") == ["a\nb\nc\n"]
    assert read("a.jsonl", json.dumps({"text": "a\r\nb"})) == ["a\r\nb"]  # what JSON says of itself is data


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_end_at_line_ends_alone(read, end):
    """Not at U+2028, U+0085 and the like, which may stand in a text."""
    texts = ["a\u2028b\x85c", "d\x0be\x1cf"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    assert read("a.jsonl", end.join(rows)) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_list_of_records_and_a_record_per_line(read, name):
    assert read(name, '[{"text": "a"},\n {"text": "b"}]') == ["a", "b"]
    assert read(name, '{"text": "a"}\n\n{"text": "b"}\n') == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_the_mark_of_utf_8_is_no_text(read, name):
    assert read(name, "\ufeff" + ("a" if name == "a.txt" else '[{"text": "a"}]')) == ["a"]


ENCODINGS = {
    "UTF-16 with a mark": (TABLE.encode("utf-16"), "not UTF-8 text, but UTF-16 or no text at all; save it as UTF-8"),
    "UTF-16 without": (TABLE.encode("utf-16-le"), "not UTF-8 text, but UTF-16"),
    "UTF-32": (codecs.BOM_UTF32_LE + TABLE.encode("utf-32-le"), "not UTF-8 text, but UTF-16"),
    "one line of Latin-1": (TABLE.encode() + b"caf\xe9,x\n", "a.csv, line 6: not UTF-8 text (invalid continuation"),
    "a null": (TABLE.encode() + b"text,x\n" * 999 + b"a\0b,x\n", "a.csv, line 1005: it holds a null character"),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_encodings_that_are_refused(read, case):
    data, message = ENCODINGS[case]
    with pytest.raises(CommandError, match=re.escape(message.replace("a.csv", "a.txt"))):
        read("a.txt", data)


# ---- headers and keys -------------------------------------------------------------------------------------------

HEADERS = {
    "two of one name": ("text,label,text\na,x,b\n", "a.csv: the columns 1 and 3 are both called 'text'; rename"),
    "two spellings": (f"{COMPOSED},label,{APART}\na,x,b\n", "the columns 1 and 3 are both called 'café'"),
    "semicolons": ("text;label\na;x\n", "one column only, 'text;label': the fields are separated by ';', and expected"),
    "tabs": ("text\tlabel\na\tx\n", "the fields are separated by '\\t', and expected by ','; save it with commas"),
    "no name": ("text,label,\na,x,9\n", "a.csv, line 2: column 3 has no name in the header, but a value here"),
    "too many": ("text,label\na,x,z\n", "a.csv, line 2: expected 2 fields, as in the header, got 3"),
    "too few": ("text,label\na\n", "a.csv, line 2: expected 2 fields, as in the header, got 1"),
    "an open quote": ('text,label\n"a,x\nb,y\n', "unexpected end of data; is there a quote that is not closed?"),
    "nothing": ("", "a.csv: there are no records in it"),
}


@pytest.mark.parametrize("case", ENCODINGS | HEADERS)
def test_tables_that_are_refused(read, case):
    contents, message = (ENCODINGS | HEADERS)[case]
    with pytest.raises(CommandError, match=re.escape(message)):
        read("a.csv", contents, kind="text")


def test_a_tsv_with_commas_is_refused(read):
    with pytest.raises(CommandError, match=r"a.tsv: one column only, 'text,label': the fields are separated by ','"):
        read("a.tsv", TABLE, kind="text")


@pytest.mark.parametrize("contents", [",text,label\n0,a,x\n1,b,y\n2,c,x\n3,d,y\n", "text,label,,\na,x,,\nb,y,,\n" * 1])
def test_columns_without_a_name_that_hold_nothing_or_row_numbers(read, contents):
    if contents.startswith("text"):
        contents += "c,x,,\nd,y,,\n"
    assert labelled(read("a.csv", contents, kind="text")) == [("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")]


@pytest.mark.parametrize("header", ["text,text,label\na,b,x\n", "text;label\na;x\n"])
def test_headers_of_tables_in_a_folder(parsed, tmp_path, header):
    (tmp_path / "train.csv").write_text(header)
    with pytest.raises(CommandError, match=r"train.csv: (the columns 1 and 2 are both called|one column only)"):
        records.load_tables(parsed("finetune", "text", "--model", "m", "--data", tmp_path))


@pytest.mark.parametrize("row", ['{"text": "a", "text": "b"}', '{"text": "a", "more": [{"b": 1, "b": 2}]}'])
def test_a_key_that_stands_twice_is_refused(read, row):
    with pytest.raises(CommandError, match=r"a.jsonl, line 2: not JSON \(the key '(text|b)' stands twice"):
        read("a.jsonl", '{"text": "c"}\n' + row)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.csv.bz2", "a.xlsx"])
def test_kinds_of_files_that_are_not_read_are_named(read, name):
    with pytest.raises(CommandError, match=r"files of this kind are not read; known: .tsv, .csv, .jsonl"):
        read(name, b"", kind="text")


# ---- two spellings of one name ----------------------------------------------------------------------------------


def test_two_spellings_of_a_class_are_one(read, parsed, tmp_path):
    found = read("a.csv", f"text,label\na,{COMPOSED}\nb,{APART}\nc,the\nd,the\n", kind="text")
    assert found.classes == (COMPOSED, "the")
    (tmp_path / "dev.csv").write_text(f"text,label\ne,{APART}\n")
    found = read("a.csv", f"text,label\na,{COMPOSED}\nb,the\n", "--eval-data", tmp_path / "dev.csv", kind="text")
    assert found.held_out == [(("e",), 0)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(("written", "asked"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_two_spellings_of_a_column_are_one(parsed, tmp_path, name, written, asked):
    from unilora_cli.data.corpus import read_corpora

    rows, path = [{written: "a", "label": "b"}] * 3, tmp_path / name
    table = datasets.Dataset.from_list(rows)
    {"a.csv": table.to_csv, "a.jsonl": table.to_json, "a.parquet": table.to_parquet}[name](path)
    line = ("finetune", "lm", "--model", "m", "--data", path)
    assert list(read_corpora(parsed(*line, "--text-column", asked))[0].texts) == ["a"] * 3
    pairs = read_corpora(parsed(*line, "--prompt", f"{{{asked}}}: ", "--response-column", "label"))[0].pairs
    assert pairs == [("a: ", "b")] * 3


# ---- what is held out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_each_class_keeps_an_example_to_train_on(seed):
    classes = [0] * 30 + [1] * 2 + [2]
    kept, apart = records.split_off(len(classes), 0.9, seed, classes)
    assert {classes[i] for i in kept} == {0, 1, 2}
    assert sorted([*kept, *apart]) == list(range(len(classes)))
    drawn = records.split_off(len(classes), 0.9, seed)[1]
    assert set(apart) <= set(drawn)
    assert len(drawn) - len(apart) <= 3


def test_what_is_held_out_does_not_depend_on_classes_that_have_enough():
    classes = [i % 2 for i in range(40)]
    assert records.split_off(40, 0.1, 3, classes) == records.split_off(40, 0.1, 3)


def test_nothing_can_be_held_out_of_classes_of_one_example():
    with pytest.raises(CommandError, match=r"are the only examples of their classes; give --eval-data"):
        records.split_off(3, 0.3, 0, ["a", "b", "c"])


def test_classes_without_examples_and_texts_seen_in_training_are_named(read, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\na b,x\nnew,x\n")
    found = read("a.csv", TABLE, "--eval-data", tmp_path / "dev.csv", kind="text")
    assert found.notes == [("classes without", "1, nothing held out: 'y'"), ("seen in training", "1 of the 2 held out")]
    found = read("a.csv", "text,label\n" + "a,x\n" * 30 + "b,y\n" * 2, "--limit", 1, kind="text")
    assert found.notes[0] == ("classes without", f"1, nothing to train on: {found.classes[1 - found.train[0][1]]!r}")
    contents = "text,label\na,Good\nb,good\nc,bad\nd,bad\ne,Good\nf,good\n"
    found = read("a.csv", contents, "--eval-data", tmp_path / "a.csv", kind="text")
    assert ("classes apart", "by capitals alone: 'Good', 'good'") in found.notes


def test_the_plan_says_it(unilora, bert, tmp_path):
    (tmp_path / "a.csv").write_text(TABLE.replace("c,y", "a b,y"))
    words = ("--max-steps", 1, "--device", "cpu", "--out", "run", "--eval-data", "a.csv")
    result = unilora("finetune", "text", "--model", bert, "--data", "a.csv", *words)
    assert result.code == 0, result.err
    assert re.search(r"^  seen in training +4 of the 4 held out$", result.out, re.MULTILINE), result.out
