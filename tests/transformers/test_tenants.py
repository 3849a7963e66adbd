"""Tenants under the Trainer as it stands: the losses of each alone, checkpoints, a resume, an early stop."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import unilora_transformers
from unilora_core import ValuesError
from unilora_transformers import Bank, TenantModel

NAMES = ["a", "b"]
CASES = {
    "LlamaForCausalLM": {},
    "RobertaForSequenceClassification": {"num_labels": 3},
    "RobertaForTokenClassification": {"num_labels": 3},
}


@pytest.fixture
def saved(tmp_path):
    """The files of two adapters of a model, that differ."""

    def make(model):
        paths = {}
        for i, name in enumerate(NAMES):
            adapter = unilora_transformers.attach(copy.deepcopy(model), rank=4, d=64)
            with torch.no_grad():
                adapter.theta_d.add_(0.1 * torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(i)))
            paths[name] = tmp_path / f"{name}.safetensors"
            adapter.save(paths[name])
        return paths

    return make


def tenants_of(model, paths):
    bank = Bank(model)
    for name, path in paths.items():
        bank.add(name, path)
    return bank.trainable(paths)


def labels_of(name, ids):
    return {"LlamaForCausalLM": ids, "RobertaForSequenceClassification": ids[:, 0] % 3}.get(name, ids % 3)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_sum_of_each_alone(tiny, saved, name):
    """Three rows of one and one of the other, with padding that does not count: no mean over the batch is right."""
    model = tiny(name, **CASES[name]).eval()
    paths, which = saved(model), torch.tensor([0, 1, 0, 0])
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = labels_of(name, ids).clone()
    if labels.dim() == 2:
        labels[0, :3] = labels[1, :5] = -100
    made = TenantModel(tenants_of(copy.deepcopy(model), paths)).eval()
    output = made(tenant=which, input_ids=ids, labels=labels)
    output.loss.backward()
    total = 0
    for i, (tenant, path) in enumerate(paths.items()):
        alone = copy.deepcopy(model)
        adapter = unilora_transformers.load(alone, path)
        loss = alone(input_ids=ids[which == i], labels=labels[which == i]).loss
        loss.backward()
        total += loss.item()
        found = [parameter.grad for parameter in made.tenants.parameters_of(tenant)]
        wanted = [adapter.theta_d.grad, *(p.grad for p in adapter.saved_parameters().values())]
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert output.loss.item() == pytest.approx(total, abs=1e-5)


def rows(count=24):
    return [
        {"input_ids": torch.arange(3, 15) + i % 8, "labels": torch.arange(3, 15), "tenant": i % 2} for i in range(count)
    ]


def trainer(model, folder, callbacks=(), **options):
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3, "use_cpu": True}
    settings |= {"max_grad_norm": 0.0}
    quiet = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), **settings | quiet | options)
    optimizer = torch.optim.AdamW(model.tenants.parameter_groups({"a": 1e-3, "b": 3e-3}))
    return Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None), callbacks=list(callbacks))


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_the_trainer_trains_and_goes_on_from_a_checkpoint(tiny, saved, tmp_path):
    model = tiny("LlamaForCausalLM")
    paths = saved(model)
    made = trainer(TenantModel(tenants_of(copy.deepcopy(model), paths)), tmp_path / "run")
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert list(load_file(checkpoint / "model.safetensors")) == ["tenants.theta.0", "tenants.theta.1"]
    again = trainer(TenantModel(tenants_of(copy.deepcopy(model), paths)), tmp_path / "run")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(made)
    for ours, theirs in zip(again.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class StopB(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.tenants.stop("b")
            self.kept = model.tenants.theta[1].detach().clone()


def test_one_tenant_stops_early(tiny, saved, tmp_path):
    model, stop = tiny("LlamaForCausalLM"), StopB()
    made = TenantModel(tenants_of(model, saved(model)))
    before = [theta.detach().clone() for theta in made.tenants.theta]
    trainer(made, tmp_path / "run", callbacks=[stop]).train()
    assert torch.equal(made.tenants.theta[1], stop.kept)
    assert not torch.equal(stop.kept, before[1])
    assert not torch.equal(made.tenants.theta[0], before[0])
    made.tenants.save("b", tmp_path / "b-trained.safetensors")
    unilora_transformers.load(tiny("LlamaForCausalLM"), tmp_path / "b-trained.safetensors", check_base=False)


def test_a_base_without_a_loss_is_refused(tiny, saved):
    model = tiny("RobertaModel")
    made = TenantModel(tenants_of(model, saved(model))).eval()
    ids = torch.tensor([[5, 6, 7]])
    assert made(torch.tensor([0]), input_ids=ids).last_hidden_state.shape[0] == 1
    with pytest.raises(ValuesError, match="RobertaModel takes no labels, so it has no loss to train by"):
        made(torch.tensor([0]), labels=ids, input_ids=ids)


def test_a_base_with_another_loss_is_refused(tiny, saved):
    """It reads its labels otherwise than the loss of its logits; a wrong one would train silently."""
    model, ids = tiny("T5ForConditionalGeneration"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    model.config.decoder_start_token_id = 0
    made = TenantModel(tenants_of(model, saved(model)))
    with pytest.raises(ValuesError, match=r"loss of T5ForConditionalGeneration is [\d.]+, and one of its logits"):
        made(torch.tensor([0, 1]), labels=ids, input_ids=ids)


def test_labels_that_cannot_be_parted_are_refused(tiny, saved, tmp_path):
    model, ids = tiny("RobertaForQuestionAnswering"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    made, at = TenantModel(tenants_of(model, saved(model))), torch.tensor([0, 1])
    for mode in (True, False):
        with pytest.raises(ValuesError, match="expected labels for a loss, got none"):
            made.train(mode)(at, input_ids=ids, start_positions=at, end_positions=at)
    model = tiny("LlamaForCausalLM")
    made = trainer(TenantModel(tenants_of(model, saved(model))), tmp_path / "run", label_smoothing_factor=0.1)
    with pytest.raises(ValuesError, match="a label_smoothing_factor of the Trainer takes them away"):
        made.train()


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing.*is deprecated:FutureWarning"
)  # transformers 5.23 renamed it
@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}, None], ids=str)
def test_gradient_checkpointing_changes_nothing(tiny, saved, tmp_path, how):
    """The backward pass runs after the rows were named, and computes the layers again."""
    model = tiny("LlamaForCausalLM")
    paths = saved(model)

    def moved(**options):
        made = TenantModel(tenants_of(copy.deepcopy(model), paths))
        trainer(made, tmp_path / "run", max_steps=2, save_strategy="no", **options).train()
        assert made.is_gradient_checkpointing == bool(options)
        return list(made.tenants.theta)

    for found, wanted in zip(
        moved(gradient_checkpointing=True, gradient_checkpointing_kwargs=how), moved(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
