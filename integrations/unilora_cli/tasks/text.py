"""The task of `unilora finetune text`: a text classifier of transformers, or a model that gives a number."""

import torch.nn.functional as F
from torch import nn

import unilora_transformers
from unilora_cli.data.texts import encode, load_texts, pad
from unilora_cli.options.finetune import Text
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


def task(options: Text) -> Task:
    """Texts, model and adapter, as the options say."""
    check_available(options)
    known, usual = (NUMBERS, ("pearson", "spearman")) if options.regression else (CLASSES, ("accuracy",))
    metrics = tuple(known[name] for name in chosen(options.metric, known, usual))
    texts = load_texts(options)
    check_classes(options, len(texts.classes) or 1)
    number = {"num_labels": 1, "problem_type": "regression"} if options.regression else {}
    base = Base(
        "text",
        options.model,
        labels=texts.classes,
        arguments=number | dict(options.model_arg),
        seed=options.seed,
    )
    tokens = tokenizer(base)
    model, _ = loaded(base, options)
    fill = pad_with(model, tokens)
    length = fit_length(model.config, options.length)
    train, held_out = (encode(pairs, tokens, length) for pairs in (texts.train, texts.held_out))
    check_tokens(model, tokens, [*train, *held_out], fill, options.model)
    collate = pad({"input_ids": fill})
    tried = collate(longest(train, options.batch_size))
    example = {name: values.to(model.device) for name, values in tried.items() if name != "labels"}
    with readable_errors(f"cannot adapt {options.model!r}"):
        adapter = unilora_transformers.attach(model, example=example, **adapter_options(options))
    classes = ", ".join(texts.classes[:8]) + (" …" if len(texts.classes) > 8 else "")
    notes = [("classes", classes) if texts.classes else ("labels", "numbers"), *texts.notes]
    notes.append(length_note(length, options.length))
    return Task(
        base=base,
        model=model,
        adapter=adapter,
        train=loader(train, options, collate, shuffle=True),
        held_out=loader(held_out, options, collate),
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
