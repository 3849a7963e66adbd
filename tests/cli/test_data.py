"""Data in: folders, files and data sets, and what is said of those that cannot be used."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("data_cache")
QUICK = ("--max-steps", 1, "--device", "cpu", "--out", "run")


@pytest.fixture
def vit(unilora, vit_model):
    return lambda *words: unilora("finetune", "vit", *vit_model, *QUICK, *words)


@pytest.fixture
def text(unilora, bert):
    return lambda *words: unilora("finetune", "text", "--model", bert, *QUICK, *words)


@pytest.fixture
def lm(unilora, llama):
    return lambda *words: unilora("finetune", "lm", "--model", llama, "--length", 16, *QUICK, *words)


def plan():
    return json.loads(Path("run/metrics.json").read_text())["plan"]


def counts():
    return plan()["train_examples"], plan()["held_out_examples"]


def refused(result, *parts):
    """Exit code 1 and one line that has each of the parts."""
    assert (result.code, result.err.count("\n")) == (1, 1), result
    assert result.err.startswith("unilora: error: ")
    for part in parts:
        assert part in result.err


# ---- images -----------------------------------------------------------------------------------------------------


def test_an_image_folder_with_val(vit, images):
    assert vit("--data", images).code == 0
    assert counts() == (24, 12)


def test_a_folder_of_class_folders_alone(vit, images):
    assert vit("--data", images / "train", "--holdout", 0.25, "--limit", 10, "--augment", "timm").code == 0
    assert counts() == (10, 6)


def test_eval_data_is_another_folder(vit, images):
    assert vit("--data", images / "train", "--eval-data", images / "val", "--workers", 1).code == 0
    assert counts() == (24, 12)


def test_grey_images_for_a_model_of_one_channel(vit, images):
    assert vit("--data", images, "--model-arg", "in_chans=1").code == 0


def as_dataset(images, split):
    files = sorted((images / split).rglob("*.png"))
    rows = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "green", "red"])}
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def test_a_folder_of_parquet_files(vit, images, tmp_path):
    for split in ("train", "validation"):
        as_dataset(images, split[:5] if split == "train" else "val").to_parquet(tmp_path / f"data/{split}.parquet")
    result = vit("--data", tmp_path / "data")
    assert result.code == 0, result.err
    assert counts() == (24, 12)


def test_a_dataset_saved_to_disk(vit, images, tmp_path):
    as_dataset(images, "train").save_to_disk(tmp_path / "data")
    result = vit("--data", tmp_path / "data")
    assert result.code == 0, result.err
    assert counts() == (22, 2)


def test_a_dataset_without_images(vit, tmp_path):
    datasets.Dataset.from_dict({"a": [1, 2], "label": [0, 1]}).to_parquet(tmp_path / "data.parquet")
    refused(vit("--data", tmp_path / "data.parquet"), "there is no column of images; its columns are a, label")


def test_an_undecodable_image_is_named(vit, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    bad = data / "train/red/3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    for workers in (0, 1):
        result = vit("--data", data, "--max-steps", 9, "--workers", workers)
        refused(result, f"error: {bad}: cannot be decoded as an image (", "repair or remove it")
    bad.write_text("no image")
    refused(vit("--data", data, "--max-steps", 9), f"error: {bad}: cannot be decoded", "no image format fits")


def test_an_undecodable_image_of_a_dataset_is_named(vit, images, tmp_path):
    rows = as_dataset(images, "train").cast_column("image", datasets.Image(decode=False)).to_list()
    for row in rows:
        row["image"] = {"bytes": b"no image" if row["image"]["path"].endswith("red/2.png") else png(row), "path": "x"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "g", "r"])})
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "data.parquet")
    result = vit("--data", tmp_path / "data.parquet", "--max-steps", 9)
    refused(result, f"{tmp_path}/data.parquet: image 18 (x): cannot be decoded as an image")


def png(row):
    return Path(row["image"]["path"]).read_bytes()


def test_folders_that_cannot_be_used(vit, images, tmp_path):
    refused(vit("--data", tmp_path / "none"), f"{tmp_path}/none: no such folder")
    (tmp_path / "bare").mkdir()
    refused(vit("--data", tmp_path / "bare"), "expected a folder of images for each class")
    data = shutil.copytree(images, tmp_path / "data")
    (data / "train/white").mkdir()
    refused(vit("--data", data), f"{data}/train/white: no image in this class folder")
    shutil.rmtree(data / "train/white")
    shutil.copytree(data / "val/red", data / "val/pink")
    refused(vit("--data", data), f"{data}/val: the class 'pink' is not among the training classes")


# ---- texts ------------------------------------------------------------------------------------------------------


def write(path, rows):
    """Records as .csv, .jsonl or .jsonl.gz."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.jsonl.gz", "data.parquet"])
