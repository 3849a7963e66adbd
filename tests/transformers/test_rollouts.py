"""What an engine gets that generates for a trainer: the weights with the update in them, or a plain LoRA.

No engine runs here. TRL's own code runs up to the request that it sends, which a local server records; of vLLM's
library, to which TRL hands the tensors, only the function that takes them is stood in for.
"""

import copy
import http.server
import json
import pickle
import threading
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import unilora_transformers
from unilora_core import AdapterFileError, SpecError, TargetError, ValuesError
from unilora_transformers import LoraSync, lora_tensors, merged_parameters, sync_rollouts

# TRL still calls what transformers 5.23 renamed, and warns of what it keeps under trl.experimental
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]


@pytest.fixture
def base(tiny, tmp_path):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny("LlamaForCausalLM", **special).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base, train):
    model = AutoModelForCausalLM.from_pretrained(base)
    train(unilora_transformers.attach(model, "all-linear"))
    return model


def merged_state(model):
    """As `merge` makes it, on a copy."""
    twin = copy.deepcopy(model)
    twin.unilora.detach(merge=True)
    return {name: value.detach().clone() for name, value in twin.named_parameters()}


@pytest.fixture
def server():
    """server(refuse=()): its address, and the requests that it was sent."""
    running = []

    def start(refuse=()):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen.append((self.path.partition("?")[0], json.loads(body or "{}")))
                bad = any(path in self.path for path in refuse)
                self.answer(404 if bad else 200, {"detail": "no such route"} if bad else {})

            def do_GET(self):
                known = {"/health": {}, "/v1/models": {"data": [{"id": "base", "max_model_len": 64}]}}
                self.answer(200, known.get(self.path.partition("?")[0], {"world_size": 1}))

            def answer(self, code, said):
                text = json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(httpd)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{httpd.server_port}", seen

    yield start
    for httpd in running:
        httpd.shutdown()
        httpd.server_close()


# ---- merged weights -------------------------------------------------------------------------------------------------


def test_merged_parameters_are_those_of_the_merged_model_and_the_base_is_as_before(model):
    expected, before = merged_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    found = {name: value.detach().clone() for name, value in merged_parameters(model)}
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert not model.unilora.merged
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_what_ends_early_is_taken_out_too(model):
    started = merged_parameters(model)
    next(started)
    assert model.unilora.merged
    started.close()
    assert not model.unilora.merged
    with torch.no_grad():
        model.unilora.theta_d[0] = float("nan")
    with pytest.raises(ValuesError, match="NaN"):
        next(merged_parameters(model))
    assert not model.unilora.merged


def test_a_merged_or_disabled_adapter_is_left_so(model):
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with model.unilora.disabled():
        assert all(torch.equal(value, plain[name]) for name, value in merged_parameters(model))
    model.unilora.merge()
    merged = {name: value.detach().clone() for name, value in merged_parameters(model)}
    assert model.unilora.merged
    assert not torch.equal(merged["model.layers.1.mlp.up_proj.weight"], plain["model.layers.1.mlp.up_proj.weight"])


def test_what_has_no_merged_parameters(tiny, model):
    with pytest.raises(TargetError, match="no adapter, so its weights are its own"):
        merged_parameters(tiny("LlamaForCausalLM"))
    unilora_transformers.attach(model, name="second")
    with pytest.raises(TargetError, match=r"several adapters act.*switch"):
        merged_parameters(model)


def test_spread_values_are_refused(model):
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape
    with pytest.raises(TargetError, match=r"lm_head\.weight: its values are spread over processes.*under DDP"):
        merged_parameters(model)


# ---- TRL ------------------------------------------------------------------------------------------------------------

SYNC = "without the adapter; call unilora_transformers.sync_rollouts"


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture
def sent(monkeypatch):
    """What TRL hands to vLLM's library, which then sends it over NCCL: (name, tensor) by sync."""
    pytest.importorskip("requests", reason="TRL speaks to a server through requests, which is not installed")
    from trl.generation import vllm_client

    taken = []

    class Engine:
        @staticmethod
        def trainer_send_weights(iterator, trainer_args):
            taken.append([(name, value.clone()) for name, value in iterator])

    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_a, **_k: True)
    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", Engine, raising=False)
    arguments = types.SimpleNamespace
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", arguments, raising=False)
    return taken


def generation(trl, model, address):
    """TRL's `VLLMGeneration` in server mode, but for the start of NCCL."""
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation import vllm_client, vllm_generation

    made = object.__new__(vllm_generation.VLLMGeneration)
    made.model, made.accelerator, made.mode = model, Accelerator(cpu=True), "server"
    made._dist, made._weight_metadata = DistributedBackend(made.accelerator), None
    made.vllm_client = vllm_client.VLLMClient(base_url=address)
    return made


