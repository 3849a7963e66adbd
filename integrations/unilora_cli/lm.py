"""The task of `unilora finetune lm`: a causal language model of transformers."""

import argparse

import torch.nn.functional as F
from torch import nn

import unilora_transformers
from unilora_cli.adapting import adapter_options, fit_length, loader
from unilora_cli.console import CommandError
from unilora_cli.data_lm import IGNORED, load_language
from unilora_cli.data_text import pad
from unilora_cli.models import Base, build, tokenizer
from unilora_cli.task import Batch, Scores, Task

__all__ = ["score", "task"]


def task(arguments: argparse.Namespace) -> Task:
    """Texts, model and adapter, as the arguments say."""
    base = Base("lm", arguments.model, arguments=dict(arguments.model_arg), seed=arguments.seed)
    tokens = tokenizer(base)
    model, fresh = build(base)
    if fresh:
        raise CommandError(f"{arguments.model}: the checkpoint has no weights for {', '.join(fresh[:4])}.")
    length = fit_length(model, arguments.length)
    data = load_language(arguments, tokens, length)
    model.config.use_cache = False
    collate = pad({"input_ids": tokens.pad_token_id or 0, "labels": IGNORED})
    example = collate(data.train[:2])
    del example["labels"]
    return Task(
        base=base,
        model=model,
        adapter=unilora_transformers.attach(model, example=example, **adapter_options(arguments)),
        train=loader(data.train, arguments, collate, shuffle=True),
        held_out=loader(data.held_out, arguments, collate),
        score=score,
        measure="perplexity",
        notes=[("tokens per example", f"at most {length}"), *data.notes],
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy of the next token, over the tokens that have a label."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    logits, labels = logits[:, :-1][counted].float(), labels[counted]
    return Scores(F.cross_entropy(logits, labels), len(labels), int((logits.argmax(-1) == labels).sum()))
