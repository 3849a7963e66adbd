"""Adapter files served by vLLM: what the resolver takes to make an adapter's LoRA; with --serve, a server under load.

    python benchmarks/vllm_serving.py                              # the resolver's work alone: no vLLM, a minute
    python benchmarks/vllm_serving.py --serve BASE --adapters 1000 # on a machine with a GPU and vLLM

The first measures a random Llama of SmolLM2-135M's shape: the first adapter (the base is looked at), the next ones of
another seed and of the same, one that is there, one whose A and B had left the cache; each LoRA must be what
`export_lora` writes.

The second makes adapters of random values for a base (a folder), and serves them twice: adapter files through the
resolver, and the same adapters as LoRA folders through vLLM's own. Of each: the bytes on disk, the time to the first
token of an adapter that was not asked for yet, and tokens per second where requests name any of them.
"""

import concurrent.futures
import contextlib
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from common import SMOKE, parser, write

import unilora_transformers
from unilora_core import read_adapter, save_adapter
from unilora_vllm.cache import WEIGHTS, Cache
from unilora_vllm.settings import Settings

PORT, TOKENS, AT_ONCE, PROMPT = 8123, 64, 32, "The capital of France is"
SAID = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def smollm2() -> transformers.LlamaForCausalLM:
    """A model of random values in the shape of SmolLM2-135M; a small one with ``--smoke``."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256 if SMOKE else 49152,
        hidden_size=96 if SMOKE else 576,
        intermediate_size=256 if SMOKE else 1536,
        num_hidden_layers=2 if SMOKE else 30,
        num_attention_heads=3 if SMOKE else 9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def resolved(folder: Path, targets: str | None) -> dict:
    """The bytes of an adapter file and of its LoRA, and the milliseconds of each way to it."""
    cache = Cache(Settings(folder=folder, repositories=(), url=None, cache=folder / "cache"))
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    files = []
    for seed in (0, 1, 2, 3):
        adapter = unilora_transformers.attach(model, targets, rank=4, seed=seed)
        files.append(folder / f"{seed}.safetensors")
        adapter.save(files[-1])
        if seed == 0:
            adapter.export_lora(folder / "lora", base_model=str(folder / "base"))
        adapter.detach()
    file = read_adapter(files[0])
    save_adapter(folder / "same.safetensors", file.spec, file.theta_d * 2, metadata=file.metadata)

    def add(path: Path) -> tuple[float, Path]:
        data, start = path.read_bytes(), time.perf_counter()
        made = cache.add(data, str(folder / "base"))
        return 1000 * (time.perf_counter() - start), made

    first, made = add(files[0])
    assert (made / WEIGHTS).read_bytes() == (folder / "lora" / WEIGHTS).read_bytes(), "not what export_lora writes"
    others, same, again = [add(file)[0] for file in files[1:]], add(folder / "same.safetensors")[0], add(files[0])[0]
    size = (made / WEIGHTS).stat().st_size
    (made / WEIGHTS).unlink()
    return {
        "file_bytes": files[0].stat().st_size,
        "lora_bytes": size,
        "first_ms": first,
        "another_seed_ms": statistics.median(others),
        "same_seed_ms": same,
        "there_ms": again,
        "restored_ms": add(files[0])[0],
    }


# ---- a server --------------------------------------------------------------------------------------------------------


def make_adapters(base: Path, folder: Path, count: int) -> None:
    """Write adapters of random values: ``files/N.safetensors``, and ``loras/N``, the same as plain LoRA."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapter = unilora_transformers.attach(model, "all-linear", rank=8)
    for number in range(count):
        with torch.no_grad():
            adapter.theta_d.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
        adapter.save(folder / "files" / f"{number}.safetensors")
        adapter.export_lora(folder / "loras" / str(number), base_model=str(base))


def bytes_of(folder: Path) -> int:
    """The bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def server(base: Path, **environment: str) -> Iterator[None]:
    """vLLM serving a base, until the end of the ``with``."""
    command = ["vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "8", "--port", str(PORT)]
    command += ["--max-loras", str(AT_ONCE), "--max-cpu-loras", str(4 * AT_ONCE), "--max-model-len", "1024"]
    process = subprocess.Popen(command, env=os.environ | SAID | environment)
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                break
            if process.poll() is not None:
                raise RuntimeError(f"vLLM has ended with {process.returncode}; see what it said above.")
            time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait()


def complete(name: str, tokens: int) -> float:
    """Ask for tokens of an adapter; the seconds until all are there."""
    said = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    address = f"http://127.0.0.1:{PORT}/v1/completions"
    request = urllib.request.Request(address, json.dumps(said).encode(), {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()
    return time.perf_counter() - start


def load(count: int) -> dict:
    """The time to the first token of each adapter's first request, then the rate with requests for any of them."""
    cold = sorted(1000 * complete(str(number), 1) for number in range(count))
    names = random.Random(0).choices(range(count), k=20 * AT_ONCE)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: complete(str(name), TOKENS), names))
    rate = len(names) * TOKENS / (time.perf_counter() - start)
    return {"cold_ms": statistics.median(cold), "cold_p99_ms": cold[int(0.99 * count)], "tokens_per_s": rate}


def served(base: Path, folder: Path, count: int) -> dict:
    """Both ways of serving the same adapters."""
    make_adapters(base, folder, count)
    ours = {"UNILORA_VLLM_FOLDER": str(folder / "files"), "UNILORA_VLLM_CACHE_DIR": str(folder / "cache")}
    theirs = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(folder / "loras"), "VLLM_PLUGINS": "lora_filesystem_resolver"}
    results = {}
    for name, place, environment in (("adapter files", "files", ours), ("LoRA folders", "loras", theirs)):
        with server(base, **environment):
            results[name] = {"disk_bytes": bytes_of(folder / place), **load(count)}
    results["adapter files"]["cache_bytes"] = bytes_of(folder / "cache")
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--serve", type=Path, metavar="BASE", help="serve this base with vLLM, on a GPU")
    arguments.add_argument("--adapters", type=int, default=1000, help="how many are served")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if asked.serve:
            write("vllm_serving", served(asked.serve.absolute(), Path(made), asked.adapters))
            return
        smollm2().save_pretrained(Path(made, "base"))
        results = {}
        for name, targets in {"q and v": None, "all-linear": "all-linear"}.items():
            results[name] = resolved(Path(made), targets)
            print(name, {key: round(value, 1) for key, value in results[name].items()})
        write("vllm_resolving", results)


if __name__ == "__main__":
    main()
