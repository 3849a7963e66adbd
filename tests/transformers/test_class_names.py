"""The names of classes, as transformers takes and saves them: no checkpoint is lost to them, and they come back."""

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import unilora_transformers
from unilora_core import AdapterFileError, MismatchError, read_adapter
from unilora_core.header import read_header
from unilora_transformers import merge_checkpoint

NAMES = {
    "from 1": {1: "no", 2: "yes", 3: "maybe"},
    "text": {"0": "a", "1": "b", "2": "c"},
    "gaps": {0: "a", 5: "b", 9: "c"},
    "another order": {2: "c", 0: "a", 1: "b"},
    "twice the same": {0: "a", 1: "a", 2: "b"},
    "more than outputs": dict(enumerate("abcde")),
    "fewer than outputs": {0: "a"},
    "numbers for names": {0: 10, 1: 20, 2: 30},
    "no name": {0: None, 1: "b", 2: "c"},
    "negative": {-1: "a", 0: "b", 1: "c"},
    "accents": {0: "é", 1: "日本", 2: "\x1b"},
    "as usual": {0: "no", 1: "yes", 2: "maybe"},
}


@pytest.fixture
def base(tiny, tmp_path):
    tiny("BertForSequenceClassification", num_labels=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(base, name="BertForSequenceClassification", count=3, **options):
    cls = getattr(transformers, name)
    return cls.from_pretrained(base, num_labels=count, ignore_mismatched_sizes=True, **options).eval()


def as_loaded(names):
    return {int(key): name for key, name in names.items()}


def checkpoint(model, folder):
    """What the Trainer writes after two steps."""
    data = [{"input_ids": torch.arange(5, 13) + i % 8, "labels": torch.tensor(i % 2)} for i in range(8)]
    options = {"max_steps": 2, "save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    groups = {"params": model.unilora.parameter_groups(1e-3)}
    options |= {"dataloader_pin_memory": False}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **options),
        train_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, groups),
    )
    trainer.train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("case", NAMES)
def test_a_checkpoint_keeps_the_names(base, ids, tmp_path, case):
    model = classifier(base)
    model.config.id2label = NAMES[case]
    unilora_transformers.attach(model)
    folder = checkpoint(model, tmp_path / "run")
    loaded = unilora_transformers.from_pretrained(folder)
    assert loaded.config.id2label == as_loaded(NAMES[case])
    assert loaded.config.problem_type == "single_label_classification"  # as its first training pass found
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_plain_names_are_the_list_that_others_read(base, tmp_path):
    model = classifier(base)
    model.config.id2label = {"0": "a", "1": "b", "2": "c"}
    model.config.label2id = {"a": 0, "b": 1, "c": 2}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path)
    file = read_adapter(tmp_path / "adapter.safetensors")
    assert read_header("a", file).labels == ("a", "b", "c")
    assert not {"id2label", "base_arguments"} & file.metadata.keys()


def test_numbers_that_disagree_with_the_names_come_back(base, tmp_path):
    model = classifier(base)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 2, "b": 1, "c": 0, "d": 0}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path)
    loaded = unilora_transformers.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.config.label2id == {"a": 2, "b": 1, "c": 0, "d": 0}


@pytest.mark.parametrize("names", [None, [], ["a", "b", "c"]])
def test_no_dictionary_of_names(base, ids, tmp_path, names):
    model = classifier(base)
    model.config.id2label = names
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path)
    loaded = unilora_transformers.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert list(loaded.config.id2label.values()) == (names or ["LABEL_0", "LABEL_1", "LABEL_2"])


