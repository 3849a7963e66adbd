"""Every kind of base: attach, ten steps, the loss falls, θ_d moves; saved, and the same in a new process."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reload_worker import inputs, load_base
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, RobertaForSequenceClassification

import unilora_transformers
from unilora_core import AdapterFileError, MismatchError, SpecError, TargetError
from unilora_torch import Target

WORKER = Path(__file__).with_name("reload_worker.py")
SIZES = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes quantises blocks of 64
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 16, "decoder_start_token_id": 0}
MODELS = {
    "GPT2LMHeadModel": {"n_embd": 64},
    "GemmaForCausalLM": SIZES,
    "LlamaForCausalLM": SIZES,
    "MistralForCausalLM": SIZES,
    "MixtralForCausalLM": SIZES,
    "Qwen2ForCausalLM": SIZES,
    "RobertaForSequenceClassification": SIZES,
    "T5ForConditionalGeneration": T5,
}
EXPERTS = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]
CASES = [(cls, dtype) for cls in MODELS for dtype in ("float32", "bfloat16", "nf4")]
CASES += [(cls, "float16") for cls in ("LlamaForCausalLM", "GPT2LMHeadModel")]
CASES += [("LlamaForCausalLM", "bnb-int8"), ("GPT2LMHeadModel", "torchao-int8")]
CASES += [("LlamaForCausalLM", "torchao-int8"), ("LlamaForCausalLM", "torchao-int4")]
CASES += [("MixtralForCausalLM", "torchao-int8"), ("MixtralForCausalLM", "torchao-int4")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """base(class_name): the folder of a saved model of random weights."""
    folder, made = tmp_path_factory.mktemp("float"), {}

    def make(cls):
        if cls not in made:
            made[cls] = folder / cls
            tiny(cls, **MODELS[cls]).save_pretrained(made[cls])
        return made[cls]

    return make


def load(folder, cls, dtype):
    package = {"nf4": "bitsandbytes", "bnb-int8": "bitsandbytes"}.get(dtype, "torchao" if "-" in dtype else "torch")
    pytest.importorskip(package, reason=f"{package} is not installed")
    return load_base(folder, cls, dtype)


def labels(model, batch):
    return torch.tensor([0, 1]) if hasattr(model, "classifier") else batch["input_ids"]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("cls", "dtype"), CASES)
def test_ten_steps(base, saved, cls, dtype):
    model = load(base(cls), cls, dtype)
    adapter = unilora_transformers.attach(model, EXPERTS if "Mixtral" in cls else None)
    before, batch = adapter.theta_d.detach().clone(), inputs(model)
    optimiser, losses = torch.optim.Adam(adapter.parameter_groups(2e-3)), []
    for _ in range(10):
        loss = model(**batch, labels=labels(model, batch)).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert (adapter.theta_d != before).float().mean() > 0.9
    assert adapter.theta_d.dtype == torch.float32
    with torch.no_grad():
        logits = model(**batch).logits.float()
    folder = saved / f"{cls}-{dtype}"
    folder.mkdir()
    adapter.save(folder / "adapter.safetensors")
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    (folder / "case.json").write_text(json.dumps({"cls": cls, "dtype": dtype, "base": str(base(cls))}))
    with torch.no_grad(), adapter.disabled():
        assert (model(**batch).logits - logits).abs().max() > 1e-3


def test_the_same_logits_in_a_new_process(saved):
    cases = {path.name for path in saved.iterdir()}
    assert cases
    command = [sys.executable, str(WORKER), str(saved)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    found = json.loads(out.splitlines()[-1])
    assert found.keys() == cases
    assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("cls", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_trained_on_nf4_and_merged_into_an_unquantised_copy(base, train, tmp_path, cls, targets):
    """GPT-2's Conv1D becomes a linear layer when it is quantised; the file fits both."""
    quantised, whole = load(base(cls), cls, "nf4"), load_base(base(cls), cls, "float32")
    adapter = unilora_transformers.attach(quantised, targets)
    train(adapter)
    with pytest.raises(TargetError, match="merge into an unquantised copy of the base model: save the adapter"):
        adapter.merge()
    assert not adapter.merged
    adapter.save(tmp_path / "a.safetensors")
    other = unilora_transformers.load(whole, tmp_path / "a.safetensors")
    for mine, theirs in zip(adapter.targets, other.targets, strict=True):
        assert mine.name == theirs.name
        assert all(torch.equal(a, b) for a, b in zip(adapter.factors_of(mine), other.factors_of(theirs), strict=True))
    with torch.no_grad():
        logits = whole(**inputs(whole)).logits
        other.merge()
        torch.testing.assert_close(whole(**inputs(whole)).logits, logits, rtol=0, atol=1e-4)


