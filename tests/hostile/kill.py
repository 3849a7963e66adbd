"""Writers that are killed, that meet, and that find no room: `nox -s kill`; `nox -s kill -- --kills 500`.

Each writer saves one generation after the other in a process of its own until it is killed at a random moment. A reader
must then see the last generation that was saved or the next one, whole; and after the next save nothing of the dead
writer is left. Then several write at once under a reader, the disk is full, the place is a link, has a long name, or
cannot be written.
"""

import argparse
import contextlib
import errno
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}

import numpy as np

FILE, CONFIG, WEIGHTS = "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"


class Torn(Exception):
    """What a reader sees is neither the old nor the new."""


# ---- the writers ----------------------------------------------------------------------------------------------------


class Writer:
    """One way to write; generation i is told by the values.

    Attributes:
        inside: the names that may be in the place, where it is a folder.
        numbered: whether generations can be told apart.
        renews: whether a save takes the place of an older one; `merge_checkpoint` refuses to.
    """

    name = ""
    inside: frozenset[str] | None = None
    numbered = renews = True

    def __init__(self, scratch: Path):
        self.scratch, self.home = scratch, scratch / self.name.replace(" ", "-")
        self.home.mkdir()
        self.place = self.home / (FILE if self.inside is None else "folder")

    def prepare(self) -> None:
        """Models and files, made once before the first save."""

    def write(self, place: Path, i: int) -> None:
        raise NotImplementedError

    def read(self, place: Path) -> int | None:
        """The generation there; None for nothing.

        Raises:
            Torn: two of them, or half of one.
        """
        raise NotImplementedError

    def read_openly(self, place: Path) -> None:
        """As a user of the project reads while others write; the same exceptions."""
        self.read(place)

    def leftovers(self) -> list[Path]:
        """What lies in the home folder beside what was asked for."""
        found = [path for path in self.home.iterdir() if path != self.place]
        if self.inside is not None and self.place.is_dir():
            found += [path for path in self.place.iterdir() if path.name not in self.inside]
        return found

    def clean(self) -> None:
        """Take away what was left, once it has been counted."""
        for path in self.leftovers():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def generation(values: np.ndarray) -> int:
    """Of an array that holds one number everywhere."""
    if values.size == 0 or not (values == values.flat[0]).all():
        raise Torn("values of two generations in one tensor")
    return round(float(values.flat[0]))


def of_adapter(path: Path) -> int | None:
    from unilora_core import UniLoraError, read_adapter

    try:
        return generation(read_adapter(path).theta_d)
    except FileNotFoundError:
        return None
    except UniLoraError as error:
        raise Torn(f"{path.name}: {error}") from error


def of_folder(place: Path, tensor: str) -> tuple[dict[str, Any], np.ndarray] | None:
    """The config and one tensor of a folder, as PEFT finds them; None where there is no config, and so no adapter."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((place / CONFIG).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Torn(f"{CONFIG}: {error}") from error
    try:
        with safe_open(place / WEIGHTS, framework="numpy") as file:
            return config, file.get_tensor(tensor)
    except (SafetensorError, FileNotFoundError) as error:
        raise Torn(f"{WEIGHTS}: {error}") from error


class Torch(Writer):
    """A model with an adapter whose θ_d is the generation's number everywhere."""

    options: dict[str, Any] = {"targets": "all-linear", "start": "paper"}  # noqa: RUF012

    def prepare(self) -> None:
        import torch

        import unilora_torch

        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 100))
        self.adapter = unilora_torch.attach(self.model, rank=64, d=60_000, **self.options)

    def fill(self, i: int) -> None:
        import torch

        with torch.no_grad():
            self.adapter.theta_d.fill_(i)


class Save(Torch):
    name = "Adapter.save"

    def write(self, place: Path, i: int) -> None:
        self.fill(i)
        self.adapter.save(place)

    def read(self, place: Path) -> int | None:
        return of_adapter(place)


