"""1,000 adapters on one base: memory, and the time of a batch in which 32 rows name 32 of them.

    python benchmarks/many_adapters.py      # about five minutes on one core

The base is a random Llama of a few million parameters. Beside the bank run the base alone, and one adapter attached in
the ordinary way for all rows; cases take turns in one process, so ratios of medians are what counts.
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import SMOKE, interleaved, parser, write
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_core
import unilora_torch
import unilora_transformers
from unilora_core.header import write_targets

ADAPTERS, ROWS, RANK = 40 if SMOKE else 1000, 32, 4
TARGETS = {"q and v": None, "all-linear": "all-linear"}


def base_model() -> LlamaForCausalLM:
    """4.4 M parameters."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64 if SMOKE else 256,
        intermediate_size=688,
        num_hidden_layers=2 if SMOKE else 4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def batch(targets: str | None) -> dict:
    """Memory, adding and the time of a batch."""
    base = base_model()
    attached = copy.deepcopy(base)
    adapter = unilora_transformers.attach(attached, targets, rank=RANK)
    rng, spec = np.random.default_rng(0), adapter.spec
    rows = [(t.name, t.module, t.first_row, t.transposed) for t in adapter.targets]
    thetas = adapter.theta_d.detach().numpy() + 0.01 * rng.standard_normal((ADAPTERS, spec.d), dtype=np.float32)
    banked = copy.deepcopy(base)
    bank = unilora_torch.Bank(banked)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(ADAPTERS)]
        for path, theta_d in zip(paths, thetas, strict=True):
            unilora_core.save_adapter(path, spec, theta_d, metadata=write_targets(rows))
        size, before, start = paths[0].stat().st_size, resident(), time.perf_counter()
        for i, path in enumerate(paths):
            bank.add(str(i), path)
        adding, grown = time.perf_counter() - start, resident() - before
    tables = bank.nbytes - ADAPTERS * 4 * spec.d
    different, same = [str(i) for i in range(ROWS)], ["0"] * ROWS
    tokens = torch.randint(3, 2048, (ROWS, 64))
    run = torch.no_grad()(lambda model: model(input_ids=tokens, use_cache=False))
    run_generate = torch.no_grad()(
        lambda model: model.generate(tokens[:, :8], max_new_tokens=16, do_sample=False, pad_token_id=0)
    )

    def cases(function):
        def by_rows(names):
            with bank.rows(names):
                return function(banked)

        return {
            "base": lambda: function(base),
            "one_attached": lambda: function(attached),
            "bank_one_adapter": lambda: by_rows(same),
            "bank_32_adapters": lambda: by_rows(different),
        }

    with torch.no_grad():
        with bank.rows(different):
            together = run(banked).logits
        difference = 0.0
        for i in range(ROWS):  # each row alone, with its adapter alone
            adapter.theta_d.copy_(torch.from_numpy(thetas[i]))
            alone = attached(input_ids=tokens[i : i + 1], use_cache=False).logits[0]
            difference = max(difference, float((together[i] - alone).abs().max()))
    forward = interleaved(cases(run), repeats=15, warmup=2)
    generation = interleaved(cases(run_generate), repeats=7, warmup=1)
    return {
        "D": spec.D,
        "d": spec.d,
        "adapters": ADAPTERS,
        "bytes_of_a_file": size,
        "add_s_per_adapter": adding / ADAPTERS,
        "bank_bytes": bank.nbytes,
        "bank_bytes_of_tables": tables,
        "resident_bytes_grown": grown,
        "peft_lora_bytes_float32": ADAPTERS * 4 * spec.D,
        "base_bytes": sum(p.nbytes for p in base.parameters()),
        "max_difference_of_logits": difference,
        "forward_32x64": forward | ratios(forward),
        "generate_16_tokens": generation | ratios(generation),
    }


def ratios(times: dict) -> dict:
    """Medians relative to the base's and to one attached adapter's."""
    median = {name: row["median_s"] for name, row in times.items()}
    return {
        "bank_32_adapters/base": round(median["bank_32_adapters"] / median["base"], 3),
        "bank_32_adapters/one_attached": round(median["bank_32_adapters"] / median["one_attached"], 3),
        "bank_one_adapter/one_attached": round(median["bank_one_adapter"] / median["one_attached"], 3),
    }


def llama_3_1_8b() -> dict:
    """Bytes of 1,000 adapters for the shapes of Llama-3.1-8B, by arithmetic, r = 4 and d = D/16."""
    width, kv, inner, layers = 4096, 1024, 14336, 32
    shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
    shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    found = {}
    for name, chosen in {"q and v": ("q", "v"), "all-linear": tuple(shapes)}.items():
        D = layers * RANK * sum(sum(shapes[each]) for each in chosen)
        d = D // 16
        bank = ADAPTERS * 4 * d + 4 * D + 2 * 4 * d  # θ_d of each, the groups, scale and origin
        lora = ADAPTERS * 2 * D
        found[name] = {"D": D, "d": d, "bank_bytes": bank, "peft_lora_bytes_bfloat16": lora, "ratio": lora / bank}
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    parser(__doc__).parse_args()
    results = {name: batch(targets) for name, targets in TARGETS.items()}
    for name, result in results.items():
        print(name, {key: value for key, value in result.items() if not isinstance(value, dict)}, file=sys.stderr)
        for part in ("forward_32x64", "generate_16_tokens"):
            times = {k: v if isinstance(v, float) else v["median_s"] for k, v in result[part].items()}
            print(part, times, file=sys.stderr)
    print(write("many_adapters", {"rows": ROWS, "rank": RANK, **results, "Llama-3.1-8B": llama_3_1_8b()}))