def test_a_quantised_head_cannot_train_and_says_so(base):
    cls = "RobertaForSequenceClassification"
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = RobertaForSequenceClassification.from_pretrained(base(cls), quantization_config=config, device_map="cpu")
    with pytest.raises(TargetError, match=r"classifier\.\S+ is quantised .*llm_int8_skip_modules=\['classifier'\]"):
        unilora_transformers.attach(model)
    assert not hasattr(model, "unilora")


# ---- experts --------------------------------------------------------------------------------------------------------

MIXTURES = {
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def mixture(tiny, cls, implementation="eager"):
    model = tiny(cls, **MIXTURES[cls])
    model.set_experts_implementation(implementation)
    return model


def loss_and_gradient(model, adapter, ids):
    adapter.theta_d.grad = None
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), adapter.theta_d.grad.clone()


def naive(cls, tiny, adapter, ids):
    """Loss and gradient of a model that never saw an adapter, with W + B·A as its parameters."""
    model = mixture(tiny, cls).double()
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    spec, origin = adapter.spec, torch.from_numpy(adapter.spec.init()).double()
    groups, scale = torch.from_numpy(spec.groups()).long(), torch.from_numpy(spec.scale()).double()
    weights = {}
    for target in adapter.targets:
        slices, shapes = spec.layout.slices, spec.layout.shapes
        A = (theta_d * scale)[groups[slices[f"{target.name}.A"]]].view(shapes[f"{target.name}.A"])
        B = ((theta_d - origin) * scale)[groups[slices[f"{target.name}.B"]]].view(shapes[f"{target.name}.B"])
        name = target.name if target.parameter else f"{target.name}.weight"
        update = torch.stack([b @ a for a, b in zip(A, B, strict=True)]) if target.experts else B @ A
        weights[name] = model.get_parameter(name).detach() + (update.mT if target.transposed else update)
    loss = torch.func.functional_call(model, weights, (ids,), {"labels": ids}).loss
    return loss.detach(), torch.autograd.grad(loss, theta_d)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", MIXTURES)
def test_experts_read_the_sum(tiny, ids, train, cls, implementation):
    model = mixture(tiny, cls, implementation)
    router = "router.weight" if "GptOss" in cls else "gate.weight"
    names, types = list(model.state_dict()), [type(module) for module in model.modules()]
    adapter = unilora_transformers.attach(model, [*EXPERTS, router], rank=3)
    assert adapter.spec.layout.shapes["model.layers.0.mlp.experts.down_proj.A"][:2] == (4, 3)
    assert {target.transposed for target in adapter.targets if target.experts} == {"GptOss" in cls}
    train(adapter)
    found, wanted = loss_and_gradient(model, adapter, ids), naive(cls, tiny, adapter, ids)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))
    assert list(model.state_dict()) == [*names, "unilora.theta_d"]
    assert [type(module) for module in model.modules()][: len(types)] == types
    assert_original(model, adapter)


def assert_original(model, adapter):
    """Each module reads its own parameter again."""
    for target in adapter.targets:
        if target.parameter:
            module = model.get_submodule(target.module)
            assert getattr(module, target.parameter) is module._parameters[target.parameter]


