"""Images for `unilora finetune vit`: where they come from, how they are parted and changed, and those that cannot be
used; and the models they are for."""

import gzip
import json
import re
import shutil
import struct
import tarfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
datasets = pytest.importorskip("datasets")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
models = pytest.importorskip("unilora_cli.tasks.models")
sources = pytest.importorskip("unilora_cli.data.image_sources")
CommandError = models.CommandError

pytestmark = pytest.mark.usefixtures("data_cache")
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (220, 30, 40)}
TINY = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}


@pytest.fixture
def vit(unilora, vit_model):
    """vit(*words): a run of one step."""
    words = (*vit_model, "--max-steps", 1, "--device", "cpu", "--out", "run")
    return lambda *more: unilora("finetune", "vit", *words, *more)


@pytest.fixture
def settings(parsed):
    """settings(*words): the arguments of `finetune vit`."""
    return lambda *words: parsed(
        "finetune", "vit", "--model", "m", *(() if "--data" in words else ("--data", "d")), *words
    )


@pytest.fixture
def load(settings):
    """load(*words): the images that the arguments name."""
    from unilora_cli.data.images import load_images

    return lambda *words: load_images(settings(*words))


@pytest.fixture
def folder(images, tmp_path):
    """A copy of the image folder, with test/ of 2 per class."""
    root = shutil.copytree(images, tmp_path / "data")
    for name in COLOURS:
        (root / "test" / name).mkdir(parents=True)
        for i in range(2):
            shutil.copy(root / "val" / name / f"{i}.png", root / "test" / name)
    return root


def sizes(found):
    parts = (found.train, found.held_out, found.test)
    return tuple(None if part is None else len(part.indices) for part in parts)


def metrics():
    return json.loads(Path("run/metrics.json").read_text())


# ---- parts ------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_folder(load, folder):
    assert sizes(load("--data", folder)) == (24, 12, 6)
    assert sizes(load("--data", folder, "--eval-split", "test")) == (24, 6, None)
    assert sizes(load("--data", folder, "--test-split", "val")) == (24, 6, 12)
    assert sizes(load("--data", folder / "train", "--holdout", 0.25, "--test-data", folder / "test")) == (18, 6, 6)
    assert sizes(load("--data", folder, "--train-split", "val", "--eval-split", "test")) == (12, 6, None)
    shutil.rmtree(folder / "val")
    assert sizes(load("--data", folder)) == (24, 6, None)
    assert sizes(load("--data", folder, "--test-split", "test")) == (22, 2, 6)
    for words in (("--eval-split", "val"), ("--test-data", folder / "none"), ("--test-split", "none")):
        with pytest.raises(CommandError, match="no such folder"):
            load("--data", folder, *words)
    with pytest.raises(CommandError, match="there is no folder 'train2' in it"):
        load("--data", folder, "--train-split", "train2")


def test_what_is_held_out_is_not_trained_on(load, folder):
    found = load("--data", folder / "train", "--limit", 9)
    assert sizes(found) == (9, 2, None)
    assert not set(found.train.indices) & set(found.held_out.indices)


