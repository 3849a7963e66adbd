"""The task of `unilora finetune text`: a text classifier of transformers."""

import argparse

import torch.nn.functional as F
from torch import nn

import unilora_transformers
from unilora_cli.adapting import adapter_options, fit_length, loader
from unilora_cli.data_text import encode, load_texts, pad
from unilora_cli.models import Base, build, pad_with, tokenizer
from unilora_cli.task import Batch, Scores, Task
from unilora_torch import Adapter

__all__ = ["score", "task"]


def task(arguments: argparse.Namespace) -> Task:
    """Texts, model and adapter, as the arguments say."""
    texts = load_texts(arguments)
    base = Base(
        "text",
        arguments.model,
        labels=texts.classes,
        arguments=dict(arguments.model_arg),
        seed=arguments.seed,
    )
    tokens = tokenizer(base)
    model, fresh = build(base)
    fill = pad_with(model, tokens)
    length = fit_length(model, arguments.length)
    train, held_out = (encode(pairs, tokens, length) for pairs in (texts.train, texts.held_out))
    collate = pad({"input_ids": fill})
    options = adapter_options(arguments)
    example = collate(train[:2])
    del example["labels"]
    adapter = unilora_transformers.attach(model, example=example, **options)
    if extra := _uncovered(fresh, adapter):
        adapter.detach()
        options["modules_to_save"] = (*adapter.modules_to_save, *extra)
        adapter = unilora_transformers.attach(model, example=example, **options)
    notes = [("classes", ", ".join(texts.classes[:8]) + (" …" if len(texts.classes) > 8 else ""))]
    if extra:
        notes.append(("trained as well", f"{', '.join(extra)}: not in the checkpoint"))
    return Task(
        base=base,
        model=model,
        adapter=adapter,
        train=loader(train, arguments, collate, shuffle=True),
        held_out=loader(held_out, arguments, collate),
        score=score,
        notes=notes,
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy over a batch of texts."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    correct = logits.argmax(-1) == batch["labels"]
    return Scores(F.cross_entropy(logits, batch["labels"]), len(correct), int(correct.sum()))


def _uncovered(fresh: list[str], adapter: Adapter) -> tuple[str, ...]:
    """Modules with random weights (a pooler, say) that neither the head nor θ_d would bring back on loading."""
    saved = tuple(f"{name}." for name in adapter.modules_to_save)
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in fresh if not key.startswith(saved)))