@pytest.mark.parametrize("reentrant", [True, False])
def test_experts_under_gradient_checkpointing(tiny, ids, train, reentrant):
    model = mixture(tiny, "MixtralForCausalLM")
    adapter = unilora_transformers.attach(model, EXPERTS)
    train(adapter)
    wanted = loss_and_gradient(model, adapter, ids)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    model.train()
    torch.testing.assert_close(loss_and_gradient(model, adapter, ids), wanted, rtol=1e-5, atol=1e-7)
    assert_original(model, adapter)


def test_after_an_error_the_parameters_are_back(tiny, ids):
    model = mixture(tiny, "MixtralForCausalLM")
    adapter = unilora_transformers.attach(model, EXPERTS)
    model.model.layers[1].mlp.experts.act_fn = None
    with pytest.raises(TypeError):
        model(ids)
    assert_original(model, adapter)


def test_merged_and_saved_experts(tiny, ids, train, tmp_path):
    """The merge and the path round the same sum once, so that in bfloat16 they agree bit for bit."""
    model = mixture(tiny, "GptOssForCausalLM").bfloat16()
    weight = model.model.layers[0].mlp.experts.down_proj.clone()
    adapter = unilora_transformers.attach(model, ["experts.gate_up_proj", "experts.down_proj"])
    train(adapter)
    with torch.no_grad():
        expected = model(ids).logits
        adapter.merge()
        assert torch.equal(model(ids).logits, expected)
        adapter.unmerge()
        assert torch.equal(model.model.layers[0].mlp.experts.down_proj, weight)
        adapter.save(tmp_path / "a.safetensors")
        adapter.detach()
        assert (model(ids).logits - expected).abs().max() > 1e-2
        again = unilora_transformers.load(model, tmp_path / "a.safetensors")
        assert again.targets == adapter.targets
        assert torch.equal(model(ids).logits, expected)


def test_experts_are_not_among_the_linear_layers(tiny):
    adapter = unilora_transformers.attach(mixture(tiny, "MixtralForCausalLM"), "all-linear")
    assert {target.name.rsplit(".", 1)[-1] for target in adapter.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_file_for_other_experts_is_refused(tiny, tmp_path):
    model = mixture(tiny, "MixtralForCausalLM")
    unilora_transformers.attach(model, ["experts.down_proj"]).save(tmp_path / "a.safetensors")
    for other, message in (
        (
            tiny("MixtralForCausalLM", num_local_experts=8),
            r"down_proj: the target expects a weight of 4 × 48 .* has 8 × 48",
        ),
        (tiny("LlamaForCausalLM"), r"no module 'model\.layers\.0\.mlp\.experts'"),
    ):
        with pytest.raises(MismatchError, match=message):
            unilora_transformers.load(other, tmp_path / "a.safetensors")
        assert not hasattr(other, "unilora")


def expert_target(first_row=0, parameter="down_proj", experts=4):
    return [Target("x", "model.layers.0.mlp.experts", 48, 32, first_row, False, parameter, experts)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts"], r"MixtralExperts is no linear layer.*Name its parameters \['down_proj', 'gate_up_proj'\]"),
        (["gate"], r"MixtralTopKRouter is no linear layer.*\['weight'\]"),
        (expert_target(parameter="down"), r"no parameter 'down'; .*down_proj"),
        (expert_target(experts=3), r"expects a weight of 3 × 48 .* has 4 × 48"),
        (expert_target(first_row=1), r"at least 33 outputs, .* has 4 × 48 and 32"),
        ([*expert_target(), *expert_target()], "adapt the same outputs"),
    ],
)
def test_wrong_requests(tiny, targets, message):
    model = mixture(tiny, "MixtralForCausalLM")
    with pytest.raises(TargetError, match=message):
        unilora_transformers.attach(model, targets)
    assert not hasattr(model, "unilora")


def test_quantised_experts_are_refused(tiny):
    model = mixture(tiny, "MixtralForCausalLM")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"0\.mlp\.experts\.down_proj: a weight of torch\.float8_e4m3fn .* unquantised"
    ):
        unilora_transformers.attach(model, ["experts.down_proj"])


