"""Exact match of the final number: what a language model answers to held-out questions, against the data's answers."""

import operator
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch
from tqdm.auto import tqdm

from unilora_cli.console import CommandError
from unilora_cli.data.language import Prompt
from unilora_cli.training.metrics import Metric, Outcome

__all__ = ["exact_match", "final_number"]

MARK = re.compile(r"####|the (?:final )?answer is:?", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The number that a worked answer ends with: the first one after the last ``####`` (as in GSM8K) or ``The answer
    is`` (as in MetaMathQA); where there is no such mark, the last one. None if there is none.
    """
    after = MARK.split(text)
    numbers = NUMBER.findall(after[-1])
    if not numbers:
        return None
    return Decimal((numbers[0] if len(after) > 1 else numbers[-1]).replace(",", ""))


def exact_match(prompts: Sequence[Prompt], tokenizer: Any, count: int, batch_size: int, max_new_tokens: int) -> Metric:
    """The part of the first ``count`` prompts to which the model's own answer ends with the right number.

    Greedy decoding.

    Raises:
        CommandError: a response of the data without a number.
    """
    prompts = [prompt for prompt in prompts if prompt.tokens][:count]
    wanted = [final_number(prompt.response) for prompt in prompts]
    if not prompts or None in wanted:
        shown = prompts[wanted.index(None)].response if prompts else ""
        raise CommandError(
            f"--metric exact-match: a held-out response has no number in it ({shown[-80:]!r}), so there is nothing to "
            "match; choose another --metric."
        )

    def measured(outcome: Outcome) -> float:
        model: Any = outcome.model
        answers: list[str] = []
        for start in tqdm(range(0, len(prompts), batch_size), desc="answers", disable=None, leave=False):
            rows = [prompt.tokens for prompt in prompts[start : start + batch_size]]
            answers += _answers(model, rows, tokenizer, max_new_tokens)
        return sum(map(operator.eq, map(final_number, answers), wanted)) / len(prompts)

    return Metric("exact-match", measured)


def _answers(model: Any, rows: list[list[int]], tokenizer: Any, max_new_tokens: int) -> list[str]:
    """What the model goes on with, filled up on the left so that all prompts end at the same place."""
    width, fill = max(map(len, rows)), tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    tokens = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=model.device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    written = model.generate(
        input_ids=tokens,
        attention_mask=seen,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=fill,
        use_cache=True,
    )
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
