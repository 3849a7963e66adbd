"""Layers that a model of transformers does not call: their weight is W + B·A while the module runs that reads it."""

import copy

import pytest
import torch
import transformers

import unilora_transformers
from unilora_core import TargetError

SPEECH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPEECH |= {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (10, 8), "num_conv_pos_embeddings": 8}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "num_buckets": 8, "apply_spec_augment": False, "layerdrop": 0.0}
SPEECH |= dict.fromkeys(("attention_dropout", "hidden_dropout", "feat_proj_dropout", "activation_dropout"), 0.0)
STATE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MODELS = {
    "WavLMForSequenceClassification": (SPEECH, None, "attention", {"q_proj.weight", "v_proj.weight"}),
    "WavLMModel": (SPEECH, ["k_proj", "out_proj"], "attention", {"k_proj.weight", "out_proj.weight"}),
    "MambaForCausalLM": (STATE, ["x_proj", "dt_proj"], "mixer", {"dt_proj.weight"}),
}


def make(name):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**MODELS[name][0])).eval()


def batch(model):
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    return {"input_values": torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))}


def moved(model, targets):
    adapter = unilora_transformers.attach(model, targets, rank=2, modules_to_save=())
    with torch.no_grad():
        adapter.theta_d.normal_(generator=torch.Generator().manual_seed(1))
    return adapter


def weighed(out):
    """A sum that no norm makes constant."""
    return (out * torch.arange(out.numel()).view(out.shape).cos()).sum()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_updated_weights(name, training):
    _, targets, reader, parameters = MODELS[name]
    model, base = make(name), make(name).train(training)
    adapter = moved(model, targets)
    read = [target for target in adapter.targets if target.parameter]
    assert {target.parameter for target in read} == parameters
    assert len(read) == 2 * len(parameters)
    assert all(target.module.endswith(f".{reader}") for target in read)

    out = model.train(training)(**batch(model))[0]
    (grad,) = torch.autograd.grad(weighed(out), adapter.theta_d)

    weights, factors = {}, adapter.factors()
    for target in adapter.targets:
        key = f"{target.module}.{target.parameter or 'weight'}"
        weights[key] = base.get_parameter(key) + factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
    expected = torch.func.functional_call(base, weights, kwargs=batch(base))[0]
    (wanted,) = torch.autograd.grad(weighed(expected), adapter.theta_d)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert wanted.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_file_says_who_reads_the_weight_and_load_runs_nothing(name, tmp_path):
    model, fresh = make(name), make(name)
    adapter = moved(model, MODELS[name][1])
    with torch.no_grad():
        expected = model(**batch(model))[0]
    adapter.save(tmp_path / "a.safetensors")
    handle = fresh.register_forward_pre_hook(lambda *_: pytest.fail("load ran the model"))
    loaded = unilora_transformers.load(fresh, tmp_path / "a.safetensors")
    handle.remove()
    assert loaded.targets == adapter.targets
    with torch.no_grad():
        assert torch.equal(fresh(**batch(fresh))[0], expected)
        adapter.merge()
        torch.testing.assert_close(model(**batch(model))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_neither_called_nor_read_is_still_refused():
    model = make("WavLMModel")
    attention = model.encoder.layers[0].attention
    attention.spare_proj = torch.nn.Linear(32, 32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"attention\.spare_proj: .* never calls this module \(1"):
        unilora_transformers.attach(model, ["q_proj", "spare_proj"])
    assert list(model.state_dict()) == list(before)
