"""Every method through one `attach`: what an adapter can do, for each frame and for maps that are no gather."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

import unilora_torch
import unilora_transformers
from unilora_core import MismatchError, SpecError, TargetError, read_adapter
from unilora_core.methods import METHODS
from unilora_transformers.merging import merge_checkpoint

OPTIONS = {
    "vera": {"rank": 8},
    "lora-xs": {"rank": 4},
    "vb-lora": {"vectors": 16, "length": 16},
    "fourierft": {"frequencies": 40},
}
"""Of methods whose usual ones are too large for a layer of 32 × 32."""

DENSE = ("fourierft", "gpart", "intrinsic-dimension")
OF_WEIGHTS = ("lora-xs", "tinylora")
FRAMES = ("lora", "tied-lora", "vera", "lora-xs", "vb-lora", "fourierft", "gpart")
"""One method for each frame."""

CLASSES = ("LlamaForCausalLM", "RobertaForSequenceClassification")
CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def attach(model, method, **options):
    return unilora_transformers.attach(model, method=method, **OPTIONS.get(method, {}) | options)


def move(adapter, by=0.05):
    """As if it had been trained: the same change for the same adapter."""
    with torch.no_grad():
        adapter.theta_d.add_(torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(2)), alpha=by)
    return adapter


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits if hasattr(model, "lm_head") else model(ids).logits


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """These models are too small for two."""
    torch.set_num_threads(1)


@pytest.fixture
def batch(ids):
    """batch(model): token sequences, and labels that can be learned."""

    def make(model):
        if hasattr(model, "lm_head"):
            return {"input_ids": ids, "labels": ids, "use_cache": False}
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}

    return make


# ---- trained, saved, loaded, merged, exported ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_comes_back_from_its_file(tiny, ids, batch, tmp_path, method, name):
    model = tiny(name)
    before = logits(model, ids)
    adapter = attach(model, method)
    if method != "vb-lora":
        assert torch.equal(logits(model, ids), before)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(2e-3))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(**batch(model)).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-4
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    fresh = unilora_transformers.from_pretrained(tmp_path, tiny(name))
    assert fresh.unilora.spec == adapter.spec
    torch.testing.assert_close(logits(fresh, ids), expected, rtol=0, atol=1e-6)
    with fresh.unilora.disabled():
        assert not torch.equal(logits(fresh, ids), expected)


@pytest.mark.parametrize("method", METHODS)
def test_merged_exported_and_taken_off(tiny, ids, tmp_path, method):
    model = tiny("LlamaForCausalLM")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = move(attach(model, method))
    expected = logits(model, ids)
    updates = {target.module: adapter.delta_weight(target) for target in adapter.targets}
    adapter.merge()
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(logits(model, ids), expected)
    if method in DENSE:
        with pytest.raises(TargetError, match=f"the frame '{adapter.spec.frame}' makes whole weights.*merge the"):
            adapter.export_lora(tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        adapter.export_lora(tmp_path / "lora", base_model="org/base", engine="vllm")
        exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        for module, update in updates.items():
            A, B = (exported[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
            torch.testing.assert_close(B @ A, update, rtol=0, atol=1e-6)
    adapter.detach()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_new_process_gives_the_same_logits(tiny, ids, tmp_path):
    tiny("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    case = {"base": str(tmp_path / "base"), "cls": "LlamaForCausalLM", "dtype": "float32"}
    for method in METHODS:
        folder = tmp_path / method
        model = tiny("LlamaForCausalLM")
        move(attach(model, method)).save(folder / "adapter.safetensors")
        save_file({"logits": logits(model, ids)}, folder / "logits.safetensors")
        (folder / "case.json").write_text(json.dumps(case))
    worker = Path(__file__).with_name("reload_worker.py")
    done = subprocess.run([sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == METHODS.keys()
    assert max(found.values()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("GPT2LMHeadModel", "all-linear"),
        ("MixtralForCausalLM", ["embed_tokens", "q_proj", "gate_up_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("method", FRAMES)
def test_a_checkpoint_merged_file_by_file(tiny, ids, tmp_path, method, name, targets):
    """Of weights stored (in, out), of experts and of an embedding. The base stands on the meta device there, and has no
    singular vectors: they are the file's.
    """
    tiny(name).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = getattr(transformers, name).from_pretrained(tmp_path / "base")
    before = logits(model, ids)
    adapter = move(attach(model, method, targets=targets))
    expected = logits(model, ids)
    adapter.save(tmp_path / "a.safetensors")
    merge_checkpoint(tmp_path / "a.safetensors", tmp_path / "base", tmp_path / "out")
    merged = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-6)
    assert (expected - before).abs().max() > 1e-4
    adapter.detach(merge=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=0, atol=1e-7)


def test_the_model_card_names_the_methods(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    attach(model, "vera")
    unilora_transformers.attach(model, method="vera", grouping="balanced", d=10, rank=8, name="second")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Adapter of LlamaForCausalLM\n" in text
    assert "| unilora | vera | 128 | 128 | 4 | 0 | identity |" in text
    assert "| second | scaled | 10 | 128 | 4 | 0 | balanced |" in text
    assert "\nvera: VeRA, arXiv 2310.11454.\n" in text


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def trainer_of(model, folder, **options):
    row = torch.arange(3, 15)
    data = [{"input_ids": row + i % 8, "labels": row + i % 8} for i in range(24)]
    fixed = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "max_steps": 4, "report_to": []}
    fixed |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **fixed | options)
    groups = {"params": model.unilora.parameter_groups(5e-3)}
    return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(torch.optim.AdamW, groups))


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def other_signs(adapter):
    """What another computer's SVD may give: the first pair of singular vectors turned round."""
    with torch.no_grad():
        for arrays in adapter.chains.frozen.values():
            arrays["V"][0].neg_()
            arrays["U"][:, 0].neg_()


