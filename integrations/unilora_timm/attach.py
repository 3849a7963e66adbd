"""attach and load put one vector beside a timm model, checked to reach every target."""

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn
from typing_extensions import Unpack

import unilora_torch
from unilora_core import TargetError
from unilora_timm.targets import classifier, find_targets
from unilora_torch import Adapter, Target
from unilora_torch.bypassed import through_readers
from unilora_torch.options import AttachOptions, LoadOptions, check_attach

__all__ = ["attach", "example_of", "load"]


def attach(
    model: nn.Module,
    targets: str | Iterable[str | Target] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    method: str = "uni-lora",
    modules_to_save: str | Iterable[str] | None = None,
    example: Tensor | None = None,
    **options: Unpack[AttachOptions],
) -> Adapter:
    """Freeze a timm model, put one trainable vector beside its layers, and leave its classifier to train.

    The model is run on one image, to check that every target is reached and gives θ_d a gradient. That run finds layers
    whose weight the model uses without calling them (``attn.qkv`` of BEiT, EVA-02 and Swin v2): their weight is W + ΔW
    while the module that uses it runs.

    Args:
        model: any timm model; changed in place.
        targets: None for the default (query and value; see `find_targets`), a word such as ``"qkv"`` or ``"mlp"``, a
            regular expression, a list of words and names, or a list of `Target`.
        exclude: the names to remove from ``targets``, as a regular expression or a list.
        method: ``"uni-lora"``, or another of `unilora_core.methods.METHODS`: ``"lora"``, ``"vera"``, ``"lora-xs"``, …
        modules_to_save: names of modules that train in full and are saved with θ_d; by default the classifier.
        example: (batch, channels, height, width), an input for the check; by default one image of the model's size.
        **options: ``rank``, ``d``, ``seed``, ``grouping``, ``start``, ``bound``, ``name`` and ``groups``, as in
            `unilora_torch.attach`, and the options of the method, such as ``vectors=64`` of VB-LoRA.

    Returns:
        The adapter, also found at ``model.unilora``.

    Raises:
        TargetError: there is nothing to adapt, or no gradient reaches a target (also where a layer scale or a norm is
            zero, as in some models with random weights: load the weights first); the model is unchanged.
        SpecError: a method or an option is unknown, or rank or d is out of range; the model is unchanged, as it is
            after an interrupt.
    """
    check_attach(method, options)
    heads = classifier(model) if modules_to_save is None else modules_to_save
    found = find_targets(model, targets, exclude=exclude)
    image = example_of(model) if example is None else example
    with _past_dead_classifier(model):
        try:
            found = through_readers(model, found, lambda: model(image))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise TargetError(
                f"{type(model).__name__}: cannot check that the targets are reached, the model fails on an image of "
                f"shape {tuple(image.shape)} ({error}); give attach an input that it takes, as example=."
            ) from error
        adapter = unilora_torch.attach(model, found, method=method, modules_to_save=heads, **options)
        try:
            _verify(model, adapter, image)
        except BaseException:
            adapter.detach()
            raise
    return _watched(model, adapter)


def load(model: nn.Module, path: str | os.PathLike, **options: Unpack[LoadOptions]) -> Adapter:
    """Read an adapter file and attach it to its base model; the options are those of `unilora_torch.load`."""
    return _watched(model, unilora_torch.load(model, path, **options))


def _watched(model: nn.Module, adapter: Adapter) -> Adapter:
    adapter.handles.append(model.register_forward_pre_hook(_refuse_reentrant))
    return adapter


def _refuse_reentrant(model: nn.Module, _args: object) -> None:
    """Refuse a pass whose gradient would not reach θ_d: reentrant checkpoints see their inputs, which need none."""
    if not use_reentrant_ckpt() or not torch.is_grad_enabled():
        return
    for name, module in model.named_modules():
        if getattr(module, "grad_checkpointing", False):
            raise TargetError(
                f"{name or type(model).__name__}: timm checkpoints it in the reentrant way, which gives θ_d no "
                "gradient beside frozen weights; call timm.layers.set_reentrant_ckpt(False)."
            )


def _verify(model: nn.Module, adapter: Adapter, image: Tensor) -> None:
    try:
        adapter.verify(image)
    except TargetError as error:
        raise TargetError(f"{error}{_zeros(model, adapter)}") from None


def _zeros(model: nn.Module, adapter: Adapter) -> str:
    """Say what may be why no gradient arrives: a scale or a norm that is still zero, as timm starts some."""
    targets = [target.module.split(".") for target in adapter.targets]
    beside = {
        name: max(_shared(name.split("."), target) for target in targets)
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and not parameter.any()
    }
    near = [name for name, shared in beside.items() if shared]
    if not near:
        return ""
    return (
        f" {max(near, key=beside.__getitem__)} is all zeros ({len(near)} such parameters), and what is multiplied by "
        "it has no gradient: a model with random weights may start so; load its weights before attach."
    )


def _shared(name: list[str], other: list[str]) -> int:
    """Count the parts with which two names begin alike."""
    return next((depth for depth, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), len(other))


@contextlib.contextmanager
def _past_dead_classifier(model: nn.Module) -> Iterator[None]:
    """Leave a classifier of zeros out: it lets no gradient through until it has trained a step."""
    heads = [model.get_submodule(name) for name in classifier(model)]
    dead = [head for head in heads if not any(parameter.any() for parameter in head.parameters())]
    with contextlib.ExitStack() as stack:
        for head in dead:
            stack.callback(head.register_forward_hook(lambda _module, args, _output: args[0]).remove)
        yield


def example_of(model: nn.Module) -> Tensor:
    """Make one image (1, channels, height, width) of the size, device and dtype that the model takes; not random."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (3, 224, 224)
    for module in model.modules():
        if found := getattr(module, "img_size", None):
            size = found if isinstance(found, (tuple, list)) else (found, found)
            break
    if isinstance(first := config.get("first_conv"), str):
        channels = getattr(dict(model.named_modules()).get(first), "in_channels", channels)
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    wave = torch.arange(channels * size[0] * size[1], device=weight.device).cos()
    return wave.view(1, channels, *size).to(weight.dtype)