class ExportLora(Torch):
    """The config says the generation in ``base_model``; while others read, in the rank."""

    name = "export_lora"
    inside = frozenset({CONFIG, WEIGHTS})
    FIRST = "base_model.model.0.lora_A.weight"

    def write(self, place: Path, i: int) -> None:
        self.fill(i)
        self.adapter.export_lora(place, base_model=f"base-{i}", rank=64 + i % 64)

    def read(self, place: Path) -> int | None:
        if (found := of_folder(place, self.FIRST)) is None:
            return None
        config, A = found
        i = int(config["base_model_name_or_path"].removeprefix("base-"))
        unit = np.unique(A[:64])
        if not len(A) == config["r"] == 64 + i % 64 or not (i == 0 or self._near(unit, i)):
            raise Torn(f"the config is of generation {i}, the tensors are not")
        return i

    def _near(self, values: np.ndarray, i: int) -> bool:
        """P's scale differs by group: n_j and n_j + 1 positions; their values are i/√n_j."""
        counts = (i / values) ** 2
        return bool(np.ptp(counts) < 1.5 and (counts < 4).all())

    def read_openly(self, place: Path) -> None:
        from unilora_core.engines import read_lora

        lora = read_lora(place)
        if set(lora.ranks.values()) != {lora.config["r"]}:
            raise Torn("mixed")


class SavePeft(Torch):
    name = "save_peft"
    inside = frozenset({CONFIG, WEIGHTS})

    def prepare(self) -> None:
        import torch
        import transformers

        import unilora_transformers

        torch.manual_seed(0)
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 99,
        }
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        self.adapter = unilora_transformers.attach(
            self.model, "all-linear", rank=32, d=20_000, grouping="numpy-shuffle", start="paper"
        )
        self.fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    def write(self, place: Path, i: int) -> None:
        import unilora_transformers

        self.fill(i)
        self.model.name_or_path = f"base-{i}"
        unilora_transformers.save_peft(self.adapter, place)

    def read(self, place: Path) -> int | None:
        if (found := of_folder(place, "base_model.unilora_theta_d")) is None:
            return None
        i = int(found[0]["base_model_name_or_path"].removeprefix("base-"))
        if generation(found[1]) != i:
            raise Torn(f"the config is of generation {i}, θ_d of {generation(found[1])}")
        return i

    def read_openly(self, place: Path) -> None:
        import unilora_transformers

        unilora_transformers.load_peft(self.fresh, place).detach()


class SavePretrained(SavePeft):
    """A trainer's checkpoint: θ_d is in two files, which must be of one step."""

    name = "save_pretrained"
    inside = frozenset({FILE, "model.safetensors", "README.md"})

    def write(self, place: Path, i: int) -> None:
        self.fill(i)
        self.model.name_or_path = "base"
        self.model.save_pretrained(place, is_main_process=True)

    def read(self, place: Path) -> int | None:
        from safetensors import SafetensorError, safe_open

        i = of_adapter(place / FILE)
        try:
            with safe_open(place / "model.safetensors", framework="numpy") as file:
                other: int | None = generation(file.get_tensor("unilora.theta_d"))
        except FileNotFoundError:
            other = None
        except SafetensorError as error:
            raise Torn(f"model.safetensors: {error}") from error
        if i is not None and other is not None and i != other:
            raise Torn(f"{FILE} is of generation {i}, model.safetensors of {other}")
        if (place / "README.md").exists() and not (place / "README.md").read_text().endswith("```\n"):
            raise Torn("half a README.md")
        return None if None in (i, other) else i

    def read_openly(self, place: Path) -> None:
        of_adapter(place / FILE)


class Merge(Torch):
    """Each merge takes the place of a folder that was moved away."""

    name = "merge_checkpoint"
    inside = frozenset({"config.json", "model.safetensors", "generation_config.json"})
    numbered = renews = False

    def prepare(self) -> None:
        import transformers

        import unilora_transformers

        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**sizes, vocab_size=2000, tie_word_embeddings=True)
        self.base, self.file = self.scratch / "base", self.scratch / "merge.safetensors"
        transformers.LlamaForCausalLM(config).save_pretrained(self.base)
        model = transformers.LlamaForCausalLM.from_pretrained(self.base)
        unilora_transformers.attach(model, start="paper").save(self.file, {"base_model": "base"})
        self.size = (self.base / "model.safetensors").stat().st_size

    def write(self, place: Path, i: int) -> None:
        import unilora_transformers

        if place.exists():
            gone = Path(tempfile.mkdtemp(dir=self.scratch)) / "gone"
            os.rename(place, gone)
            shutil.rmtree(gone.parent)
        unilora_transformers.merge_checkpoint(self.file, self.base, place)

    def read(self, place: Path) -> int | None:
        if not place.exists():
            return None
        whole = (place / "model.safetensors").is_file() and (place / "model.safetensors").stat().st_size >= self.size
        try:
            json.loads((place / "config.json").read_text())
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise Torn("half a merged checkpoint")
        return 0