@pytest.mark.parametrize("method", [*FRAMES[1:], "tinylora", "fastfood"])
def test_a_resumed_run_goes_on_exactly(tiny, tmp_path, method):
    model = tiny("LlamaForCausalLM")
    attach(model, method)
    whole = trainer_of(model, tmp_path)
    whole.train()
    model = tiny("LlamaForCausalLM")
    adapter = attach(model, method)
    if method in OF_WEIGHTS:
        other_signs(adapter)
    again = trainer_of(model, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again) == losses_of(whole)
    assert torch.equal(adapter.theta_d, whole.model.unilora.theta_d)
    for name, arrays in adapter.chains.frozen.items():
        for key, array in arrays.items():
            assert torch.equal(array, whole.model.unilora.chains.frozen[name][key])


def test_a_checkpoint_holds_what_its_method_needs(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    adapter = attach(model, "lora-xs")
    trainer_of(model, tmp_path, max_steps=2).train()
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    arrays = {f"unilora.frozen.{target.name}.{key}" for target in adapter.targets for key in "UV"}
    assert set(state) == {"unilora.theta_d", "unilora.spec"} | arrays
    file = read_adapter(tmp_path / "checkpoint-2" / "adapter.safetensors")
    assert set(file.tensors) == {name.removeprefix("unilora.") for name in arrays}


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_a_checkpoint_without_its_singular_vectors_is_refused(tiny, tmp_path, change):
    model = tiny("LlamaForCausalLM")
    adapter = attach(model, "lora-xs")
    trainer_of(model, tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    state = load_file(path)
    name = f"unilora.frozen.{adapter.targets[-1].name}.V"
    state = {key: value for key, value in state.items() if key != name}
    save_file(state | ({} if change == "missing" else {name: torch.zeros(3, 32)}), path)
    model = tiny("LlamaForCausalLM")
    adapter = attach(model, "lora-xs")
    before = [array.clone() for arrays in adapter.chains.frozen.values() for array in arrays.values()]
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(
        MismatchError, match=r"the checkpoint: expected the tensor frozen\..*v_proj\.V \(4, 32\) float32"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = [array for arrays in adapter.chains.frozen.values() for array in arrays.values()]
    assert all(map(torch.equal, before, after))
    assert not adapter.theta_d.any()


def test_a_checkpoint_of_another_method_is_refused(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    attach(model, "vera")
    trainer_of(model, tmp_path, max_steps=2).train()
    model = tiny("LlamaForCausalLM")
    attach(model, "tied-lora")
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(
        MismatchError, match=r"trained with \{.*'frame': 'scaled'.*, the model's has \{.*'frame': 'tied'"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- memory and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [*FRAMES, "intrinsic-dimension"])
def test_gradient_checkpointing_changes_no_gradient(tiny, batch, method, reentrant):
    model = tiny("LlamaForCausalLM").train()
    adapter = move(attach(model, method))
    model(**batch(model)).loss.backward()
    expected, adapter.theta_d.grad = adapter.theta_d.grad, None
    getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})
    model(**batch(model)).loss.backward()
    assert expected.any()
    torch.testing.assert_close(adapter.theta_d.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", FRAMES)
def test_a_base_in_bfloat16(tiny, batch, ids, method, tmp_path):
    """θ_d stays float32, its gradient is that beside float32, and the file fits either base."""
    model, exact = tiny("LlamaForCausalLM").to(torch.bfloat16), tiny("LlamaForCausalLM")
    adapter, reference = (move(attach(each, method)) for each in (model, exact))
    for each in (adapter, reference):
        each.model(**batch(each.model)).loss.backward()
    assert adapter.theta_d.dtype == adapter.theta_d.grad.dtype == torch.float32
    assert all(factor.dtype == torch.float32 for factor in adapter.factors().values())
    if method not in OF_WEIGHTS:  # of a rounded weight the singular vectors are others
        assert torch.nn.functional.cosine_similarity(adapter.theta_d.grad, reference.theta_d.grad, dim=0) > 0.95
    adapter.save(tmp_path / "a.safetensors")
    fresh = tiny("LlamaForCausalLM")
    unilora_transformers.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(fresh, ids), logits(model, ids).float(), rtol=0, atol=0.05)


@pytest.fixture
def in_4bit(tiny, tmp_path):
    """A base in a folder, and a function that loads it in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny("LlamaForCausalLM", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )

    def load():
        auto = transformers.AutoModelForCausalLM
        options = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
        return auto.from_pretrained(tmp_path / "base", **options).eval()

    return tmp_path / "base", load


@pytest.mark.parametrize("method", [each for each in FRAMES if each not in OF_WEIGHTS])
def test_a_base_in_4_bit_trains(in_4bit, batch, method):
    base, load = in_4bit
    model, plain = load(), transformers.AutoModelForCausalLM.from_pretrained(base)
    grads = []
    for each in (model, plain):
        adapter = move(attach(each, method))
        each(**batch(each)).loss.backward()
        grads.append(adapter.theta_d.grad)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.8


@pytest.mark.parametrize("method", OF_WEIGHTS)
def test_singular_vectors_beside_a_base_in_4_bit(in_4bit, batch, ids, tmp_path, method):
    """Made beside the plain base; the file that keeps them is trained on beside the quantised one."""
    base, load = in_4bit
    model = load()
    with pytest.raises(
        TargetError, match=r"q_proj: .*singular vectors.*attach to the base in float32 or bfloat16, whole"
    ):
        attach(model, method)
    assert not hasattr(model, "unilora")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapter = move(attach(plain, method), 0.5)
    adapter.save(tmp_path / "a.safetensors")
    loaded = unilora_transformers.load(model, tmp_path / "a.safetensors")
    for name, arrays in loaded.chains.frozen.items():
        assert all(torch.equal(array, adapter.chains.frozen[name][key]) for key, array in arrays.items())
    for each in (model, plain):
        each(**batch(each)).loss.backward()
    assert torch.nn.functional.cosine_similarity(loaded.theta_d.grad, adapter.theta_d.grad, dim=0) > 0.8
    difference = (logits(model, ids) - logits(plain, ids)).abs().max()
    with loaded.disabled(), adapter.disabled():
        assert difference < 1.5 * (logits(model, ids) - logits(plain, ids)).abs().max()


# ---- what cannot be --------------------------------------------------------------------------------------------------

REFUSED = {
    "verra": ({"method": "verra"}, r"unknown method 'verra'; the nearest are vera; known: uni-lora, lora, "),
    "an option of another": ({"method": "vera", "vectors": 8}, r"'vera' has no option 'vectors'; known: initial"),
    "an option of none": ({"method": "lora", "alpha": 8}, r"'lora' has no option 'alpha'; it has none"),
    "a rank where there is none": ({"method": "gpart", "rank": 4}, r"'gpart' has no rank, got rank = 4; leave it out"),
    "d where it follows": ({"method": "vera", "rank": 8, "d": 7}, r"'vera' trains d = 128 numbers here, got d = 7"),
    "a length": ({"method": "vb-lora", "length": 24}, r"length = 24 does not divide the 32 columns.*such as 8"),
    "a rank above the side": ({"method": "lora-xs", "rank": 17}, r"v_proj: expected rank ≤ 16, the singular vectors"),
}


@pytest.mark.parametrize(("options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_a_method_does_not_take(tiny, options, text):
    model = tiny("LlamaForCausalLM")
    names = list(model.state_dict())
    with pytest.raises(SpecError, match=text):
        unilora_transformers.attach(model, **options)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("method", [each for each in METHODS if each != "uni-lora"])
def test_pefts_unilora_says_what_it_does_not_know(tiny, tmp_path, method):
    adapter = attach(tiny("LlamaForCausalLM"), method)
    frame, grouping = adapter.spec.frame, adapter.spec.grouping
    remedy = "merge the adapter" if method in DENSE else "export_lora writes"
    what = (
        f"grouping 'numpy-shuffle' only, not '{grouping}'" if frame == "pair" else f"frame 'pair' only, not '{frame}'"
    )
    with pytest.raises(SpecError, match=f"^save_peft: PEFT knows {what}; {remedy}"):
        unilora_transformers.save_peft(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_bank_gives_each_row_the_logits_of_its_adapter(tiny, tmp_path, method):
    model, ids = tiny("LlamaForCausalLM"), torch.arange(12).view(2, 6)
    adapter = attach(model, method)
    with torch.no_grad():
        adapter.theta_d.add_(0.1 * torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(0)))
        wanted = model(ids).logits[0]
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    bank = unilora_transformers.Bank(model)
    if adapter.spec.frame == "dense":
        with pytest.raises(TargetError, match="θ_D is as large as the layers' weights"):
            bank.add("a", tmp_path / "a.safetensors")
        return
    bank.add("a", tmp_path / "a.safetensors")
    with torch.no_grad():
        base = model(ids).logits
        with bank.rows(["a", None]):
            found = model(ids).logits
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], base[1])
    assert not torch.allclose(found[0], base[0])


def test_a_swap_to_another_method_is_refused(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    adapter = attach(model, "lora-xs")
    adapter.save(tmp_path / "a.safetensors")
    other = tiny("LlamaForCausalLM")
    attached = attach(other, "vera")
    with pytest.raises(MismatchError, match=r"swap expects the same .*detach the adapter and load the file instead"):
        attached.swap(tmp_path / "a.safetensors")
    attached.detach()
    assert unilora_torch.load(other, tmp_path / "a.safetensors").spec == adapter.spec
