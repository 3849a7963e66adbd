"""Recipes: every shipped one of a language runs on a tiny model of its architecture and a few rows in its columns, one
of images too; those of images are parsed, and their D is counted on the model that they name; and bad ones."""

import json
import shutil
from pathlib import Path

import pytest

from unilora_cli import recipes

pytest.importorskip("datasets")
pytest.importorskip("sklearn")

PAIRS = ("sentence1", "sentence2")
COLUMNS = {"cola": ("sentence",), "sst2": ("sentence",), "mrpc": PAIRS, "rte": PAIRS, "stsb": PAIRS}
COLUMNS |= {"qnli": ("question", "sentence")}
MODELS = {"mistral-7b": "mistral", "gemma-7b": "gemma", "llama-2-7b": "llama", "llama-2-13b": "llama"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
LANGUAGE = [name for name in recipes.shipped() if not name.startswith("vision/")]
VISION = [name for name in recipes.shipped() if name.startswith("vision/")]
QUICK = ("--max-steps", 2, "--length", 48, "--device", "cpu", "--out", "run")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer, llama):
    """tiny(name): the folder of a model of that architecture with random weights."""
    import torch
    import transformers

    made = {"llama": llama}
    decoder = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    classes = {
        "roberta": ("RobertaForMaskedLM", "RobertaConfig", {"vocab_size": len(tokenizer), "type_vocab_size": 1}),
        "mistral": ("MistralForCausalLM", "MistralConfig", decoder),
        "gemma": ("GemmaForCausalLM", "GemmaConfig", decoder),
    }

    def build(name):
        if name not in made:
            torch.manual_seed(0)
            model, config, sizes = classes[name]
            made[name] = tmp_path_factory.mktemp("models") / name
            config = getattr(transformers, config)(**SIZES, **sizes, **special, tie_word_embeddings=True)
            getattr(transformers, model)(config).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return build


def rows(name, sentences):
    """A few records in the columns of the recipe's data set."""
    family, task = name.split("/")[0], name.split("/")[-1]
    if family == "math":
        return [
            {"query": "the plot", "response": f"{text} The answer is: {i}"} for i, (text, _) in enumerate(sentences)
        ]
    if family == "instruct":
        return [{"instruction": "the film", "input": "", "output": text} for text, _ in sentences]
    label = {"bad": 0, "good": 1}
    return [
        dict.fromkeys(COLUMNS[task], text) | {"label": label[kind] + (0.5 if task == "stsb" else 0)}
        for text, kind in sentences
    ]


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_shipped_recipe_runs(unilora, tiny, sentences, tmp_path, name):
    family, last = name.split("/")[0], name.split("/")[-1]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name, sentences)))
    words = ["--recipe", name, "--data", "data.jsonl", "--eval-data", "data.jsonl", *QUICK]
    words += ["--model", tiny("roberta" if family == "glue" else MODELS[last]), "--d", 40, "--batch-size", 2]
    if family == "math":
        gsm = [{"question": "the film", "answer": "very good #### 7"}] * 3
        (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm))
        words += ["--eval-data", "gsm.jsonl", "--max-new-tokens", 3, "--accumulate", 2]
    if family == "instruct":
        words += ["--no-load-in-4bit", "--accumulate", 2]
    kind = "text" if family == "glue" else "lm"
    result = unilora("finetune", kind, *words)
    assert result.code == 0, result.err
    metrics, recipe = json.loads(Path("run/metrics.json").read_text()), recipes._read(name)
    assert metrics["plan"]["theta_rate"] == recipe["theta-rate"]
    assert (metrics["plan"]["grouping"], metrics["plan"]["start"], metrics["plan"]["d"]) == ("iid", "paper", 40)
    assert metrics["plan"]["steps"] == 2
    assert set(recipe.get("metric", ["perplexity"])) < metrics["final"].keys()
    targets = {"glue": 4}.get(family, 14)
    assert metrics["plan"]["targets"] == targets


