"""The task of `unilora finetune text`: a text classifier of transformers, or a model that gives a number."""

import argparse

import torch.nn.functional as F
from torch import nn

import unilora_transformers
from unilora_cli.data.texts import encode, load_texts, pad
from unilora_cli.tasks.adapting import (
    adapter_options,
    check_classes,
    check_tokens,
    fit_length,
    length_note,
    loader,
    longest,
)
from unilora_cli.tasks.loading import check_available, loaded
from unilora_cli.tasks.models import Base, pad_with, readable_errors, tokenizer
from unilora_cli.tasks.task import Batch, Scores, Task
from unilora_cli.training.metrics import CLASSES, NUMBERS, chosen

__all__ = ["score", "task"]


def task(arguments: argparse.Namespace) -> Task:
    """Texts, model and adapter, as the arguments say."""
    check_available(arguments)
    known, usual = (NUMBERS, ("pearson", "spearman")) if arguments.regression else (CLASSES, ("accuracy",))
    metrics = tuple(known[name] for name in chosen(arguments.metric, known, usual))
    texts = load_texts(arguments)
    check_classes(arguments, len(texts.classes) or 1)
    number = {"num_labels": 1, "problem_type": "regression"} if arguments.regression else {}
    base = Base(
        "text",
        arguments.model,
        labels=texts.classes,
        arguments=number | dict(arguments.model_arg),
        seed=arguments.seed,
    )
    tokens = tokenizer(base)
    model, _ = loaded(base, arguments)
    fill = pad_with(model, tokens)
    length = fit_length(model.config, arguments.length)
    train, held_out = (encode(pairs, tokens, length) for pairs in (texts.train, texts.held_out))
    check_tokens(model, tokens, [*train, *held_out], fill, arguments.model)
    collate = pad({"input_ids": fill})
    tried = collate(longest(train, arguments.batch_size))
    example = {name: values.to(model.device) for name, values in tried.items() if name != "labels"}
    with readable_errors(f"cannot adapt {arguments.model!r}"):
        adapter = unilora_transformers.attach(model, example=example, **adapter_options(arguments))
    classes = ", ".join(texts.classes[:8]) + (" …" if len(texts.classes) > 8 else "")
    notes = [("classes", classes) if texts.classes else ("labels", "numbers"), *texts.notes]
    notes.append(length_note(length, arguments.length))
    return Task(
        base=base,
        model=model,
        adapter=adapter,
        train=loader(train, arguments, collate, shuffle=True),
        held_out=loader(held_out, arguments, collate),
        score=score,
        metrics=metrics,
        notes=notes,
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy over a batch of texts, or the squared error where the labels are numbers."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels, logits = batch["labels"], model(**inputs).logits.float()
    if labels.is_floating_point():
        return Scores(F.mse_loss(logits[:, 0], labels), len(labels), logits[:, 0].detach())
    return Scores(F.cross_entropy(logits, labels), len(labels), logits.argmax(-1))
