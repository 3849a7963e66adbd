"""What is written of a classifier's predictions: the tables, the confusion matrix, and the sheet of mistakes."""

import csv
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("datasets")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pictures = pytest.importorskip("unilora_cli.tasks.pictures")


def found(classes, labels, predicted, probability=None):
    """Predictions of images 0.png, 1.png, …"""
    n = len(labels)
    probability = np.linspace(0.5, 1, n) if probability is None else np.array(probability)
    names = [f"data/{i}.png" for i in range(n)]
    return pictures.Predictions(tuple(classes), names, np.array(labels), np.array(predicted), probability, probability)


def rows(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_counts_of_confusion(tmp_path):
    some = found("abc", [0, 0, 0, 1, 1], [0, 1, 1, 1, 0])
    assert some.confusion().tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
    pictures.write_confusion(tmp_path / "c.csv", some)
    assert rows(tmp_path / "c.csv") == [
        ["true", "a", "b", "c"],
        ["a", "1", "2", "0"],
        ["b", "1", "1", "0"],
        ["c"] + ["0"] * 3,
    ]
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 7, (2, 100))
    assert (found("abcdefg", labels, guesses).confusion() == confusion_matrix(labels, guesses)).all()


def test_mistakes_come_with_the_most_confident_first():
    some = found("ab", [0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0.6, 0.99, 0.9, 0.7, 0.9])
    assert some.mistakes().tolist() == [2, 4, 3, 0]


def test_a_row_per_prediction(tmp_path):
    some = found(["cat, grey", "dog"], [0, 1], [0, 0], [0.75, 0.875])
    pictures.write_predictions(tmp_path / "p.csv", some)
    assert rows(tmp_path / "p.csv") == [
        ["file", "true", "predicted", "probability", "probability_of_true"],
        ["data/0.png", "cat, grey", "cat, grey", "0.7500", "0.7500"],
        ["data/1.png", "dog", "cat, grey", "0.8750", "0.8750"],
    ]


@pytest.mark.parametrize("n", [2, 12, 13, 60, 200])
def test_the_matrix_is_drawn_for_any_number_of_classes(tmp_path, n):
    labels = np.arange(n - 1).repeat(2)  # none of the last class
    names = [f"class {i} costs $5_{i}" for i in range(n - 1)] + ["鳥"]
    pictures.draw_confusion(tmp_path / "c.png", found(names, labels, labels))
    drawn = pixels(tmp_path / "c.png")
    assert 400 < min(drawn.shape[:2]) <= max(drawn.shape[:2]) < 1700
    full = (drawn == (8, 48, 107)).all(-1).sum()  # the blue of a part of 1: the diagonal but for the last cell
    assert full > 2 * n


def test_the_matrix_shows_parts_of_the_true_class(tmp_path):
    right, wrong = (found("ab", [0, 0, 1, 1], guesses) for guesses in ([0, 0, 1, 1], [1, 1, 0, 0]))
    for name, some in (("right", right), ("wrong", wrong)):
        pictures.draw_confusion(tmp_path / f"{name}.png", some)
    one, other = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("right", "wrong"))
    blue = [(image == (8, 48, 107)).all(-1) for image in (one, other)]
    assert blue[0].sum() == pytest.approx(blue[1].sum(), rel=0.05)  # two cells of 100 %, on the diagonal or off it
    assert (blue[0] & blue[1]).sum() < 0.1 * blue[0].sum()


@pytest.mark.parametrize(("n", "channels"), [(1, 3), (7, 1), (40, 3)])
def test_the_sheet_shows_each_mistake_as_the_model_saw_it(tmp_path, n, channels):
    asked = []

    def image(index):
        asked.append(index)
        colour = torch.tensor([1.0, 0.0, 1.0]) if channels == 3 else torch.tensor([0.25])
        return colour.expand(16, 16, channels)

    some = found(["a $", "b_鳥"], [0] * (n + 2), [1] * n + [0] * 2)
    assert pictures.draw_mistakes(tmp_path / "m.png", some, image)
    assert asked == some.mistakes()[:24].tolist()
    drawn = pixels(tmp_path / "m.png")
    seen = (drawn == ((255, 0, 255) if channels == 3 else (64, 64, 64))).all(-1).sum()
    assert seen == pytest.approx(min(n, 24) * (2 * 120) ** 2, rel=0.05)  # 2 inches of 120 dots


def test_without_a_mistake_there_is_no_sheet(tmp_path):
    (tmp_path / "m.png").write_text("of an earlier run")
    assert not pictures.draw_mistakes(tmp_path / "m.png", found("ab", [0, 1], [0, 1]), None)
    assert not (tmp_path / "m.png").exists()


def test_predictions_are_those_of_the_model_in_order(images, tmp_path):
    from unilora_cli.data.image_sources import images_of_folder
    from unilora_cli.data.images import ImageSet, Part

    source = images_of_folder(images / "val")
    part = Part(source, [7, 2, 11, 0, 5])
    set_of = ImageSet(part, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    def logits(x):
        return 4 * x.mean((2, 3)) @ weight

    made = pictures.predict(logits, set_of, batch_size=2)
    assert made.classes == ("blue", "green", "red")
    for place, index in enumerate(part.indices):
        p = logits(set_of[place]["x"][None]).softmax(-1)[0]
        assert made.names[place] == str(source.images[index])
        assert made.labels[place] == source.labels[index]
        assert made.predicted[place] == p.argmax()
        assert made.probability[place] == pytest.approx(p.max().item())
        assert made.of_label[place] == pytest.approx(p[source.labels[index]].item(), abs=1e-6)


def test_a_run_leaves_them_and_says_so(unilora, vit_model, images):
    words = ("--data", images, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--out", "run")
    result = unilora("finetune", "vit", *vit_model, *words, "--head-rate", 1e-9, "--theta-rate", 1e-9)
    assert result.code == 0, result.err
    final = json.loads(Path("run/metrics.json").read_text())["final"]
    header, *table = rows("run/predictions.csv")
    accuracy = sum(row[1] == row[2] for row in table) / len(table)
    assert (len(table), accuracy) == (12, pytest.approx(final["accuracy"]))
    assert accuracy < 1
    counts = np.array([row[1:] for row in rows("run/confusion.csv")[1:]], int)
    assert counts.trace() / counts.sum() == pytest.approx(accuracy)
    assert "predictions.csv, confusion.csv, confusion.png, mistakes.png in run" in result.out
    for name in ("confusion", "mistakes", "loss"):
        assert Path(f"run/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    result = unilora("finetune", "vit", *vit_model, *words, "--epochs", 8, "--augment", "none", "--overwrite")
    assert json.loads(Path("run/metrics.json").read_text())["final"]["accuracy"] == 1
    assert "no mistake among 12 images, so there is no mistakes.png" in result.out
    assert not Path("run/mistakes.png").exists()