@pytest.mark.parametrize("value", [object(), ["a", "list"], float("nan"), b"bytes"])
def test_what_no_file_can_say_is_left_out_with_a_warning(base, ids, tmp_path, value):
    model = classifier(base)
    model.config.id2label = {0: value, 1: "b", 2: "c"}
    unilora_transformers.attach(model)
    with pytest.warns(UserWarning, match="id2label is left out of the adapter file, which cannot say it"):
        model.save_pretrained(tmp_path)
    loaded = unilora_transformers.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("count", "problem"), [(1, "regression"), (1, None), (3, "regression"), (3, "multi_label_classification")]
)
def test_the_kind_of_problem_comes_back(base, ids, tmp_path, count, problem):
    model = classifier(base, count=count)
    model.config.problem_type = problem
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path)
    loaded = unilora_transformers.from_pretrained(tmp_path)
    assert loaded.config.problem_type == problem
    assert loaded.config.id2label == model.config.id2label
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_an_unknown_kind_of_problem_is_left_out(base, tmp_path):
    model = classifier(base)
    unilora_transformers.attach(model)
    model.config.problem_type = "a new one"
    with pytest.warns(UserWarning, match="problem_type = 'a new one' is left out"):
        model.save_pretrained(tmp_path)
    assert unilora_transformers.from_pretrained(tmp_path).config.problem_type is None


def test_tokens_and_images_have_classes_too(tiny, base, tmp_path):
    model = classifier(base, "BertForTokenClassification", count=4)
    model.config.id2label = {i + 1: f"B-{i}" for i in range(4)}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path / "tokens")
    assert unilora_transformers.from_pretrained(tmp_path / "tokens").config.id2label == model.config.id2label
    tiny("ViTForImageClassification", num_labels=2).save_pretrained(tmp_path / "vit")
    model = classifier(tmp_path / "vit", "ViTForImageClassification", count=5)
    model.config.id2label = {i + 1: f"n{i}" for i in range(5)}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path / "images")
    assert unilora_transformers.from_pretrained(tmp_path / "images").config.id2label == model.config.id2label


def test_a_timm_model_in_transformers(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    config = transformers.TimmWrapperConfig(
        architecture="test_vit", id2label={1: "cat", 2: "dog", 3: "cow"}, do_pooling=True
    )
    made = transformers.TimmWrapperForImageClassification(config)
    made.save_pretrained(tmp_path / "base")
    model = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "base").eval()
    assert list(model.config.id2label.values()) == ["cat", "dog", "cow"]
    model.config.id2label = {1: "cat", 2: "dog", 3: "cow"}
    unilora_transformers.attach(model, r".*attn\.proj", example={"pixel_values": torch.zeros(1, 3, 160, 160)})
    model.save_pretrained(tmp_path / "adapter")
    loaded = unilora_transformers.from_pretrained(tmp_path / "adapter")
    assert loaded.config.id2label == {1: "cat", 2: "dog", 3: "cow"}


def test_the_caller_decides(base, tmp_path):
    model = classifier(base)
    model.config.id2label = {1: "a", 2: "b", 3: "c"}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path)
    mine = {0: "x", 1: "y", 2: "z"}
    assert unilora_transformers.from_pretrained(tmp_path, id2label=mine).config.id2label == mine
    config = transformers.BertConfig.from_pretrained(base, id2label=mine)
    assert unilora_transformers.from_pretrained(tmp_path, config=config).config.id2label == mine
    with pytest.raises(MismatchError, match="classifier"):
        unilora_transformers.from_pretrained(tmp_path, num_labels=7)


def test_a_merged_checkpoint_has_the_names(base, ids, tmp_path):
    model = classifier(base)
    model.config.id2label = {1: "a", 2: "b", 3: "c"}
    unilora_transformers.attach(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter" / "adapter.safetensors", base, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {1: "a", 2: "b", 3: "c"}
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)


@pytest.mark.parametrize("said", ["[]", "3", '{"0": [1]}', "{"])
def test_a_strange_entry_of_a_file_is_refused(base, tmp_path, said):
    model = classifier(base)
    adapter = unilora_transformers.attach(model)
    metadata = {"base_model": str(base), "base_class": type(model).__name__, "id2label": said}
    adapter.save(tmp_path / "adapter.safetensors", metadata)
    with pytest.raises(AdapterFileError, match="id2label"):
        unilora_transformers.from_pretrained(tmp_path)
