"""The task of `unilora finetune lm`: a causal language model of transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unilora_transformers
from unilora_cli.console import CommandError
from unilora_cli.data.corpus import read_corpora
from unilora_cli.data.language import IGNORED, Language, encode_corpora
from unilora_cli.data.packing import check_packing
from unilora_cli.data.templates import check_template
from unilora_cli.data.texts import pad
from unilora_cli.options.finetune import Lm
from unilora_cli.tasks.adapting import adapter_options, check_tokens, fit_length, length_note, loader, longest
from unilora_cli.tasks.generation import exact_match
from unilora_cli.tasks.loading import check_available, loaded
from unilora_cli.tasks.models import Base, config_of, readable_errors, tokenizer
from unilora_cli.tasks.task import Batch, Scores, Task
from unilora_cli.training import distributed
from unilora_cli.training.metrics import PERPLEXITY, Metric, chosen

__all__ = ["score", "task"]


def task(options: Lm) -> Task:
    """Texts, model and adapter, as the options say; what is wrong with the data is said before the model loads."""
    check_available(options, options.shard)
    wanted = chosen(options.metric, ("perplexity", "exact-match"), ("perplexity",))
    train, held_out = read_corpora(options)
    base = Base("lm", options.model, arguments=dict(options.model_arg), seed=options.seed)
    tokens = tokenizer(base)
    if train.chats or (held_out and held_out.chats):
        check_template(tokens, options.model)
    length = fit_length(config_of(base), options.length)
    data = encode_corpora(train, held_out, options, tokens, length)
    metrics = tuple(PERPLEXITY if name == "perplexity" else _exact_match(data, options, tokens) for name in wanted)
    model, fresh = loaded(base, options, options.shard)
    if fresh:
        raise CommandError(f"{options.model}: the checkpoint has no weights for {', '.join(fresh[:4])}.")
    model.config.use_cache = False
    fill = tokens.pad_token_id or 0
    check_tokens(model, tokens, [*data.train, *data.held_out], fill, options.model)
    if options.packing:
        check_packing(model, data.unpacked, options.model)
    collate = pad({"input_ids": fill, "labels": IGNORED})
    tried = collate(longest(data.train, options.batch_size))
    example = {name: values.to(model.device) for name, values in tried.items() if name != "labels"}
    with readable_errors(f"cannot adapt {options.model!r}"):
        adapter = unilora_transformers.attach(model, example=example, **adapter_options(options))
    notes = [length_note(length, options.length), *data.notes]
    if options.shard:
        trained = [parameter for group in adapter.parameter_groups(1.0) for parameter in group["params"]]
        whole, own = distributed.shard(model, torch.device(options.device), trained)
        notes.append(("base", f"in {distributed.processes()} parts; this process holds {own:,} of {whole:,} numbers"))
    blank = [{name: [IGNORED if name == "labels" else fill] for name in data.train[0]}]  # all processes take part
    return Task(
        base=base,
        model=model,
        adapter=adapter,
        train=loader(data.train, options, collate, shuffle=True, blank=blank),
        held_out=loader(data.held_out, options, collate, blank=blank),
        score=score,
        count=count,
        metrics=metrics,
        before=True,
        notes=notes,
    )


def score(model: nn.Module, batch: Batch) -> Scores:
    """Cross-entropy of the next token, over the tokens that have a label."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    logits, labels = logits[:, :-1][counted].float(), labels[counted]
    return Scores(F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels)), len(labels))


def count(labels: Tensor) -> int:
    """How many tokens have a label."""
    return int((labels[:, 1:] != IGNORED).sum())


def _exact_match(data: Language, options: Lm, tokens: Any) -> Metric:
    batch_size = options.batch_size * options.accumulate
    return exact_match(data.prompts, tokens, options.eval_prompts, batch_size, options.max_new_tokens)