class JaxSave(Writer):
    name = "jax save"

    def prepare(self) -> None:
        import jax.numpy as jnp

        import unilora_jax

        params = {"a": {"kernel": jnp.ones((400, 400))}, "b": {"kernel": jnp.ones((400, 100))}}
        self.adapter = unilora_jax.plan(params, ".*/kernel", rank=64, d=60_000, start="paper")
        self.ones = np.ones(60_000, np.float32)

    def write(self, place: Path, i: int) -> None:
        self.adapter.save(place, self.ones * np.float32(i))

    def read(self, place: Path) -> int | None:
        return of_adapter(place)


class JaxExport(JaxSave):
    name = "jax export_lora"
    inside = frozenset({CONFIG, WEIGHTS})

    def write(self, place: Path, i: int) -> None:
        self.adapter.export_lora(place, self.ones * np.float32(i), base_model=f"base-{i}")

    def read(self, place: Path) -> int | None:
        if (found := of_folder(place, "base_model.model.a.lora_A.weight")) is None:
            return None
        i = int(found[0]["base_model_name_or_path"].removeprefix("base-"))
        counts = (i / found[1]) ** 2 if i else np.ones(1)
        if np.ptp(counts) > 1.5 or (counts > 4).any():
            raise Torn(f"the config is of generation {i}, the tensors are not")
        return i


class Run(Writer):
    """The outputs of `unilora finetune`, killed while it trains; the next run in the folder begins anew."""

    name = "unilora finetune"
    numbered = False
    inside = frozenset({FILE, "metrics.csv", "metrics.json", "summary.csv", "loss.png", "unilora-training"})

    def prepare(self) -> None:
        import tokenizers
        import torch
        import transformers

        torch.manual_seed(0)
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"])}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        self.base, self.data = self.scratch / "bert", self.scratch / "train.tsv"
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(self.base)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(**sizes, vocab_size=len(words), max_position_embeddings=32)
        transformers.BertForMaskedLM(config).save_pretrained(self.base)
        rows = [f"film {word}\t{word}" for word in ("good", "bad")] * 20
        self.data.write_text("\n".join(["sentence\tlabel", *rows, ""]))
        import datasets

        datasets.config.HF_DATASETS_CACHE = self.scratch / "cache"
        datasets.disable_progress_bars()
        self.write(self.scratch / "warm", 0)  # imports, and the cache of the data

    def train(self, place: Path, epochs: int) -> None:
        from unilora_cli.main import main

        line = ["finetune", "text", "--model", self.base, "--data", self.data, "--batch-size", 8, "--device", "cpu"]
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            code = main([str(word) for word in [*line, "--epochs", epochs, "--out", place, "--overwrite"]])
        if code:
            raise RuntimeError(f"unilora finetune: exit code {code}")

    def write(self, place: Path, i: int) -> None:
        self.train(place, 2)

    def read(self, place: Path) -> int | None:
        import torch

        from unilora_core import UniLoraError, read_adapter

        def adapter() -> None:
            read_adapter(place / FILE)

        def checkpoints() -> None:
            for said in (place / "unilora-training").glob(
                "checkpoint-*/run.json"
            ):  # the others are halves, and passed over
                for name in json.loads(said.read_text())["files"]:
                    if name.endswith((".pt", ".pth")):
                        torch.load(said.with_name(name), weights_only=False)

        checks: dict[str, Callable[[], Any]] = {
            FILE: adapter,
            "metrics.json": lambda: json.loads((place / "metrics.json").read_text()),
            "unilora-training": checkpoints,
            "metrics.csv": lambda: _whole_csv(place / "metrics.csv"),
            "summary.csv": lambda: _whole_csv(place / "summary.csv"),
            "loss.png": lambda: _whole_png(place / "loss.png"),
        }
        for name, check in checks.items():
            try:
                check()
            except FileNotFoundError:
                continue
            except (UniLoraError, ValueError, RuntimeError, EOFError, OSError) as error:
                raise Torn(f"{name}: {error}") from error
        return 0 if (place / "metrics.csv").exists() else None


def _whole_csv(path: Path) -> None:
    text = path.read_text()
    widths = {line.count(",") for line in text.splitlines()}
    if not text.endswith("\n") or len(widths) > 1:
        raise ValueError("half a line")


def _whole_png(path: Path) -> None:
    if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
        raise ValueError("half a picture")


# ---- kills ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What the table says of one writer."""

    kills: int = 0
    seen: dict[str, int] = field(default_factory=lambda: {"old": 0, "new": 0, "none": 0})
    torn: list[str] = field(default_factory=list)
    left: int = 0
    stay: list[str] = field(default_factory=list)
    reads: int = 0
    mixed: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        wrong = [
            f"{name}: {what}" for name, what in self.places.items() if what not in ("ok", "-") and "skip" not in what
        ]
        return [
            *(f"torn: {t}" for t in self.torn),
            *(f"left after the next save: {s[:5]}…" for s in self.stay),
            *(f"mixed: {m}" for m in self.mixed),
            *wrong,
        ]