def words():
    """A tokenizer of sixty words."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(60)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "w0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="w0")


@pytest.fixture
def grpo(trl, base, tmp_path):
    """grpo(model): TRL's trainer of it."""

    def make(model):
        options = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
        options |= {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        return trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=trl.GRPOConfig(str(tmp_path / "run"), **options),
            train_dataset=pytest.importorskip("datasets").Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"]}),
            processing_class=words(),
            optimizers=(torch.optim.AdamW(model.unilora.parameter_groups(1e-2)), None),
        )

    return make


def test_a_sync_without_arrangement_is_refused_before_anything_is_sent(trl, model, server, sent):
    address, seen = server()
    with pytest.raises(TargetError, match=SYNC):
        generation(trl, model, address).sync_weights()
    assert not sent
    assert not seen


def test_every_place_where_trl_reads_weights_for_vllm_is_refused(trl, model):
    from trl.experimental.async_distillation import async_distillation_trainer
    from trl.experimental.async_grpo import async_grpo_trainer
    from trl.experimental.online_dpo import online_dpo_trainer
    from trl.generation import vllm_client, vllm_generation

    online = types.SimpleNamespace(model=model, is_fsdp_enabled=False)
    online.accelerator = types.SimpleNamespace(state=types.SimpleNamespace(deepspeed_plugin=None))
    reads = [
        lambda: next(vllm_generation.VLLMGeneration._iter_fsdp2_params(online, model)),
        lambda: next(async_grpo_trainer._iter_vllm_named_params(model)),
        lambda: next(async_distillation_trainer._iter_vllm_named_params(model)),
        lambda: online_dpo_trainer.OnlineDPOTrainer._move_model_to_vllm_inner(online),
        lambda: vllm_client.VLLMClient.update_model_params(online, model),
    ]
    for read in reads:
        with pytest.raises(TargetError, match=SYNC):
            read()
    assert sum(1 for _ in model.named_parameters()) == sum(1 for _ in model.parameters())
    model.unilora.detach()
    assert next(async_distillation_trainer._iter_vllm_named_params(model))  # nothing is left of it


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_lists_its_own_parameters(model, how):
    twin = how(model)
    assert dict(twin.named_parameters())["unilora.theta_d"] is twin.unilora.theta_d


def test_grpo_sends_the_merged_weights(trl, model, grpo, server, sent, train):
    address, seen = server()
    trainer = grpo(model)
    trainer.vllm_generation = generation(trl, model, address)
    sync_rollouts(trainer)
    for _ in range(2):
        expected = merged_state(model)
        trainer.vllm_generation.sync_weights()
        assert [name for name, _ in sent[-1]] == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in sent[-1])
        assert not model.unilora.merged
        train(model.unilora)
    assert not torch.equal(dict(sent[0])["model.layers.0.self_attn.q_proj.weight"], sent[1][1][1])
    said = dict(seen)["/update_weights"]["update_info"]
    assert said["names"] == list(expected)
    assert said["shapes"] == [list(value.shape) for value in expected.values()]
    assert [path for path, _ in seen[:4]] == [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]


def test_colocated_vllm_gets_the_merged_weights(trl, model, grpo, server, sent):
    trainer = grpo(model)
    trainer.vllm_generation = made = generation(trl, model, server()[0])
    loaded = []
    inner = types.SimpleNamespace(load_weights=lambda pairs: loaded.extend((n, v.clone()) for n, v in pairs))
    worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=inner))
    executor = types.SimpleNamespace(driver_worker=worker)
    made.llm = types.SimpleNamespace(
        llm_engine=types.SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None
    )
    made.mode, made.enable_sleep_mode = "colocate", False
    sync_rollouts(trainer)
    made.sync_weights()
    expected = merged_state(model)
    assert [name for name, _ in loaded] == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded)


def test_trainers_without_vllm_have_nothing_to_arrange(trl, grpo, model, base):
    trainer = grpo(model)
    with pytest.raises(TargetError, match=r"GRPOTrainer sends an engine no weights \(use_vllm is off\), or reads them"):
        sync_rollouts(trainer)
    model.unilora.detach()
    with pytest.raises(TargetError, match="no adapter"):
        sync_rollouts(trainer)


