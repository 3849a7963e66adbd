"""GSM8K as plain text, by a small Llama that was trained here on other plain text: steps of a tenth of a second."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import SMOKE
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_transformers
from quality.tasks import Data, Task, data_folder, unpacked
from quality.training import fit

VOCABULARY, LENGTH = 2048, 128
STEPS, BATCH, RATE = 2 if SMOKE else 400, 8, 3e-3
"""Of the base's own training."""


@functools.cache
def corpus() -> tuple[ByteLevelBPETokenizer, Tensor]:
    """Tokens made for the corpora under UNILORA_DATA, and the corpora in blocks (n, LENGTH)."""
    texts = [unpacked(path) for path in sorted(data_folder("corpus").glob("*.gz"))]
    tokenizer = ByteLevelBPETokenizer()
    lines = (line for each in texts for line in each.splitlines())
    tokenizer.train_from_iterator(lines, VOCABULARY, show_progress=False)
    return tokenizer, blocks(tokenizer, texts)


def blocks(tokenizer: ByteLevelBPETokenizer, texts: Sequence[str]) -> Tensor:
    """Texts, joined and cut: (n, LENGTH) int64; a rest is left out."""
    stream = torch.tensor([token for each in tokenizer.encode_batch(list(texts)) for token in each.ids])
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def read() -> Data:
    """Questions with their answers; 100 to choose on and 200 to judge on, none of them trained on."""
    rows = [json.loads(line) for line in unpacked(data_folder("gsm8k_train") / "train.jsonl.gz").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    texts = [f"{rows[i]['question']}\n{rows[i]['answer']}\n\n" for i in order]
    validation, test, pool = (blocks(corpus()[0], part) for part in (texts[:100], texts[100:300], texts[300:]))
    return Data(list(pool), list(validation), list(test))


def collate(examples: list[Tensor], _rng: np.random.Generator | None) -> Tensor:
    """Blocks (n, LENGTH)."""
    return torch.stack(examples)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean loss of a token."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=batch, labels=batch).loss


def figures(model: nn.Module, examples: Sequence[Tensor]) -> dict[str, float]:
    """The mean loss of a token."""
    parts = torch.stack(list(examples)).split(16)
    return {"loss": sum(loss(model, part).item() * len(part) for part in parts) / len(examples)}


def model(folder: Path) -> nn.Module:
    """4 layers of width 256, 3.7 million parameters; trained here once, then kept."""
    kept = folder / "small_llama"
    if not (kept / "config.json").exists():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng():  # the same base whatever the seed of the run that makes it
            torch.manual_seed(0)
            base = LlamaForCausalLM(config)
        order = np.random.default_rng(0).permutation(len(corpus()[1]))[: STEPS * BATCH]
        groups = [{"params": list(base.parameters()), "lr": RATE}]
        chosen = list(corpus()[1][order])
        fit(base, groups, chosen, collate, loss, epochs=1, batch=BATCH, seed=0, title="the base")
        base.save_pretrained(kept)
    return LlamaForCausalLM.from_pretrained(kept)


TASK = Task(
    title="GSM8K text, small Llama",
    kind="language",
    metric="loss",
    higher=False,
    data=read,
    model=model,
    collate=collate,
    loss=loss,
    figures=figures,
    attach=functools.partial(unilora_transformers.attach, targets="all-linear"),
    layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    head=(),
    examples=480,
    epochs=1,
    batch=4,
    rate=1e-2,
    head_rate=0.0,
    full_rate=1e-3,
)
