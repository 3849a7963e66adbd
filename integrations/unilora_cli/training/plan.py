"""The plan of a run: its numbers, and how they are explained before training begins."""

from typing import Any

from unilora_cli.console import number
from unilora_cli.options.finetune import Finetune, Training
from unilora_cli.tasks.task import Task
from unilora_cli.training import distributed
from unilora_cli.training.settings import parameter_groups, steps_of
from unilora_core import ProjectionSpec, rates
from unilora_core.methods import method_of

__all__ = ["plan_of", "rows_of"]


def plan_of(task: Task, options: Training) -> dict[str, Any]:
    """The numbers of a run, for the printed plan and for metrics.json."""
    adapter, spec = task.adapter, task.adapter.spec
    groups = parameter_groups(task, options)
    return {
        "method": method_of(spec),
        "targets": len(adapter.targets),
        "D": spec.D,
        "d": spec.d,
        "D/d": spec.D / spec.d,
        "seed": spec.seed,
        "grouping": spec.grouping,
        "start": spec.start,
        "bound": spec.bound,
        "modules_to_save": list(adapter.modules_to_save),
        "theta_rate": groups[0]["lr"],
        "head_rate": groups[1]["lr"] if len(groups) > 1 else None,
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        "total": sum(p.numel() for p in task.model.parameters()),
        "train_examples": len(task.train.dataset),
        "held_out_examples": len(task.held_out.dataset),
        "processes": distributed.processes(),
        "batch": task.train.batch_sampler.whole * options.accumulate,
        "steps": steps_of(task, options),
        "device": options.device,
    }


def rows_of(task: Task, plan: dict[str, Any], options: Finetune) -> list[tuple[str, str]]:
    """The lines of the printed plan."""
    heads = ", ".join(plan["modules_to_save"])
    rows = [
        ("model", f"{task.base.name} ({task.base.kind})"),
        ("data", f"{plan['train_examples']:,} examples to train on, {plan['held_out_examples']:,} held out"),
        *((name, number(value)) for name, value in task.notes),
        ("adapter", task.adapter.summary()),
        ("D/d", f"{plan['D']:,} / {plan['d']:,} = {plan['D/d']:.4g}"),
        ("projection", f"{_method(task.adapter.spec)}, seed {plan['seed']}, start {plan['start']}"),
        *_rate_rows(plan["theta_rate"], options, task.adapter.spec),
        ("batch", _batch(plan, options)),
        ("steps", _steps(plan, options)),
    ]
    if options.grow_to is not None:
        rows.insert(-2, ("growth", f"d doubles up to {options.grow_to:,}, where the held-out loss has come to rest"))
    if heads:
        rows.insert(-2, ("rate of the head", f"{plan['head_rate']:g} ({heads})"))
    return rows


def _method(spec: ProjectionSpec) -> str:
    """The method, and the map and the frame that it is made of."""
    options = "".join(f", {name} {value:g}" for name, value in spec.options)
    return f"{method_of(spec) or 'no published method'} (grouping {spec.grouping}, frame {spec.frame}{options})"


def _rate_rows(theta_rate: float, options: Training, spec: ProjectionSpec) -> list[tuple[str, str]]:
    """θ_d's rate, and why it is what it is."""
    if options.theta_rate is not None:
        return [("rate of θ_d", f"{theta_rate:.4g}, as given")]
    lora = options.lora_rate
    says = f"{theta_rate:.4g} = {theta_rate / lora:.4g} × {lora:g}, the rate that trains as LoRA would at {lora:g}"
    of_map, of_frame = f"{rates.map_rate(spec):.4g} of the grouping {spec.grouping}", f"{spec.form.rate:g} of the frame"
    return [("rate of θ_d", says), ("", f"{of_map} × {of_frame} {spec.frame}")]


def _steps(plan: dict[str, Any], options: Training) -> str:
    parts = [f"{plan['steps']:,} on {plan['device']}"]
    parts += [f"{options.precision} autocast"] if options.precision else []
    return ", ".join(parts)


def _batch(plan: dict[str, Any], options: Training) -> str:
    """Examples per step, as a product where several batches make one."""
    processes, batches = plan["processes"], options.accumulate
    factors = [str(plan["batch"] // (processes * batches))]
    factors += [f"{processes} processes"] if processes > 1 else []
    factors += [f"{batches} batches"] if batches > 1 else []
    return f"{plan['batch']} examples per step" + (f" = {' × '.join(factors)}" if len(factors) > 1 else "")