def forked(run: Callable[[], None]) -> int:
    """The process that runs it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> None:
    if status := os.waitpid(pid, 0)[1]:
        raise SystemExit(f"kill: a writer failed by itself (status {status})")


class Progress:
    """The number of the last generation that was saved, and of the one that is being saved; shared by processes."""

    def __init__(self):
        self.map = mmap.mmap(-1, 16)
        self.set(-1, -1)

    def set(self, saved: int, begun: int) -> None:
        self.map[:16] = struct.pack("<qq", saved, begun)

    @property
    def value(self) -> tuple[int, int]:
        saved, begun = struct.unpack("<qq", self.map[:16])
        return saved, begun


def kill(writer: Writer, kills: int, seconds: float, rng: random.Random, ready: bool) -> Row:
    """Kill it so many times, or for so long."""
    row, counter, pace, end = Row(), Progress(), 0.05, time.monotonic() + seconds

    def once(i: int) -> None:
        if not ready:
            writer.prepare()
        writer.write(writer.place, i)

    def on_and_on(first: int) -> None:
        if not ready:
            writer.prepare()
        i = first
        while True:
            counter.set(i - 1, i)
            writer.write(writer.place, i)
            i += 1

    began = time.monotonic()
    wait(forked(lambda: once(1)))
    pace, i = (time.monotonic() - began if ready else 0.1), 2
    while row.kills < kills and (time.monotonic() < end or not row.kills):
        counter.set(-1, -1)
        pid = forked(lambda first=i: on_and_on(first))
        while counter.value[1] < 0:
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise SystemExit(f"kill: {writer.name} failed by itself")
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 2.5 * pace))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        row.kills += 1
        saved, begun = counter.value
        row.left += len(writer.leftovers())
        try:
            found = writer.read(writer.place)
            row.seen["none" if found is None else "old" if found <= saved else "new"] += 1
            if found is None and writer.inside is None:
                row.torn.append("the old file is gone, and the new one is not there")
            if found is not None and writer.numbered and found < saved:
                row.torn.append(f"generation {found} was seen after {saved} had been saved")
        except Torn as error:
            row.torn.append(str(error).replace(str(writer.scratch), ""))
        wait(forked(lambda next_=begun + 1: once(next_)))
        row.stay += [path.name for path in writer.leftovers()]
        writer.clean()
        i = begun + 2
    return row


def meet(writer: Writer, row: Row, seconds: float) -> None:
    """Three of them write at once, and a reader reads."""

    def on_and_on(first: int) -> None:
        i = first
        while True:
            writer.write(writer.place, i)
            i += 3

    pids = [forked(lambda k=k: on_and_on(k)) for k in (3, 4, 5)]
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            row.reads += 1
            try:
                writer.read_openly(writer.place)
            except Exception as error:
                row.mixed.append(f"{type(error).__name__}: {error}"[:100].replace(str(writer.scratch), ""))
            if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
                row.mixed.append("a writer failed")
                break
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


# ---- places ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(kilobytes: int) -> Iterator[Path | None]:
    """A tmpfs; None where mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def size_of(place: Path) -> int:
    return place.stat().st_size if place.is_file() else sum(p.stat().st_size for p in place.rglob("*") if p.is_file())


def fails_clearly(writer: Writer, place: Path, i: int, number: int) -> str:
    """ "ok" where writing is refused with the path in the message, and nothing has changed or is left."""
    before = sorted(path.name for path in place.parent.iterdir())
    seen = writer.read(place)
    try:
        writer.write(place, i)
    except OSError as error:
        if str(place) not in str(error) or error.errno != number:
            return f"the message is {type(error).__name__}: {error!s:.120}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.120}"
    else:
        return "it was written?"
    try:
        if writer.read(place) != seen:
            return "the old one is gone"
    except Torn as error:
        return f"torn: {error}"
    left = sorted({path.name for path in place.parent.iterdir()} - set(before))
    return f"left: {left}" if left else "ok"