def table(folder, split):
    files = sorted((folder / split).rglob("*.png"))
    rows = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(COLOURS))}
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def test_the_parts_of_a_data_set(load, folder, tmp_path):
    splits = datasets.DatasetDict({name: table(folder, name) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "disk")
    table(folder, "val").to_parquet(tmp_path / "other.parquet")
    data = ("--data", f"hfds/{tmp_path}/disk")  # as timm says it
    assert sizes(load(*data)) == (24, 6, None)
    assert sizes(load(*data, "--test-split", "test")) == (22, 2, 6)
    assert sizes(load(*data, "--test-data", tmp_path / "other.parquet")) == (24, 6, 12)
    with pytest.raises(CommandError, match="there is no split 'tset'; it has 'train', 'test'"):
        load(*data, "--test-split", "tset")
    with pytest.raises(CommandError, match=r"other.parquet: there are no splits in it, so none is 'test'"):
        load("--data", tmp_path / "other.parquet", "--test-split", "test")
    table(folder, "val").remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(CommandError, match=r"bare.parquet: there is no column 'label'; it has 'image'"):
        load(*data, "--test-data", tmp_path / "bare.parquet")


def test_a_folder_in_the_notation_of_timm(load, folder):
    """It is what the folder is by itself."""
    data = ("--data", "torch/image_folder", "--data-dir", folder)
    assert sizes(load(*data)) == (24, 12, 6)
    assert sizes(load(*data, "--eval-split", "val", "--test-split", "test")) == (24, 12, 6)
    assert sizes(load(*data, "--test-split", "val")) == (24, 6, 12)
    (folder / "train/red/3.png").rename(folder / "train/red/3.jfif")
    assert sizes(load(*data)) == (24, 12, 6)
    found = load(*data)
    assert found.classes == tuple(sorted(COLOURS))
    index = found.held_out.indices[-1]
    assert found.held_out.source.name(index) == str(folder / "val/red/3.png")
    assert found.held_out.source.open(index).getpixel((5, 5))[0] > 128
    assert sizes(load("--data", "torch/image_folder", "--data-dir", folder / "train")) == (22, 2, None)
    shutil.copytree(folder / "val/red", folder / "val/pink")
    with pytest.raises(CommandError, match=r"/val: the class 'pink' is not among the training classes"):
        load(*data)
    shutil.rmtree(folder / "val")
    assert sizes(load(*data)) == (24, 6, None)


def idx(path, array):
    """The file format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def mnist(root, images, labels, split):
    idx(root / f"MNIST/raw/{split}-images-idx3-ubyte", images)
    idx(root / f"MNIST/raw/{split}-labels-idx1-ubyte", labels)


def test_data_of_torchvision(vit, load, tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("t10k", 10)):
        mnist(tmp_path, rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8), split)
    data = ("--data", "torch/mnist", "--data-dir", tmp_path)
    assert sizes(load(*data, "--test-split", "test")) == (18, 2, 10)
    result = vit(*data, "--model-arg", "in_chans=1", "--mixup", 0.5)
    assert result.code == 0, result.err
    assert (metrics()["plan"]["train_examples"], metrics()["plan"]["held_out_examples"]) == (20, 10)
    assert metrics()["final"]["top-5"] >= metrics()["final"]["accuracy"]


def test_data_of_torchvision_that_cannot_be_used(load, folder, tmp_path):
    cases = [
        (("torch/cifar10",), "torch/cifar10 wants the folder that it is in, or goes to: --data-dir FOLDER"),
        (("torch/cifar10", "--data-dir", tmp_path), "cannot load torch/cifar10 from .*--download"),
        (("torch/nonsense", "--data-dir", tmp_path), "Unknown torchvision dataset nonsense"),
        (("torch/image_folder", "--data-dir", folder, "--eval-split", "dev"), "/dev: no such folder"),
        (("torch/mnist", "--data-dir", folder, "--eval-data", folder), "parted by --eval-split and --test-split"),
        (("tfds/mnist",), "data that come as a stream are not read; use hfds/NAME or torch/NAME"),
        ((folder, "--data-dir", folder), "--data-dir is for data of torchvision"),
        ((folder, "--download"), "--download is for data of torchvision"),
    ]
    for (data, *words), message in cases:
        with pytest.raises(CommandError, match=message):
            load("--data", data, *words)


def test_the_test_data_are_scored_with_the_adapter_that_is_kept(unilora, vit_model, parsed, base_of, folder):
    from unilora_cli.tasks import vit
    from unilora_cli.training import evaluating

    line = ("finetune", "vit", *vit_model, "--data", folder, "--keep", "best", "--epochs", 3, "--batch-size", 8)
    line += ("--head-rate", 0.5, "--device", "cpu", "--out", "run")
    result = unilora(*line)
    assert result.code == 0, result.err
    assert "test              6 examples, scored once at the end" in result.out
    assert "test accuracy" in result.out
    task = vit.task(parsed(*line))
    base = base_of("run/adapter.safetensors")
    task.model, _ = models.build(base)
    models.load_adapter(base, task.model, "run/adapter.safetensors")
    task.held_out = task.test
    for name, value in evaluating.evaluate(task).items():
        assert value == pytest.approx(metrics()["test"][name], rel=1e-5)


# ---- images -----------------------------------------------------------------------------------------------------


def painted(mode):
    """4 × 4 pixels of (200, 100, 50), or of the grey 200, in a mode of Pillow."""
    rgb = Image.new("RGB", (4, 4), (200, 100, 50))
    if mode == "P with transparency":
        image = rgb.quantize(8)
        image.info["transparency"] = bytes([255] * 8)
        return image
    if mode == "I;16":
        return Image.fromarray(np.full((4, 4), 200 * 257, np.uint16))
    return (Image.new("L", (4, 4), 200) if mode in ("L", "LA") else rgb).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "P with transparency", "CMYK", "I;16"])
def test_images_of_every_mode_come_out_as_rgb(tmp_path, mode):
    (tmp_path / "a").mkdir()
    image = painted(mode)
    image.save(tmp_path / "a/x.tiff" if mode == "CMYK" else tmp_path / "a/x.png")
    pixel = sources.images_of_folder(tmp_path).open(0).convert("RGB").getpixel((0, 0))
    assert pixel == pytest.approx((200,) * 3 if mode in ("L", "LA", "I;16") else (200, 100, 50), abs=5)


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, ending):
    """Pillow opens a PGM, and before its version 11 a PNG, in the mode of 32 bits."""
    (tmp_path / "a").mkdir()
    pixels, path = np.full((4, 4), 200 * 257, np.uint16), tmp_path / f"a/x.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 4 4 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    assert sources.images_of_folder(tmp_path).open(0).convert("RGB").getpixel((0, 0)) == (200,) * 3


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in COLOURS.values()]
    (tmp_path / "a").mkdir()
    frames[0].save(tmp_path / "a/x.gif", save_all=True, append_images=frames[1:])
    assert sources.images_of_folder(tmp_path).open(0).convert("RGB").getpixel((0, 0)) == pytest.approx(
        COLOURS["blue"], abs=2
    )


def test_a_photo_is_turned_upright(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: to be turned by 90 degrees
    lying = Image.new("L", (6, 4), 0)
    lying.paste(255, (0, 0, 3, 4))  # the left is white, which is the top
    lying.save(tmp_path / "a/x.png", exif=exif)
    image = sources.images_of_folder(tmp_path).open(0)
    assert image.size == (4, 6)
    assert (image.getpixel((0, 0)), image.getpixel((0, 5))) == (255, 0)


def test_folders_in_folders_and_links(tmp_path):
    for name in ("one/a/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        painted("RGB").save(tmp_path / name / "x.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one").symlink_to(tmp_path / "one")
    (tmp_path / "one/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "one/a/round").symlink_to(tmp_path / "one")
    (tmp_path / "one/.hidden.png").write_bytes(b"")
    found = sources.images_of_folder(tmp_path / "data")
    assert [str(path.relative_to(tmp_path / "data")) for path in found.images] == ["one/a/b/x.png", "one/linked/x.png"]


# ---- bad images -------------------------------------------------------------------------------------------------


def spoil(folder):
    """Three images that do not decode, and the names of their files."""
    names = [folder / f"train/red/{i}.png" for i in (1, 2)] + [folder / "val/blue/0.png"]
    names[0].write_bytes(b"")
    names[1].unlink()
    names[1].symlink_to("nowhere.png")
    names[2].write_bytes(names[2].read_bytes()[:200])
    return [str(name) for name in names]


def test_bad_images_are_left_out_if_asked(vit, folder):
    bad = spoil(folder)
    for workers in (0, 2):
        result = vit("--data", folder, "--bad-images", "skip", "--workers", workers, "--overwrite")
        assert result.code == 0, result.err
        assert "skipped           3 images that do not decode, named in metrics.json" in result.out
        assert (metrics()["plan"]["train_examples"], metrics()["plan"]["held_out_examples"]) == (22, 11)
        assert [row["file"] for row in metrics()["skipped_images"]] == bad
        assert all(row["why"] for row in metrics()["skipped_images"])
    result = vit("--data", folder, "--max-steps", 9, "--overwrite")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"{bad[0]}: cannot be decoded as an image (" in result.err or f"{bad[1]}: cannot" in result.err


def test_a_bad_image_to_test_on_is_found_before_training(vit, folder):
    (folder / "test/red/1.png").write_bytes(b"no image")
    result = vit("--data", folder)
    assert result.code == 1
    assert f"error: {folder}/test/red/1.png: cannot be decoded as an image (no image format" in result.err
    assert not Path("run").exists()


def test_too_many_bad_images(load, folder):
    spoil(folder)
    for path in (folder / "train/red").iterdir():
        path.unlink()
        path.write_bytes(b"no image")
    with pytest.raises(CommandError, match="no image of the class 'red' can be decoded"):
        load("--data", folder, "--bad-images", "skip")
    shutil.copytree(folder / "val/red", folder / "train/red", dirs_exist_ok=True)
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(CommandError, match=r"data/test/blue/0.png: none of the images beside it can be decoded either"):
        load("--data", folder, "--bad-images", "skip")


def test_images_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/x.tiff"
    for dtype, said in ((np.float32, "floating-point numbers"), (np.int32, "signed or 32-bit integers")):
        Image.fromarray(np.full((4, 4), 200, dtype)).save(path)
        match = rf"x.tiff: cannot be decoded as an image \(its pixels are {said}, of which none is known to be white"
        with pytest.raises(CommandError, match=match):
            sources.images_of_folder(tmp_path).open(0)
    painted("RGB").resize((40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CommandError, match=r"x.tiff: cannot be decoded as an image \(.*decompression bomb"):
        sources.images_of_folder(tmp_path).open(0)


def test_classes_that_cannot_be_used(load, folder, tmp_path):
    (folder / "val/red").rename(folder / "val/Red")
    with pytest.raises(CommandError, match=r"val: the class 'Red' is not among the training classes \(is it 'red'\?\)"):
        load("--data", folder)
    for split in ("train", "val", "test"):
        for name in ("green", "Red" if split == "val" else "red"):
            shutil.rmtree(folder / split / name)
    with pytest.raises(CommandError, match="there is one class only, 'blue'; nothing can be learnt"):
        load("--data", folder)


# ---- what is an image, a class and a part -----------------------------------------------------------------------


def fill(root, *names, count=3):
    """Folders of images that all differ."""
    rng = np.random.default_rng([len(path) for path in (str(root), *names)])
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


ENDINGS = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".JPG": "JPEG",
    ".tga": "TGA",
    ".jp2": "JPEG2000",
    ".ico": "ICO",
    ".mpo": "MPO",
}
ENDINGS |= {"": "TIFF", ".bin": "WEBP", ".photo": "PNG", ".avif": "AVIF"}


def test_pillow_says_what_is_an_image(load, tmp_path):
    from PIL import features

    root = fill(tmp_path / "d", "a", "b")
    for ending, kind in ENDINGS.items():
        if kind in ("AVIF", "JPEG2000") and not features.check({"JPEG2000": "jpg_2000"}.get(kind, "avif")):
            continue
        Image.new("RGB", (16, 16)).save(root / f"a/x{ending}", kind)
    found = load("--data", root)
    assert sum(map(len, (found.train.indices, found.held_out.indices))) == len(list(root.glob("*/*")))
    assert not [note for note in found.notes if note[0] == "left out"]
    for i in range(len(found.train.source.labels)):
        found.train.source.open(i)


def test_files_that_are_no_images_are_named(load, vit, tmp_path):
    root = fill(tmp_path / "d", "a", "b", "__MACOSX", ".hidden")
    (root / "a/box.xml").write_text("<box/>")
    (root / "a/phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    (root / "a/film.mpg").write_bytes(b"\0\0\1\xb3" + bytes(90))
    (root / "b/README").write_text("a text")
    (root / "b/gone").symlink_to("nowhere")
    shutil.copy(root / "a/0.png", root / "beside.png")
    for name in (".DS_Store", "a/Thumbs.db", "a/.x.png", "b/desktop.ini"):
        (root / name).write_bytes(b"junk")
    found = load("--data", root)
    assert dict(found.notes)["left out"] == (
        f"6 files (.heic, .mpg, .png, .xml, no ending): no images to Pillow, or in no class folder, such as "
        f"{root}/beside.png"
    )
    result = vit("--data", root)
    assert result.code == 0, result.err
    assert re.search(r"^  left out +6 files \(.heic,", result.out, re.MULTILINE)
    for path in (root / "b").glob("*.png"):
        path.unlink()
    with pytest.raises(
        CommandError, match=r"/b: no image in this class folder that Pillow reads, but 2 files \(no end"
    ):
        load("--data", root)


def test_a_class_called_train(load, tmp_path):
    found = load("--data", fill(tmp_path / "flat", "bus", "car", "train", "test"))
    assert found.classes == ("bus", "car", "test", "train")
    (tmp_path / "flat/boxes.csv").write_text("x")
    assert load("--data", tmp_path / "flat").classes == found.classes
    nested = fill(tmp_path / "nested", "bus/a", "car/a", "train/steam", "train/electric")
    with pytest.raises(
        CommandError, match=r"'train' may be a part of the data or a class: .* 'bus', 'car' with images"
    ):
        load("--data", nested)
    assert load("--data", nested / "train").classes == ("electric", "steam")
    fill(nested, "val/steam")
    found = load("--data", nested, "--eval-split", "val")
    assert (found.classes, dict(found.notes)["left out"]) == (("electric", "steam"), "the folders 'bus', 'car'")


def test_parts_of_other_names(load, tmp_path):
    root = fill(tmp_path / "d", "Training/a", "Training/b", "Testing/a", "Testing/b")
    with pytest.raises(CommandError, match=r"no folder 'train' in it; it has 'Testing', 'Training': name the parts by"):
        load("--data", root)
    assert sizes(load("--data", root, "--train-split", "Training", "--eval-split", "Testing")) == (6, 6, None)
    root = fill(tmp_path / "more", "train/a", "train/b", "valid/a", "valid/b", "dev/a")
    assert dict(load("--data", root).notes)["left out"] == "the folders 'dev'"
    root = fill(tmp_path / "unlabelled", "train/a", "train/b", "unlabelled")
    with pytest.raises(CommandError, match=r"beside it 'unlabelled' with images too"):
        load("--data", root)
    (tmp_path / "empty/logs").mkdir(parents=True)
    assert sizes(load("--data", fill(tmp_path / "empty", "train/a", "train/b", "val/a"))) == (6, 3, None)
    with pytest.raises(CommandError, match=r"/train: expected a folder of images for each class"):
        load("--data", fill(tmp_path / "no classes", "train", "val"))


def test_two_spellings_of_a_class_are_one(load, tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    found = load("--data", fill(tmp_path / "d", composed, apart, "the"))
    assert (found.classes, sum(sizes(found)[:2])) == ((composed, "the"), 9)
    found = load("--data", fill(tmp_path / "e", f"train/{apart}", "train/the", f"val/{composed}"))
    assert (found.classes, set(found.held_out.source.labels)) == ((composed, "the"), {0})


def test_classes_that_differ_or_lack_something_are_named(load, tmp_path):
    notes = load("--data", fill(tmp_path / "d", "train/Cat", "train/cat", "val/Cat")).notes
    assert ("classes apart", "by capitals alone: 'Cat', 'cat'") in notes
    assert ("classes without", "1, nothing held out: 'cat'") in notes
    notes = load("--data", fill(tmp_path / "e", "a", "b", "c"), "--limit", 2).notes
    assert [value for _, value in notes if "nothing to train on" in value]


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_one_image_is_trained_on(load, tmp_path, seed):
    root = fill(tmp_path / "d", "a", "b", count=9)
    fill(root, "c", count=1)
    found = load("--data", root, "--holdout", 0.9, "--seed", seed)
    assert {found.train.source.labels[i] for i in found.train.indices} == {0, 1, 2}
    with pytest.raises(CommandError, match="are the only examples of their classes"):
        load("--data", fill(tmp_path / "e", "a", "b", "c", count=1))


def test_images_that_are_held_out_and_trained_on_are_counted(load, tmp_path):
    root = fill(tmp_path / "d", "train/a", "train/b", "val/a", "val/b")
    assert load("--data", root).notes == ()
    shutil.copy(root / "train/a/0.png", root / "val/b/copy.png")
    assert load("--data", root).notes == (("seen in training", "1 of the 7 held out"),)


@pytest.mark.parametrize("name", ["round", "a/round"])
def test_a_link_to_a_folder_above_is_refused(load, tmp_path, name):
    """It would put every image into one class."""
    root = fill(tmp_path / "d", "a", "b")
    (root / name).symlink_to(root)
    with pytest.raises(CommandError, match=f"{name}: this link leads to a folder that it stands in"):
        load("--data", root)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    import os

    root, scandir = fill(tmp_path / "d", "a/inner", "b"), os.scandir

    def denied(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(CommandError, match=r"a/inner: this folder cannot be read \(Permission denied\)"):
        sources.images_of_folder(root)


def test_tables_without_a_label_or_an_image(load, tmp_path):
    image = {"bytes": b"", "path": "x"}
    kinds = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    rows = [{"image": image, "label": label} for label in ("caf\u00e9", "cafe\u0301", "the", "the")]

    def write(**changes):
        changed = [*rows[:2], rows[2] | changes, *rows[3:]]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        table = datasets.Dataset.from_list(changed, kinds).cast_column("image", datasets.Image())
        table.to_parquet(path)
        return path

    assert load("--data", write()).classes == ("caf\u00e9", "the")
    with pytest.raises(CommandError, match=r"record 3: the label is missing; expected a word or an integer"):
        load("--data", write(label=None))
    found = load("--data", write(image=None), "--eval-data", write())
    with pytest.raises(CommandError, match=r"image 2: there is none in this record"):
        found.train.source.open(2)


# ---- augmentation -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **TINY)


@pytest.fixture
def transforms(settings, tiny):
    """transforms(*words): those that the arguments ask for."""
    from unilora_cli.tasks.augmentation import transforms as made

    return lambda *words: made(tiny, settings("--model-arg", "img_size=32", *words))


def test_options_reach_the_transforms_of_timm(transforms):
    def trained(*words):
        return str(transforms(*words).training)

    plain = trained()
    assert "RandomResizedCrop" in plain
    assert "scale=(0.6, 1.0)" in plain
    assert "RandomHorizontalFlip(p=0.5)" in plain
    for absent in ("brightness=(", "RandAugment", "RandomErasing", "Vertical"):
        assert absent not in plain
    many = trained("--augment", "timm", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.25, "--scale", "0.3,0.9")
    for present in ("RandAugment(n=2", "RandomErasing(p=0.25, mode=pixel", "scale=(0.3, 0.9)"):
        assert present in many
    assert "ColorJitter(brightness=(0.6, 1.4)" in trained("--augment", "timm")
    assert "ColorJitter(brightness=(0.9, 1.1)" in trained("--color-jitter", 0.1)
    assert "RandomVerticalFlip(p=0.2)" in trained("--vflip", 0.2)
    assert "Horizontal" not in trained("--hflip", 0)
    read = str(transforms("--crop-pct", 1.0, "--interpolation", "bilinear", "--aa", "rand-m9").reading)
    assert "Resize(size=32, interpolation=bilinear" in read
    assert "Rand" not in read
    assert transforms("--augment", "none").training is not None


def test_options_without_an_effect_are_refused(transforms):
    cases = [
        (("--augment", "none", "--aa", "rand-m9"), "--aa has no effect with --augment none"),
        (("--augment", "none", "--color-jitter", 0), "--color-jitter has no effect with --augment none"),
        (("--aa", "rand-m9", "--color-jitter", 0.4), "--color-jitter has no effect beside --aa"),
        (("--aa", "nonsense"), r"cannot make the transforms for training \(--aa"),
    ]
    for words, message in cases:
        with pytest.raises(CommandError, match=message):
            transforms(*words)


def test_an_image_is_shown_as_it_was(transforms):
    made = transforms()
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    shown = made.shown(made.reading(image))
    assert shown.shape == (32, 32, 3)
    torch.testing.assert_close(shown, torch.tensor([200, 100, 50]).expand(32, 32, 3) / 255, atol=1e-5, rtol=0)


def batch_of(n):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.rand(3, 8, 8, generator=generator), "labels": i % 3} for i in range(n)]


@pytest.mark.parametrize("n", [1, 4, 5])
def test_images_are_mixed_in_pairs_with_their_labels(settings, n):
    from unilora_cli.tasks.augmentation import mixing

    examples, smoothing = batch_of(n), 0.1
    np.random.seed(7)
    batch = mixing(3, settings("--mixup", 0.8, "--smoothing", smoothing))(examples)
    np.random.seed(7)
    np.random.rand()
    part = np.random.beta(0.8, 0.8) if n > 1 else 1.0
    truth = torch.eye(3)[[e["labels"] for e in examples]] * (1 - smoothing) + smoothing / 3
    even = n // 2 * 2
    for i in range(n):
        other = even - 1 - i if i < even else i
        x = part * examples[i]["x"] + (1 - part) * examples[other]["x"]
        torch.testing.assert_close(batch["x"][i], x)
        torch.testing.assert_close(batch["labels"][i], part * truth[i] + (1 - part) * truth[other])


def test_cutmix_gives_each_image_a_piece_of_another(settings):
    from unilora_cli.tasks.augmentation import mixing

    examples = batch_of(6)
    np.random.seed(3)
    batch = mixing(3, settings("--cutmix", 1.0))(examples)
    for i in range(6):
        own = (batch["x"][i] == examples[i]["x"]).float().mean()
        assert 0 < own < 1
        assert ((batch["x"][i] == examples[i]["x"]) | (batch["x"][i] == examples[5 - i]["x"])).all()
        truth = torch.eye(3)[[examples[i]["labels"], examples[5 - i]["labels"]]]
        torch.testing.assert_close(batch["labels"][i], own * truth[0] + (1 - own) * truth[1])
    assert mixing(3, settings()) is None


def test_the_loss_of_mixed_labels_and_of_plain_ones(settings, tiny):
    from unilora_cli.tasks.augmentation import mixing
    from unilora_cli.tasks.vit import score

    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    tiny.eval()
    logits = tiny(x)
    smooth = mixing(3, settings("--smoothing", 0.2))([{"x": x[i], "labels": int(labels[i])} for i in range(4)])
    scores = score(tiny, smooth)
    naive = -(smooth["labels"] * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(scores.loss, naive)
    torch.testing.assert_close(naive, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2))
    plain = score(tiny, {"x": x, "labels": labels})
    torch.testing.assert_close(plain.loss, -logits.log_softmax(-1)[range(4), labels].mean())
    assert torch.equal(plain.predicted, logits.argsort(-1, descending=True))


def test_the_seed_fixes_a_run_with_all_of_it(vit, folder):
    words = ("--mixup", 0.8, "--cutmix", 1, "--smoothing", 0.1, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.25)
    words += ("--drop-path", 0.2, "--batch-size", 5, "--max-steps", 4, "--limit", 13, "--data", folder)
    for out in ("one", "two"):
        result = vit(*words, "--out", out)
        assert result.code == 0, result.err
    assert Path("one/metrics.csv").read_text() == Path("two/metrics.csv").read_text()
    assert json.loads(Path("one/metrics.json").read_text())["plan"]["steps"] == 4


# ---- models -----------------------------------------------------------------------------------------------------


def base(checkpoint, labels=("a", "b"), name="vit_tiny_patch16_224", **arguments):
    return models.Base("vit", name, labels=labels, arguments=TINY | arguments, checkpoint=str(checkpoint))


@pytest.mark.parametrize("kind", ["safetensors", "plain", "train.py", "compiled"])
def test_a_checkpoint_with_another_head(tmp_path, tiny, kind):
    import safetensors.torch

    state, path = tiny.state_dict(), tmp_path / "x.pth"
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(state, path)
    elif kind == "plain":
        torch.save(state, path)
    elif kind == "train.py":  # timm's own script keeps the averaged weights beside the last ones
        last = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        torch.save({"epoch": 3, "arch": "vit", "state_dict": last, "state_dict_ema": state}, path)
    else:
        torch.save({"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}}, path)
    model, _ = models.build(base(path))
    assert model.head.weight.shape == (2, 24)
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, state[name]), name
    model, _ = models.build(base(path, labels=("a", "b", "c")))
    assert torch.equal(model.head.weight, state["head.weight"])


def test_a_checkpoint_of_another_size_is_resized_by_timm(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "x.pth")
    model, _ = models.build(base(tmp_path / "x.pth", img_size=48))
    assert model.pos_embed.shape == (1, 10, 24)
    assert torch.equal(model.blocks[0].attn.qkv.weight, tiny.blocks[0].attn.qkv.weight)


def test_checkpoints_that_cannot_be_used(tmp_path, tiny):
    path = tmp_path / "x.pth"
    torch.save(tiny.state_dict(), path)
    with pytest.raises(
        CommandError, match=r"x.pth: 12 of the 32 weights of 'vit_tiny_patch16_224' are not in it, such"
    ):
        models.build(base(path, depth=2))
    with pytest.raises(CommandError, match=r"cannot build the model 'vit_tiny_patch16_224'.*size mismatch"):
        models.build(base(path, embed_dim=48))
    with pytest.raises(CommandError, match=r"are not in it, such as .* is it a checkpoint of this model"):
        models.build(models.Base("vit", "resnet10t", labels=("a", "b"), checkpoint=str(path)))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CommandError, match="cannot build the model"):
        models.build(base(path))


def test_a_folder_that_holds_a_model(tmp_path, tiny):
    timm.models.save_for_hf(tiny, tmp_path / "saved", model_args=TINY)
    for name in (str(tmp_path / "saved"), f"local-dir:{tmp_path}/saved"):
        model, _ = models.build(models.Base("vit", name, labels=("a", "b")))
        assert torch.equal(model.blocks[0].attn.qkv.weight, tiny.blocks[0].attn.qkv.weight)
        assert model.num_classes == 2


def test_drop_path_reaches_the_model(settings):
    from unilora_cli.tasks.vit import _model_options

    options = _model_options(settings("--drop-path", 0.3, "--drop", 0.1, "--model-arg", "img_size=32"))
    assert options == {"img_size": 32, "drop_path_rate": 0.3, "drop_rate": 0.1}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, **options)
    assert (model.blocks[1].drop_path1.drop_prob, model.head_drop.p) == pytest.approx((0.3, 0.1))
    assert _model_options(settings()) == {}


# ---- real images ------------------------------------------------------------------------------------------------


def learns(unilora, vit_model, *words):
    """Two epochs of a tiny model; the record of each."""
    line = ("finetune", "vit", *vit_model, *words, "--epochs", 2, "--batch-size", 16, "--device", "cpu", "--out", "run")
    result = unilora(*line)
    assert result.code == 0, result.err
    return metrics()["epochs"]


def test_cifar_10(unilora, vit_model, data, tmp_path):
    wanted, per_class = ("airplane", "automobile", "bird"), 40
    with tarfile.open(data / "cifar10_a/cifar10_a.tar.xz", "r|xz") as archive:
        for member in archive:
            _, name, file = Path(member.name).parts
            if name not in wanted:
                break
            if int(Path(file).stem) < per_class:
                (tmp_path / "cifar" / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "cifar" / name / file).write_bytes(archive.extractfile(member).read())
    first, last = learns(unilora, vit_model, "--data", tmp_path / "cifar", "--augment", "none", "--holdout", 0.2)
    assert metrics()["plan"]["train_examples"] == 96
    assert last["train_loss"] < first["train_loss"]
    assert len(Path("run/predictions.csv").read_text().splitlines()) == 25


def test_mnist(unilora, vit_model, data, tmp_path):
    folder = data / "mnist_t10k"
    with (
        gzip.open(folder / "t10k-images-idx3-ubyte.gz") as images,
        gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as labels,
    ):
        pixels = np.frombuffer(images.read(16 + 240 * 784)[16:], np.uint8).reshape(-1, 28, 28)
        truth = np.frombuffer(labels.read(8 + 240)[8:], np.uint8)
    mnist(tmp_path, pixels[:160], truth[:160], "train")
    mnist(tmp_path, pixels[160:], truth[160:], "t10k")
    words = ("--data", "torch/mnist", "--data-dir", tmp_path, "--model-arg", "in_chans=1", "--augment", "none")
    first, last = learns(unilora, vit_model, *words)
    assert (metrics()["plan"]["train_examples"], metrics()["plan"]["held_out_examples"]) == (160, 80)
    assert last["train_loss"] < first["train_loss"]
    assert last["top-5"] > last["accuracy"]