@pytest.mark.parametrize("name", ["vision/vit-base/pets", "vision/vit-large/eurosat"])
def test_a_recipe_for_images_runs(unilora, vit_model, images, tmp_path, name):
    pytest.importorskip("timm")
    data = shutil.copytree(images, tmp_path / "data")
    shutil.copytree(data / "val", data / "test")
    (data / "val").rename(data / ("held" if name.endswith("pets") else "validation"))
    result = unilora(
        *("finetune", "vit", "--recipe", name, *vit_model, "--data", data, "--d", 40, "--no-fp16"),
        *("--batch-size", 4, "--accumulate", 2, "--epochs", 2, "--device", "cpu", "--out", "run"),
    )
    assert result.code == 0, result.err
    metrics, recipe = json.loads(Path("run/metrics.json").read_text()), recipes._read(name)
    assert metrics["plan"]["theta_rate"] == recipe["theta-rate"]
    assert metrics["plan"]["head_rate"] == recipe["head-rate"]
    assert (metrics["plan"]["grouping"], metrics["plan"]["start"], metrics["plan"]["d"]) == ("iid", "paper", 40)
    parted = (22, 2) if name.endswith("pets") else (24, 12)  # a tenth of train/ is held out, or validation/ is
    assert (metrics["plan"]["train_examples"], metrics["plan"]["held_out_examples"]) == parted
    assert metrics["test"].keys() == {"loss", "accuracy"}
    assert metrics["settings"]["scale"] == [0.08, 1.0]