def test_kinds_of_text_files(text, sentences, tmp_path, name):
    rows = [{"review": sentence, "stars": len(label)} for sentence, label in sentences]
    path = tmp_path / name
    datasets.Dataset.from_list(rows).to_parquet(path) if path.suffix == ".parquet" else write(path, rows)
    result = text("--data", path, "--text-column", "review", "--label-column", "stars")
    assert result.code == 0, result.err
    assert counts() == (36, 4)


def test_quotes_of_a_tsv_are_plain_characters(text, tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"the film\t1\nthe " plot\t0\n' + "a story\t0\n" * 2)
    assert text("--data", tmp_path / "a.tsv").code == 0
    assert counts() == (3, 1)


def test_pairs_of_texts(text, sentences, tmp_path):
    rows = [{"sentence1": sentence, "sentence2": "the plot", "label": label} for sentence, label in sentences]
    path = write(tmp_path / "a.jsonl", rows)
    result = text("--data", path, "--text-column", "sentence1", "--pair-column", "sentence2", "--eval-data", path)
    assert result.code == 0, result.err
    assert counts() == (40, 40)


def test_a_dataset_with_named_classes(text, tmp_path, sentences):
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [sentence for sentence, _ in sentences], "label": [len(label) - 3 for _, label in sentences]}
    data = datasets.Dataset.from_dict(rows, kinds)
    datasets.DatasetDict(train=data, test=data.select(range(10))).save_to_disk(tmp_path / "data")
    result = text("--data", tmp_path / "data")
    assert result.code == 0, result.err
    assert counts() == (40, 10)
    assert "no, yes" in result.out


def test_texts_that_cannot_be_used(text, tsv, tmp_path):
    refused(text("--data", tmp_path / "none.tsv"), f"{tmp_path}/none.tsv: no such file or folder")
    refused(text("--data", tsv, "--text-column", "words"), "no column 'words'; it has 'sentence', 'label'")
    refused(text("--data", tsv, "--label-column", "y"), "no column 'y'; it has 'sentence', 'label'")
    contents = {
        "sentence\tlabel\na\n": "bad.tsv, line 2: expected 2 fields",
        "sentence\tlabel\na\tx\nb\tx\n": "bad.tsv: the column 'label' has one class only, 'x'",
        "sentence\tlabel\na\tx\nb\t\n": "bad.tsv, record 2: the label is missing",
        "sentence\tlabel\n": "bad.tsv: there are no records in it",
        "words\tlabel\na\tx\n": "no column 'sentence' or 'text'",
    }
    for data, message in contents.items():
        (tmp_path / "bad.tsv").write_text(data)
        refused(text("--data", tmp_path / "bad.tsv"), message)
    (tmp_path / "bad.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    refused(text("--data", tmp_path / "bad.tsv"), "bad.tsv, line 2: not UTF-8 text")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    refused(text("--data", tmp_path / "bad.jsonl"), "bad.jsonl, line 2: not JSON")
    (tmp_path / "bad.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" * 99)[:30])
    refused(text("--data", tmp_path / "bad.tsv.gz"), "bad.tsv.gz: a damaged .gz file")
    (tmp_path / "bad.docx").write_text("")
    refused(text("--data", tmp_path / "bad.docx"), "files of this kind are not read; known: .tsv, .csv")


def test_a_held_out_class_that_training_lacks(text, tsv, tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe film\tgood\nthe plot\tugly\n")
    result = text("--data", tsv, "--eval-data", tmp_path / "dev.tsv")
    refused(result, "dev.tsv, record 2: the label 'ugly' is not among the training classes (bad, good)")


def test_labels_that_no_class_has(text, tmp_path):
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, kinds)
    data.to_parquet(tmp_path / "data.parquet")
    result = text("--data", tmp_path / "data.parquet")
    refused(result, "data.parquet, record 3: the label '-1' is not among the training classes (no, yes)")
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0.0, 1.0, float("nan")]})
    data.to_parquet(tmp_path / "other.parquet")
    refused(text("--data", tmp_path / "other.parquet"), "other.parquet, record 3: the label is missing")
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": i / 7} for i in range(1002)])
    refused(text("--data", path), "has 1002 different values; is it a class? (--label-column, or --regression)")
    assert not Path("run").exists()


