"""d that grows in a Trainer's run: its checkpoints, the best of them, and files; timm's adapters grow, too."""

import pytest
import torch
from test_trainer import STEPS, arguments, losses, rows
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback

import unilora_transformers
from unilora_core import MismatchError, read_adapter
from unilora_torch import Growth

EVERY = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


class Grow(TrainerCallback):
    """Doubles d at a step, or where `Growth` would."""

    def __init__(self, at=None, until=None):
        self.at, self.until, self.growth = at, until, None

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **_):
        if state.global_step == self.at:
            model.unilora.grow(2, optimizer, lr_scheduler)

    def on_evaluate(self, args, state, control, model, metrics, optimizer, lr_scheduler, **_):
        if self.until and self.growth is None:
            self.growth = Growth(model.unilora, self.until, 0.5, optimizer, lr_scheduler)
        if self.growth:
            self.growth.step(metrics["eval_loss"])


@pytest.fixture
def trainer(tiny, tmp_path):
    def make(folder, *callbacks, d=40, rate=1e-2, seed=0, **options):
        model = tiny("LlamaForCausalLM")
        adapter = unilora_transformers.attach(model, "all-linear", d=d, seed=seed)
        return Trainer(
            model,
            arguments(tmp_path / folder, **options),
            train_dataset=rows(),
            eval_dataset=rows()[:8],
            optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": adapter.parameter_groups(rate)}),
            callbacks=list(callbacks),
        )

    return make


def test_a_run_goes_on_from_a_checkpoint_of_another_d(trainer, tmp_path):
    """Attached as the first part was; θ_d, its moments and its rate are those of the checkpoint."""
    whole = trainer("whole", Grow(at=2))
    whole.train()
    assert (whole.model.unilora.spec.d, whole.model.unilora.spec.first.d) == (80, 40)
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert torch.equal(again.model.unilora.theta_d, whole.model.unilora.theta_d)
    assert again.model.unilora.spec == whole.model.unilora.spec
    assert read_adapter(tmp_path / "again" / f"checkpoint-{STEPS}" / "adapter.safetensors").spec.d == 80


def test_the_rates_of_the_trainers_schedule_follow(trainer):
    runs = [trainer("still"), trainer("grown", Grow(at=3))]
    for run in runs:
        run.train()
    still, grown = ([row["learning_rate"] for row in run.state.log_history if "loss" in row] for run in runs)
    assert grown[:3] == still[:3]
    assert grown[3:] == pytest.approx([rate * 2**-0.75 for rate in still[3:]])


def test_the_best_may_be_of_a_smaller_d(trainer):
    """The highest loss counts as the best: that of the first evaluation, as training lowers it."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer("run", Grow(at=3), **best, **EVERY)
    run.train()
    evaluated = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert max(evaluated, key=evaluated.get) == 2
    assert run.model.unilora.spec.d == 40
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[2], rel=1e-6)


def test_growth_in_a_callback(trainer):
    run = trainer("run", Grow(until=160), rate=1e-4, **EVERY)
    run.train()
    assert run.model.unilora.spec.d == 80, "the loss rests at this rate, and one doubling does not pay"


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"d": 20}, r"with \{'d': 40, .*, the model's has \{'d': 20, "),
        ({"d": 30}, r"with \{'d': 40, .*, the model's has \{'d': 30, "),
        ({"d": 80, "seed": 1}, "'seed': 0"),
    ],
)
def test_a_checkpoint_that_did_not_grow_from_it(trainer, tmp_path, other, text):
    """A multiple of d is not enough: its P began elsewhere."""
    trainer("run", max_steps=3).train()
    again = trainer("again", **other)
    before = again.model.unilora.spec
    with pytest.raises(MismatchError, match=text):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.model.unilora.spec is before


def test_on_a_quantised_base(tiny, tmp_path):
    """θ_d is a parameter of a class of its own there, which takes other dtypes for casts."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = type(tiny("LlamaForCausalLM")).from_pretrained(tmp_path / "base", quantization_config=config)
    adapter = unilora_transformers.attach(model, "all-linear", d=40)
    with torch.no_grad():
        adapter.theta_d.add_(0.1)
    inputs = torch.arange(3, 15)[None]
    before, theta_d = model(input_ids=inputs).logits, adapter.theta_d
    adapter.grow(2)
    assert adapter.theta_d is theta_d
    assert (len(theta_d), theta_d.dtype) == (80, torch.float32)
    found = model(input_ids=inputs)
    torch.testing.assert_close(found.logits, before, rtol=1e-3, atol=1e-3)
    found.logits.square().sum().backward()
    assert theta_d.grad.shape == (80,)


def test_saved_and_loaded(tiny, tmp_path):
    model = tiny("LlamaForCausalLM")
    adapter = unilora_transformers.attach(model, "all-linear", d=40)
    adapter.grow(4)
    model.save_pretrained(tmp_path / "grown")
    again = unilora_transformers.from_pretrained(tmp_path / "grown", model=tiny("LlamaForCausalLM"))
    assert again.unilora.spec == adapter.spec
    assert torch.equal(again.unilora.theta_d, adapter.theta_d)