def test_async_grpo_sends_the_merged_weights(trl, base, server, sent, train, tmp_path, monkeypatch):
    """Its model comes from a path, so the adapter is put on the trainer's; what it sends was listed before."""
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer

    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: 1.0)  # asks for a GPU

    address, _ = server()
    taken = []

    class Transfer:
        paused = 0

        def pause(self):
            self.paused += 1

        def send_weights(self, iterator):
            taken.append([(name, value.clone()) for name, value in iterator])

        def resume(self):
            self.paused -= 1

    worker = types.SimpleNamespace(rollout_buffer=None, update_model_version=lambda version: None)
    options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "vllm_server_base_url": address}
    trainer = AsyncGRPOTrainer(
        str(base),
        reward_funcs=lambda completions, **_: [0.0 for _ in completions],
        args=AsyncGRPOConfig(str(tmp_path / "run"), **options),
        train_dataset=pytest.importorskip("datasets").Dataset.from_dict({"prompt": ["w1 w2"]}),
        processing_class=words(),
        weight_transfer=Transfer(),
        rollout_worker=worker,
    )
    model = trainer.model
    listed = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match="does not run on made-up inputs"):  # its attention is a kernel for GPUs
        train(unilora_transformers.attach(model, "all-linear"))
    with pytest.raises(TargetError, match=SYNC):
        trainer._sync_weight()
    taken.clear()
    trainer.weight_transfer.paused = 0
    sync_rollouts(trainer)
    trainer._sync_weight()
    expected = merged_state(model)
    assert [name for name, _ in taken[0]] == listed
    assert all(torch.equal(value, expected[name]) for name, value in taken[0])
    assert trainer.weight_transfer.paused == 0
    assert trainer.model_version == 1
    assert not model.unilora.merged


# ---- plain LoRA -----------------------------------------------------------------------------------------------------


def test_config_and_tensors_in_memory_are_those_of_the_folder(model, tmp_path):
    config, tensors = lora_tensors(model.unilora, engine="sglang")
    model.unilora.export_lora(tmp_path, engine="sglang")
    assert config == json.loads((tmp_path / "adapter_config.json").read_text())
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], value) for name, value in written.items())
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    target = next(t for t in model.unilora.targets if t.module == name.removeprefix("base_model.model."))
    torch.testing.assert_close(update, model.unilora.delta_weight(target))
    assert config["lora_alpha"] == config["r"]


def run(model, folder, sync, steps=3):
    data = [{"input_ids": torch.arange(3, 11) + i, "labels": torch.arange(3, 11) + i} for i in range(8)]
    options = {"max_steps": steps, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    options |= {"dataloader_pin_memory": False}
    groups = {"params": model.unilora.parameter_groups(1e-2)}
    Trainer(
        model,
        TrainingArguments(str(folder), **options),
        train_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, groups),
        callbacks=[sync],
    ).train()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_loads_each_version(model, server, tmp_path, engine):
    address, seen = server()
    start = lora_tensors(model.unilora, engine=engine)[1]
    sync = LoraSync(model.unilora, tmp_path / "loras", address, engine=engine)
    run(model, tmp_path / "run", sync)
    where, v1 = ("/v1" if engine == "vllm" else ""), str(tmp_path / "loras" / "policy-v1")
    assert seen[0] == (f"{where}/load_lora_adapter", {"lora_name": "policy-v1", "lora_path": v1})
    loads = [said["lora_name"] for path, said in seen if path == f"{where}/load_lora_adapter"]
    assert loads == [f"policy-v{i}" for i in (1, 2, 3, 4)]
    assert [said["lora_name"] for path, said in seen if "unload" in path] == ["policy-v1", "policy-v2"]
    assert sync.served == "policy-v4"
    assert {path.name for path in (tmp_path / "loras").iterdir()} == {"policy-v3", "policy-v4"}
    found = load_file(tmp_path / "loras" / "policy-v4" / "adapter_model.safetensors")
    now = lora_tensors(model.unilora, engine=engine)[1]
    assert all(torch.equal(found[name], value) for name, value in now.items())
    assert any(not torch.equal(found[name], value) for name, value in start.items())


def test_numbers_go_on_after_a_restart_and_steps_may_be_left_out(model, tmp_path):
    run(model, tmp_path / "run", LoraSync(model.unilora, tmp_path / "loras", every=2))
    assert {path.name for path in (tmp_path / "loras").iterdir()} == {"policy-v1", "policy-v2"}
    sync = LoraSync(model.unilora, tmp_path / "loras")
    assert sync.served == "policy-v2"
    assert sync.publish().name == "policy-v3"


def test_what_a_server_does_not_load_is_an_error(model, server, tmp_path):
    address, _ = server(refuse=["load_lora_adapter"])
    sync = LoraSync(model.unilora, tmp_path / "loras", address)
    with pytest.raises(OSError, match=r"the server answered 404 .*no such route.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        sync.publish()
    with pytest.raises(OSError, match=r"no answer \(.*is the server running"):
        LoraSync(model.unilora, tmp_path / "loras", "http://127.0.0.1:9").publish()
    assert sync.version == 0


def test_what_no_engine_would_serve_is_refused(tiny, model, tmp_path):
    with pytest.raises(SpecError, match="expected engine 'vllm' or 'sglang', got 'tgi'"):
        LoraSync(model.unilora, tmp_path, engine="tgi")
    bert = tiny("BertForTokenClassification", num_labels=2)
    sync = LoraSync(unilora_transformers.attach(bert, modules_to_save=["dropout", "bert.embeddings"]), tmp_path / "b")
    with pytest.raises(AdapterFileError, match="vllm"):
        sync.publish()
    assert not (tmp_path / "b" / "policy-v1").exists()