def places(writer: Writer, row: Row) -> None:
    """A full disk, a link, a long name, a folder that cannot be written."""
    size = size_of(writer.place) // 1024
    with small_disk(int(size * 2.5) + 100) as disk:
        if disk is None:
            row.places["full disk"] = row.places["read-only"] = "skipped: mounting is not allowed here"
        else:
            row.places |= on_small_disk(writer, disk, size)
    folder = Path(tempfile.mkdtemp(dir=writer.scratch))
    real, link = folder / "real", folder / "link"
    writer.write(real, 1)
    if writer.renews:
        link.symlink_to("real")
        try:
            writer.write(link, 2)
            good = link.is_symlink() and writer.read(real) == 2
            row.places["link"] = "ok" if good else "the link was replaced"
        except Exception as error:
            row.places["link"] = f"{type(error).__name__}: {error!s:.100}"
    name = folder / ("ä" * 127 + "x")  # 255 bytes
    try:
        writer.write(name, 3)
        row.places["long name"] = "ok" if writer.read(name) in (0, 3) else "another generation"
    except Exception as error:
        row.places["long name"] = f"{type(error).__name__}: {error!s:.80}"


def on_small_disk(writer: Writer, disk: Path, size: int) -> dict[str, str]:
    found, place = {}, disk / writer.place.name
    if writer.renews:
        writer.write(place, 1)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - size * 1024 // 4)  # room for a part of it
    found["full disk"] = fails_clearly(writer, place, 2, errno.ENOSPC)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    found["read-only"] = fails_clearly(writer, place, 2, errno.EROFS)
    return found


# ---- the whole ------------------------------------------------------------------------------------------------------

TORCH: list[type[Writer]] = [Save, ExportLora, SavePeft, SavePretrained, Merge, Run]
JAX: list[type[Writer]] = [JaxSave, JaxExport]
SHARE = {"unilora finetune": 2.0, "jax save": 2.0, "jax export_lora": 3.0}


def all_of(kinds: list[type[Writer]], arguments: argparse.Namespace, scratch: Path, ready: bool) -> dict[str, Row]:
    rows = {}
    for kind in kinds:
        writer, rng = kind(scratch), random.Random(f"{arguments.seed}/{kind.name}")
        if ready:
            writer.prepare()
        row = kill(writer, arguments.kills, arguments.seconds * SHARE.get(kind.name, 1.0), rng, ready)
        if not isinstance(writer, Run):
            if ready and writer.renews:
                meet(writer, row, arguments.seconds / 2)
            if not ready:
                writer.prepare()  # there is nothing to be forked any more
            writer.write(writer.place, 1)
            places(writer, row)
        rows[kind.name] = row
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="of each writer, at most")
    parser.add_argument("--seconds", type=float, default=2.5, help="for the kills of each writer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", action="append", default=[], help="only this one; may be repeated")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="os.fork")
    scratch = Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        rows = {}
        for kinds, ready in (*(([kind], False) for kind in JAX), (TORCH, True)):
            chosen = [kind for kind in kinds if not arguments.writer or kind.name in arguments.writer]
            rows |= _apart(chosen, arguments, scratch, ready) if chosen else {}
        return report(rows)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _apart(kinds: list[type[Writer]], arguments: argparse.Namespace, scratch: Path, ready: bool) -> dict[str, Row]:
    """In a process of its own: JAX's threads and PyTorch's do not go through one fork."""
    import pickle

    out = scratch / f"rows-{kinds[0].name}"

    def run() -> None:
        if ready:
            import torch

            torch.set_num_threads(1)
        else:
            import jax  # noqa: F401

            import unilora_jax  # noqa: F401
        out.write_bytes(
            pickle.dumps({name: vars(row) for name, row in all_of(kinds, arguments, scratch, ready).items()})
        )

    wait(forked(run))
    return {name: Row(**values) for name, values in pickle.loads(out.read_bytes()).items()}


def report(rows: dict[str, Row]) -> int:
    checked = ["full disk", "read-only", "link", "long name"]
    lines = [["writer", "kills", "old", "new", "none", "torn", "left", "stay", "reads", "mixed", *checked]]
    for name, row in rows.items():
        numbers = [row.kills, *row.seen.values(), len(row.torn), row.left, len(row.stay), row.reads, len(row.mixed)]
        words = [row.places.get(what, "-").split(":")[0][:10] for what in checked]
        lines.append([name, *map(str, numbers), *words])
    lines.append(["all", str(sum(row.kills for row in rows.values()))])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    for line in lines:
        say(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=False))
            )
        )
    for name, row in rows.items():
        for fault, count in Counts(re.sub(r"\d+", "N", fault) for fault in row.faults).items():
            say(f"  {name}: {count} × {fault}")
    return 1 if any(row.faults for row in rows.values()) else 0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