# ---- language ---------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_blocks(lm, sentences, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentence for sentence, _ in sentences))
    result = lm("--data", tmp_path / "a.txt", "--holdout", 0.2)
    assert result.code == 0, result.err
    words = sum(len(sentence.split()) for sentence, _ in sentences) + 1
    assert counts() == (words // 16 - round(words // 16 * 0.2), round(words // 16 * 0.2))


def test_texts_of_records_are_joined(lm, sentences, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": sentence} for sentence, _ in sentences])
    assert lm("--data", path, "--eval-data", path).code == 0
    tokens = sum(len(sentence.split()) + 1 for sentence, _ in sentences)
    assert counts() == (tokens // 16, tokens // 16)


def test_prompt_and_response(tokenizer, parsed, tmp_path):
    from unilora_cli.data.corpus import read_corpora
    from unilora_cli.data.language import encode_corpora

    rows = [{"prompt": "the film was", "response": " very good"}, {"prompt": "the plot " * 20, "response": "bad"}] * 3
    path = write(tmp_path / "a.jsonl", rows)
    line = ("finetune", "lm", "--model", "m", "--data", path)

    def encoded(arguments):
        return encode_corpora(*read_corpora(arguments), arguments, tokenizer, 16)

    whole = encoded(parsed(*line))
    assert (len(whole.train), len(whole.held_out)) == (2, 1)
    assert whole.notes == [
        ("left out", f"3 of {path}: the prompt alone fills 16 tokens (--length)"),
        ("seen in training", "1 of the 1 held out"),
    ]
    tokens = whole.train[0]["input_ids"]
    assert tokenizer.decode(tokens) == "the film was very good [EOS]"
    assert whole.train[0]["labels"] == tokens
    half = encoded(parsed(*line, "--response-only"))
    assert half.train[0]["labels"] == [-100] * 3 + tokens[3:]


def test_prompts_are_parted_from_responses(tmp_path, parsed):
    from unilora_cli.data.corpus import read_corpora

    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Go.", "input": "", "output": "!"}]
    train, _ = read_corpora(parsed("finetune", "lm", "--model", "m", "--data", write(tmp_path / "a.jsonl", rows)))
    assert train.pairs == [
        ("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3"),
        ("### Instruction:\nGo.\n\n### Response:\n", "!"),
    ]
    rows = [{"question": "1+2?", "answer": "3"}, {"question": "1+2?", "answer": " 3"}]
    train, _ = read_corpora(parsed("finetune", "lm", "--model", "m", "--data", write(tmp_path / "b.jsonl", rows)))
    assert train.pairs == [("1+2?\n", "3"), ("1+2?", " 3")]


def test_language_that_cannot_be_used(lm, tmp_path, tsv):
    refused(lm("--data", tmp_path / "none.txt"), "none.txt: no such file")
    (tmp_path / "a.txt").write_text("the film")
    refused(lm("--data", tmp_path / "a.txt"), "3 tokens do not fill a block of 16; use a smaller --length")
    (tmp_path / "a.txt").write_text("the film was " * 9)
    refused(lm("--data", tmp_path / "a.txt"), "it fills one block of 16 tokens only")
    refused(lm("--data", tmp_path / "a.txt", "--response-only"), "it holds whole texts")
    refused(lm("--data", tmp_path / "a.txt", "--eval-data", tsv), "train.tsv: expected the columns messages or")
    refused(lm("--data", tsv), "expected the columns messages or conversations", "it has 'sentence', 'label'")
    path = write(tmp_path / "a.jsonl", [{"prompt": "the plot " * 20, "response": "bad"}] * 3)
    refused(lm("--data", path), "every prompt fills the 16 tokens of --length")


# ---- models -----------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_used(unilora, vit, text, images, tsv, tmp_path):
    refused(vit("--data", images, "--targets", "querry"), "querry")
    refused(vit("--data", images, "--model-arg", "nonsense=1"), "cannot build the model 'vit_tiny_patch16_224'")
    line = ("finetune", "vit", "--data", images, "--model", "vit_tiny_patch16_224", *QUICK)
    refused(unilora(*line, "--checkpoint", tmp_path / "x.pth"), "x.pth: no such checkpoint file")
    refused(vit("--data", images, "--d", 10**9), "expected 1 ≤ d ≤ min(D, 2^31), got d = 1000000000")
    refused(vit("--data", images, "--device", "cuda:77"), "--device cuda:77: there is no such device here")
    refused(text("--data", tsv, "--targets", "qurey"), "no module matches ('qurey',)", "'query'")
    refused(text("--data", tsv, "--start", "zero"), "start='zero' with the frame 'pair' would leave every factor")
    (tmp_path / "empty").mkdir()
    line = ("finetune", "text", "--data", tsv, "--model", tmp_path / "empty", *QUICK)
    refused(unilora(*line), f"cannot load the tokenizer of '{tmp_path}/empty'")
    line = ("finetune", "vit", "--data", images, "--model", "vit_nonsense", *QUICK)
    refused(unilora(*line), "cannot build the model 'vit_nonsense'")