@pytest.mark.parametrize("name", VISION)
def test_a_recipe_for_images_has_the_numbers_of_the_paper(parsed, name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from unilora_timm import find_targets

    settings = parsed("finetune", "vit", "--recipe", name)
    _, size, task = name.split("/")
    with torch.device("meta"):
        model = timm.create_model(settings.model, pretrained=False)
    layers = find_targets(model, settings.targets)
    D = settings.rank * sum(layer.in_features + layer.out_features for layer in layers)
    assert (D, settings.d) == {"vit-base": (147_456, 72_000), "vit-large": (393_216, 144_000)}[size]
    assert settings.theta_rate == (5e-3 if (size, task) == ("vit-base", "pets") else 1e-2)
    assert (settings.epochs, settings.batch_size, settings.accumulate, settings.warmup) == (20, 128, 4, 0)
    assert (settings.weight_decay, settings.keep, settings.fp16, settings.max_grad_norm) == (0.01, "best", True, 1.0)
    config = timm.get_pretrained_cfg(settings.model)
    assert (config.hf_hub_id, config.mean) == (f"timm/{settings.model}", (0.5, 0.5, 0.5))


def test_there_is_a_recipe_for_each_experiment_of_the_paper(unilora):
    tasks = ("cola", "mrpc", "qnli", "rte", "sst2", "stsb")
    names = [f"glue/roberta-{size}/{task}" for size in ("base", "large") for task in tasks]
    names += ["instruct/llama-2-13b", "instruct/llama-2-7b", "math/gemma-7b", "math/mistral-7b"]
    tasks = ("cars", "cifar10", "cifar100", "dtd", "eurosat", "fgvc", "pets", "resisc45")
    names += [f"vision/vit-{size}/{task}" for size in ("base", "large") for task in tasks]
    assert recipes.shipped() == names
    result = unilora("recipes")
    assert [line.split()[0] for line in result.out.splitlines()] == names
    assert unilora("recipes", names[0]).out == (recipes.FOLDER / f"{names[0]}.toml").read_text()


def features(hidden, inner, key_value, query):
    """The inputs and outputs of the linear layers of one decoder layer, summed up."""
    return 2 * (hidden + query) + 2 * (hidden + key_value) + 3 * (hidden + inner)


SHAPES = {  # layers, and the sum of in and out features of the targets of each
    "glue/roberta-base/": (12, 2 * 2 * 768),
    "glue/roberta-large/": (24, 2 * 2 * 1024),
    "math/mistral-7b": (32, features(4096, 14336, 1024, 4096)),
    "math/gemma-7b": (28, features(3072, 24576, 4096, 4096)),
    "instruct/llama-2-7b": (32, features(4096, 11008, 4096, 4096)),
    "instruct/llama-2-13b": (40, features(5120, 13824, 5120, 5120)),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_comments_and_the_page_agree_with_the_recipe(name):
    recipe, text = recipes._read(name), (recipes.FOLDER / f"{name}.toml").read_text()
    layers, width = next(shape for start, shape in SHAPES.items() if name.startswith(start))
    D = layers * recipe["rank"] * width
    assert f"d = {recipe['d']}  # D = {D:,}\n" in text
    family, _, task = name.rpartition("/")
    row_of = f"{family}/…" if "glue" in name else name
    row = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{row_of}` |"))
    epochs = f"{task} {recipe['epochs']}" if "glue" in name else f"| {recipe['epochs']} |"
    for part in (f"| {D:,} | {recipe['d']:,} |", f"| {recipe['length']} |", epochs, recipe["schedule"]):
        assert part in row


@pytest.mark.parametrize("name", VISION)
def test_the_page_has_the_rates_of_a_recipe_for_images(name):
    recipe, text = recipes._read(name), (recipes.FOLDER / f"{name}.toml").read_text()
    _, size, task = name.split("/")
    D = {"vit-base": 147_456, "vit-large": 393_216}[size]
    assert f"d = {recipe['d']}  # D = {D:,}\n" in text
    lines = [line.split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{task}` |")]
    ((_, _, data, base, large, *_),) = lines
    assert f"`{recipe['data']}`" in data
    rates = (base if size == "vit-base" else large).split(",")
    assert [float(rate) for rate in rates] == [recipe["theta-rate"], recipe["head-rate"]]


def parse(parsed, tmp_path, text, *words):
    (tmp_path / "my.toml").write_text(text)
    return parsed("finetune", "text", "--recipe", tmp_path / "my.toml", *words)


def test_options_win_over_a_recipe(parsed, tmp_path):
    text = 'task = "text"\nmodel = "m"\ndata = "d"\nrank = 8\nbf16 = true\ntheta-rate = 5e-3\ntargets = ["a", "b"]\n'
    settings = parse(parsed, tmp_path, text)
    assert (settings.rank, settings.bf16, settings.theta_rate, settings.targets) == (8, True, 5e-3, ("a", "b"))
    assert (settings.model, settings.lora_rate) == ("m", 5e-3)
    settings = parse(parsed, tmp_path, text, "--rank", 4, "--no-bf16", "--model", "n", "--targets", "all-linear")
    assert (settings.rank, settings.bf16, settings.model, settings.targets) == (4, False, "n", "all-linear")


def test_a_rate_of_the_command_line_takes_the_place_of_the_other_kind(parsed, tmp_path):
    text = 'task = "text"\nmodel = "m"\ndata = "d"\n'
    settings = parse(parsed, tmp_path, text + "theta-rate = 5e-3\n", "--lora-rate", "5e-3")
    assert (settings.lora_rate, settings.theta_rate) == (5e-3, None)
    settings = parse(parsed, tmp_path, text + "lora-rate = 1e-3\n", "--theta-rate", "0.1")
    assert (settings.lora_rate, settings.theta_rate) == (5e-3, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'task = "text"\nranks = 4\n',
            "my.toml: there is no setting 'ranks'; a recipe may have task, about, model, data,",
        ),
        ('task = "text"\nrank = "4"\n', "my.toml: rank: expected a number, got '4'."),
        ('task = "text"\nrank = 4.5\n', "my.toml: rank: expected a whole number above 0, got '4.5'."),
        ('task = "text"\nbf16 = "yes"\n', "my.toml: bf16: expected true or false, got 'yes'."),
        ('task = "text"\nlength = true\n', "my.toml: length: expected a whole number above 0, got 'True'."),
        ('task = "text"\nschedule = "step"\n', "my.toml: schedule: expected 'linear' or 'cosine', got 'step'."),
        ('task = "text"\nmodel = ["a", "b"]\n', "my.toml: model: expected a text, got ['a', 'b']."),
        ('task = "text"\nsubset = 3\n', "my.toml: subset: expected a text, got 3."),
        ('task = "text"\nout = "x"\n', "my.toml: there is no setting 'out'"),
        ('task = "text"\nlora-rate = 1.0\ntheta-rate = 1.0\n', "theta-rate takes the place of lora-rate; leave one"),
        ('task = "lm"\n', "my.toml: this recipe is for `unilora finetune lm`."),
        ('task = "vit"\n', "my.toml: this recipe is for `unilora finetune vit`."),
        ('task = "audio"\n', 'my.toml: expected task = "vit", "text" or "lm", got \'audio\'.'),
        ("rank = \n", "my.toml: not TOML (Invalid value (at line 1, column 8))."),
    ],
)
def test_a_bad_recipe_is_refused_by_its_key(unilora, tmp_path, text, message):
    (tmp_path / "my.toml").write_text(text)
    result = unilora("finetune", "text", "--recipe", "my.toml", "--out", "run")
    assert result.code == 1
    assert message in result.err
    assert not Path("run").exists()


def test_an_unknown_recipe_is_refused(unilora):
    result = unilora("finetune", "text", "--recipe", "glue/cola")
    assert result.err == (
        "unilora: error: glue/cola: there is no recipe of this name; `unilora recipes` lists those that there are.\n"
    )
    assert "no.toml: there is no such file" in unilora("recipes", "no.toml").err


def test_a_recipe_may_leave_the_data_to_the_command_line(unilora, tmp_path):
    (tmp_path / "my.toml").write_text('task = "text"\nmodel = "m"\n')
    result = unilora("finetune", "text", "--recipe", "my.toml")
    assert result.code == 2
    assert "the following arguments are required: --data" in result.err
