"""What is trained: every method of the framework by ``attach``, PEFT's, all weights, the head alone, nothing."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from quality.tasks import Task, TaskError
from unilora_core.methods import METHODS

RATES = (0.5, 1.0, 2.0, 4.0)
"""Every method is tuned over the middle of its rates times these, on a seed of its own."""

POWER, TRAINING = "power", ("weight_decay", "warmup")
"""Of a job, beside those of ``attach``: the exponent of D/d in the rate of θ_d, and what `training.fit` takes."""


@dataclass(frozen=True)
class Trained:
    """What trains, and what keeps it.

    Attributes:
        groups: the optimiser's: the method's own numbers, then the head's where there is one.
        numbers: how many the method trains beside the head.
        save: into a folder, as the method saves itself.
        about: what else to note of the run, such as θ_d's rate.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    numbers: int
    save: Callable[[Path], object]
    about: dict[str, Any]

    def bytes(self) -> int:
        """The bytes of the weights that are saved, the head included."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def middle(task: Task, method: str) -> float:
    """The rate around which a method is tuned: η, of which `Adapter.learning_rate` makes the method's own."""
    if method == "full":
        return task.full_rate
    if method == "head":
        return 2 * task.head_rate
    if method == "peft-unilora":
        return task.rate * 16**0.75
    return task.rate * {"peft-vera": 8, "peft-vblora": 2}.get(method, 1)


def adapt(model: nn.Module, task: Task, method: str, rate: float, seed: int, options: Mapping[str, Any]) -> Trained:
    """The model, made ready by a method.

    Args:
        rate: η for a method of the framework, the optimiser's own rate for the others.
        options: of ``attach`` (or of PEFT's config), `POWER` and `TRAINING`.

    Raises:
        TaskError: an unknown method, or the head of a task that has none.
    """
    options = {name: value for name, value in options.items() if name not in TRAINING}
    if method == "none":
        model.requires_grad_(False)
        return Trained(model, [], 0, lambda _folder: None, {})
    if method in METHODS:
        return _ours(model, task, method, rate, seed, dict(options))
    if method.startswith("peft-"):
        return _peft(model, task, method, rate, seed, dict(options))
    if method not in ("full", "head") or (method == "head" and not task.head):
        raise TaskError(
            f"{task.title}: no method {method!r}; there are {', '.join(METHODS)}, peft-*, full, head and none."
        )
    model.requires_grad_(method == "full")
    head = [p for name in task.head for p in model.get_submodule(name).requires_grad_(True).parameters()]
    return _plain(model, head, rate, task.head_rate if method == "full" else rate)


def _ours(model: nn.Module, task: Task, method: str, rate: float, seed: int, options: dict[str, Any]) -> Trained:
    power = options.pop(POWER, None)
    adapter = task.attach(model, method=method, seed=seed, **options)
    groups = adapter.parameter_groups(rate, task.head_rate)
    if power is not None:
        groups[0]["lr"] = rate * (adapter.spec.D / adapter.spec.d) ** power
    about = {"D": adapter.spec.D, "d": adapter.spec.d, "theta_rate": groups[0]["lr"]}
    return Trained(model, groups, adapter.spec.d, lambda folder: adapter.save(folder / "a.safetensors"), about)


def _peft(model: nn.Module, task: Task, method: str, rate: float, seed: int, options: dict[str, Any]) -> Trained:
    import peft

    common = {"target_modules": list(task.layers), "modules_to_save": list(task.head) or None}
    layers = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in task.layers]
    sizes = [size for layer in layers for size in (layer.in_features, layer.out_features)]
    config = {
        "peft-lora": lambda: peft.LoraConfig(**common, **{"r": 4, "lora_alpha": options.get("r", 4)} | options),
        "peft-unilora": lambda: peft.UniLoraConfig(proj_seed=seed, **common, **{"r": 4} | options),
        "peft-vera": lambda: peft.VeraConfig(projection_prng_key=seed, **common, **options),
        "peft-vblora": lambda: peft.VBLoRAConfig(
            **common, **{"r": 4, "vector_length": math.gcd(128, *sizes), "num_vectors": 90} | options
        ),
    }
    if method not in config:
        raise TaskError(f"no method {method!r} of PEFT here; there are {', '.join(config)}.")
    wrapped = peft.get_peft_model(model, config[method]())
    heads = tuple(f".{name}." for name in task.head)
    head = [p for name, p in wrapped.named_parameters() if p.requires_grad and any(part in name for part in heads)]
    trained = _plain(wrapped, head, rate, task.head_rate)
    if method == "peft-vblora":  # its logits at ten times the rate, as PEFT's example has it
        logits = [p for name, p in wrapped.named_parameters() if "vblora_logits" in name]
        own = trained.groups[0]
        own["params"] = [p for p in own["params"] if all(p is not each for each in logits)]
        trained.groups.append({"params": logits, "lr": 10 * rate})
    return Trained(wrapped, trained.groups, trained.numbers, wrapped.save_pretrained, {})


def _plain(model: nn.Module, head: list[nn.Parameter], rate: float, head_rate: float) -> Trained:
    """Everything that requires a gradient, the head apart."""
    known = {id(parameter) for parameter in head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": rest, "lr": rate}, {"params": head, "lr": head_rate}]

    def save(folder: Path) -> None:
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "a.safetensors")

    return Trained(model, [group for group in groups if group["params"]], sum(p.numel() for p in rest), save, {})
