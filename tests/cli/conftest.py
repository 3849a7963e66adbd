"""Tiny models, a tiny tokenizer and made data in temporary folders: no network, no download."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

FILLERS = ["the", "film", "was", "a", "story", "of", "plot"]
GOOD, BAD = ["very", "good", "great", "warm"], ["bad", "dull", "cold", "poor"]
WORDS = [*FILLERS, *GOOD, *BAD]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"initializer_range": 0.2}  # random weights through which something is heard
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (220, 30, 40)}
VIT = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--model-arg", "img_size=32", "--model-arg", "depth=2")


@pytest.fixture
def vit_model():
    """The words that name a tiny ViT with random weights."""
    return VIT


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unilora(capsys, monkeypatch, tmp_path):
    """unilora(*words): the command, run in this process and in an empty folder; its exit code and its output."""
    from unilora_cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def parsed():
    """parsed(*words): the arguments of a command line."""
    from unilora_cli.main import parse

    return lambda *words: parse([str(word) for word in words])


@pytest.fixture
def base_of(parsed):
    """base_of(file, *words): the base model of an adapter file, as `unilora merge` finds it with these words."""
    from unilora_cli.tasks.models import remembered
    from unilora_core import read_adapter
    from unilora_core.header import read_header

    return lambda file, *words: remembered(
        read_header(file, read_adapter(file)), parsed("merge", file, "--out", "x", *words)
    )


@pytest.fixture
def data_cache(tmp_path, monkeypatch):
    """What `datasets` prepares goes into the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder: train/ of 3 colours × 8, val/ of 3 × 4."""
    np = pytest.importorskip("numpy")
    Image = pytest.importorskip("PIL.Image")
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noisy = np.clip(np.array(colour) + rng.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def sentences():
    """40 pairs of a sentence and its class, "good" or "bad"."""
    import random

    rng = random.Random(0)
    rows = []
    for i in range(40):
        label = ("bad", "good")[i % 2]
        kind = GOOD if label == "good" else BAD
        rows.append((" ".join([*rng.choices(FILLERS, k=rng.randint(2, 4)), *rng.choices(kind, k=3)]), label))
    return rows


@pytest.fixture(scope="session")
def tsv(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("text") / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences))
    return path


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("dialogues") / "train.jsonl"
    rows = [{"instruction": "the film", "input": "", "output": text} for text, _ in sentences]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"eos_token": "[EOS]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="session")
def bert(tmp_path_factory, tokenizer):
    """A BERT without pooler and head, as masked language modelling leaves it."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=32)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = transformers.LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, bert, llama, images, tsv, dialogues):
    """trained(kind, *words): the output folder of a short run, made once for the same words."""
    from unilora_cli.main import main

    sources = {
        "vit": (*VIT, "--data", images, "--augment", "none"),
        "text": ("--model", bert, "--data", tsv),
        "lm": ("--model", llama, "--data", dialogues, "--length", 24),
    }
    made = {}

    def run(kind, *words):
        key = (kind, *map(str, words))
        if key not in made:
            folder = tmp_path_factory.mktemp("runs") / kind
            line = ["finetune", kind, *sources[kind], "--epochs", 2, "--batch-size", 8, "--device", "cpu", *words]
            line += ["--out", folder]
            assert main([str(word) for word in line]) == 0
            made[key] = (folder, tuple(map(str, line)))
        return made[key]

    return run


@pytest.fixture(scope="session")
def launcher():
    """A process that has imported everything; see launcher.py."""
    words = [sys.executable, str(Path(__file__).with_name("launcher.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def launch(launcher, tmp_path):
    """launch(*words, processes=1, kill_at=None): the command in processes of their own, in this test's folder; a
    `Result` of each. With ``kill_at`` they are killed when run/metrics.csv has so many steps.
    """

    def run(*words, processes=1, kill_at=None):
        job = {"words": [str(word) for word in words], "folder": str(tmp_path)}
        launcher.stdin.write(json.dumps(job | {"processes": processes, "kill_at": kill_at}) + "\n")
        launcher.stdin.flush()
        codes = json.loads(launcher.stdout.readline())
        return [
            Result(code, *((tmp_path / f"{name}.{rank}").read_text() for name in ("out", "err")))
            for rank, code in enumerate(codes)
        ]

    return run