def test_experts_of_a_list_that_get_no_token(tiny):
    """Switch's experts are modules; a batch of a few tokens reaches some of them, and that is no error."""
    config = {"num_experts": 16, "expert_capacity": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model = tiny("SwitchTransformersForConditionalGeneration", **config)
    adapter = unilora_transformers.attach(model, ["wi", "wo"])
    experts = [target for target in adapter.targets if ".experts." in target.module]
    unreached = [target for target in experts if target.module in adapter.live.reached.never]
    assert 0 < len(unreached) < len(experts)


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"])
def test_embeddings_and_output_embeddings_by_name(tiny, ids, train, tmp_path, cls, dtype):
    """Gemma 3 scales its rows in the embedding's own forward pass; the update is scaled with them."""
    model = tiny(cls, tie_word_embeddings=False).to(dtype)
    name = "wte" if "GPT2" in cls else "embed_tokens"
    adapter = unilora_transformers.attach(model, [name, "lm_head"], rank=5)
    first, last = adapter.targets
    assert adapter.spec.layout.shapes[f"{first.name}.A"] == (5, 64)
    assert (first.transposed, last.name) == (True, "lm_head")
    train(adapter)
    with torch.no_grad():
        expected = model(ids).logits
        with adapter.disabled():
            assert (model(ids).logits - expected).abs().max() > 1e-2
        adapter.merge()
        tolerance = 2e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=tolerance)
        adapter.unmerge()
        adapter.save(tmp_path / "a.safetensors")
        adapter.detach()
        unilora_transformers.load(model, tmp_path / "a.safetensors")
        assert torch.equal(model(ids).logits, expected)


def test_tied_embeddings_are_refused_with_a_remedy(tiny):
    message = r"embed_tokens: its weight is tied, it is also lm_head\.weight.*tie_word_emb"
    for targets in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        with pytest.raises(TargetError, match=message):
            unilora_transformers.attach(tiny("LlamaForCausalLM", tie_word_embeddings=True), targets)


# ---- as a plain LoRA ------------------------------------------------------------------------------------------------

BLOCKS = [
    Target("up", "model.layers.0.mlp.experts", 32, 48, 48, False, "gate_up_proj", 4),
    Target("gate", "model.layers.0.mlp.experts", 32, 48, 0, False, "gate_up_proj", 4),
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    ("cls", "targets"),
    [
        ("MixtralForCausalLM", [*EXPERTS, "gate.weight"]),
        ("MixtralForCausalLM", ["experts.down_proj"]),
        ("MixtralForCausalLM", BLOCKS),
        ("GptOssForCausalLM", EXPERTS),
        ("LlamaForCausalLM", ["embed_tokens", "lm_head", "q_proj"]),
        ("Gemma3ForCausalLM", ["embed_tokens"]),
        ("GPT2LMHeadModel", ["wte", "c_attn"]),
    ],
)
def test_peft_gives_the_same_logits_of_an_export(tiny, ids, train, tmp_path, cls, targets):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = MIXTURES.get(cls, {"tie_word_embeddings": False})
    model = tiny(cls, **config)
    adapter = unilora_transformers.attach(model, targets, rank=3)
    train(adapter)
    expected = model(ids).logits
    adapter.export_lora(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny(cls, **config), tmp_path).eval()
    torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=2e-5)
    assert (tiny(cls, **config)(ids).logits - expected).abs().max() > 1e-2


def test_no_engine_takes_parameters(tiny, tmp_path):
    adapter = unilora_transformers.attach(mixture(tiny, "MixtralForCausalLM"), EXPERTS, rank=4)
    with pytest.raises(AdapterFileError, match=r"vllm: .*gate_up_proj is adapted as a parameter.*merge the adapter"):
        adapter.export_lora(tmp_path / "new", engine="vllm")
    with pytest.raises(SpecError, match=r"expected rank ≥ 4, .* got 2"):
        adapter.export_lora(tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()
