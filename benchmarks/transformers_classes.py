"""Every model class of transformers, made tiny: what comes of an adapter on its default targets.

    nice python benchmarks/transformers_classes.py             # all that has no result yet
    python benchmarks/transformers_classes.py bert swin        # some model types, anew; the others' results are kept
    python benchmarks/transformers_classes.py --counts         # what the results say
    python benchmarks/transformers_classes.py --write-doc      # the table of docs/bases.md from the results

The classes are those of the auto classes' tables. Configs are the defaults, shrunken by the names of their fields
(`shrunk`) and by `EXCEPTIONS`; weights are random, and none so small that no gradient passes. For each class: attach at
the default targets; in evaluation and in training mode (dropout 0) the gradient of θ_d is that of a plain model whose
weights are W + B·A, and two steps of AdamW move it; with checkpointing of both kinds it is the same; saved, it loads
into a fresh copy and, in batches, in a new process, with the same outputs bit for bit; merged, it gives what it gave.
What comes of it is one of

    alive       all of that
    alive in part   the same, and attach named the part of the model that no made-up inputs run
    refused     attach, or the first training step with reentrant checkpointing, said why not
    unchecked   attached with a warning: the model does not run on made-up inputs
    not built   no tiny model of it is made here
    dead        a target without a gradient, and no word of it
    wrong       anything else, such as another number or a traceback
"""

import contextlib
import copy
import gc
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import DOCS, RESULTS, SMOKE, parser, write
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

import unilora_transformers
from unilora_core import TargetError
from unilora_torch.adapter import Adapter
from unilora_torch.targets import weight_name
from unilora_transformers.made_up import made_up_inputs

NAME = "transformers_classes"
CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
SECONDS, MEMORY, LARGEST = 90, 8 << 30, 5e7
"""What one class may take, and how many parameters it may have."""
CLOSE, CHAOTIC = 1e-3, 1e-4
"""Relative errors. A random model that is off by more than the second in float32 is compared in float64, too."""

# ---- tiny configs --------------------------------------------------------------------------------------------------

FACTOR, VOCABULARY = 8, 256
WIDTH = re.compile(r"hidden|embed|inter|ffn|ff|mlp|proj|dim|channel|width|inner|n_embd|d_model|d_kv|rank|feature_size")
NO_WIDTH = re.compile(
    r"layer|patch|image|kernel|vocab|window|num_|codebook|position|stride|rotary|ratio|count|_idx|act"
)
DEPTH = re.compile(
    r"(^|_)(layers?|depths?|blocks?|n_layers?|num_repeats?|groups_depth)$|num_hidden_layers|num_.*_layers$"
)
IGNORED = {"num_lstm_layers", "num_residual_layers", "transformers_version"}
AT_MOST = {
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_source_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_queries": 20,
    "num_frames": 4,
    "index_topk": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "moe_num_experts": 8,
}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "layer_type": "basic"}
BACKBONE = {"backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage4"]}}
PYRAMID = {"backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "conditional_detr": BACKBONE,
    "dab-detr": BACKBONE,
    "deformable_detr": PYRAMID,
    "detr": BACKBONE,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "table-transformer": BACKBONE,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "blip-2": {"image_token_index": 200},
    "gemma3": {"mm_tokens_per_image": 4},
    "informer": {"prediction_length": 4, "context_length": 8},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
}
"""Model type → fields that are set by hand; those of an inner config by a mapping."""
LEFT_OUT: dict[str, str] = {"bark": "a pipeline of models, without a forward pass of its own"}
"""Model type → why it is not tried."""
WHOLE = {"albert", "bart", "bert", "clip", "distilbert", "gpt2", "llama", "roberta", "swin", "t5", "vit", "wav2vec2"}
"""Types of which every class is tried; of the others the first of these kinds."""
PREFERRED = (
    "ForConditionalGeneration",
    "ForCausalLM",
    "LMHeadModel",
    "ForImageClassification",
    "ForObjectDetection",
    "ForUniversalSegmentation",
    "ForSemanticSegmentation",
    "ForCTC",
    "ForSequenceClassification",
    "Model",
)


@dataclass(frozen=True)
class Size:
    """One way to make a config small.

    Attributes:
        images: smaller ones, too.
        widths: divided: ``"heads"``: so that attention has two heads of the width that they had; ``"all"``: by
            `FACTOR`, with as many heads; ``""``: as they are.
    """

    images: bool
    widths: str


SIZES = (Size(True, "all"), Size(False, "all"), Size(True, "heads"), Size(False, "heads"), Size(True, ""))
"""Tried in this order, until a model is built, and runs on made-up inputs."""


def shrunk(config: PreTrainedConfig, size: Size) -> PreTrainedConfig:
    """A config as small as its fields' names allow."""
    kind = type(config)
    plain, parameters = kind(), inspect.signature(kind.__init__).parameters
    changes = {}
    for name, parameter in parameters.items():
        value = getattr(config, name, parameter.default)
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrunk(value, size)
        elif parameter.default is not None or value != getattr(plain, name, None):  # others follow from these
            smaller = _smaller(name, value, config, size)
            if smaller is not value:
                changes[name] = smaller
    for name in ("out_features", "out_indices"):
        if getattr(config, name, None) != getattr(plain, name, None):  # of layers, which have to be there
            changes = {key: value for key, value in changes.items() if key != "num_hidden_layers"}
            changes[name] = getattr(config, name)
    if "head_dim" in parameters and getattr(plain, "head_dim", 0) is None:  # some do not say what it follows from
        sizes = [changes.get(name, getattr(config, name, None)) for name in ("hidden_size", "num_attention_heads")]
        if all(isinstance(each, int) for each in sizes):
            changes["head_dim"] = sizes[0] // sizes[1]
    text, vision = changes.get("text_config"), changes.get("vision_config")
    if hasattr(vision, "out_hidden_size") and hasattr(text, "hidden_size"):
        vision.out_hidden_size = text.hidden_size
    changes |= EXCEPTIONS.get(kind.model_type, {})
    return kind(**changes)


def _smaller(name: str, value: Any, config: PreTrainedConfig, size: Size) -> Any:
    if isinstance(value, bool) or name in IGNORED:
        return value
    if isinstance(value, float) and re.search(r"drop|mask_time_prob|mask_feature_prob|jitter", name):
        return 0.0
    if name.endswith("vocab_size") and isinstance(value, int):
        return min(value, VOCABULARY)
    if re.search(r"token_(id|index)$", name) and isinstance(value, int):
        return value if 0 <= value < VOCABULARY // 2 else VOCABULARY // 2 + sum(map(ord, name)) % (VOCABULARY // 2)
    if name in AT_MOST and isinstance(value, int):
        return min(value, AT_MOST[name])
    if name in ("image_size", "img_size") and size.images:
        return _image(value, getattr(config, "patch_size", None), config)
    if DEPTH.search(name):
        return _shallow(name, value)
    factor = FACTOR if size.widths == "all" else _factor(config) if size.widths == "heads" else 1
    if size.widths == "heads" and HEADS.search(name) and isinstance(value, int):
        return max(value // factor, 1)
    if size.widths == "heads" and HEAD_WIDTH.search(name):
        return value
    if factor > 1 and WIDTH.search(name) and not NO_WIDTH.search(name):
        return _narrow(value, factor)
    return value


HEADS = re.compile(r"(^|_)(n_|num_)?(\w+_)?heads?$")
HEAD_WIDTH = re.compile(r"head_dim|rope|rotary|d_kv")


def _factor(config: PreTrainedConfig) -> int:
    heads = getattr(config, "num_attention_heads", None)
    return max(heads // 2, 1) if isinstance(heads, int) else FACTOR


def _shallow(name: str, value: Any) -> Any:
    if isinstance(value, int):
        return min(value, 2)
    if isinstance(value, list | tuple) and name.endswith("s") and all(isinstance(each, int) for each in value):
        return type(value)(1 for _ in value)
    return value


def _narrow(value: Any, factor: int) -> Any:
    if isinstance(value, int):
        return value // factor if value >= 64 and value % factor == 0 else value
    if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
        narrow = min(value) >= 16 and all(each % factor == 0 for each in value)
        return type(value)(each // factor for each in value) if narrow else value
    return value


def _image(size: Any, patch: Any, config: PreTrainedConfig) -> Any:
    if not isinstance(patch, int) or hasattr(config, "depths"):
        return size
    smaller = 4 * patch
    if isinstance(size, int):
        return min(size, smaller)
    return type(size)(min(each, smaller) for each in size) if isinstance(size, list | tuple) else size


# ---- classes and models --------------------------------------------------------------------------------------------


def classes() -> dict[str, list[str]]:
    """Model type → the names of its classes, by the tables of the auto classes."""
    found: dict[str, list[str]] = defaultdict(list)
    for table in dir(modeling_auto):
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES"):
            for kind, names in getattr(modeling_auto, table).items():
                found[kind] += [names] if isinstance(names, str) else names
    owners: dict[str, str] = {}
    for kind, names in found.items():  # some types list another's classes, too
        plain = kind.replace("_", "").replace("-", "")
        for name in names:
            if name not in owners or name.lower().startswith(plain):
                owners[name] = kind
    listed = {kind: [name for name in dict.fromkeys(names) if owners[name] == kind] for kind, names in found.items()}
    kinds = [kind for kind in configuration_auto.CONFIG_MAPPING_NAMES if listed.get(kind) and not _is_part(kind, found)]
    return {kind: listed[kind] if kind in WHOLE else [min(listed[kind], key=_preference)] for kind in kinds}


def _is_part(kind: str, kinds: Mapping[str, Any]) -> bool:
    """Whether a type is a tower of another one, which is tried whole."""
    whole = re.sub(
        r"(_text|_vision|_audio|_encoder|_decoder|_vision_model|_text_model|_audio_encoder|_qformer|_talker|"
        r"_vision_encoder|_thinker|_vqvae|_visual|_tokenizer\w*)+$",
        "",
        kind,
    )
    return whole != kind and (whole in kinds or whole.replace("_", "-") in kinds)


def _preference(name: str) -> int:
    return next((number for number, end in enumerate(PREFERRED) if name.endswith(end)), len(PREFERRED))


class NotBuilt(Exception):
    """Why there is no tiny model."""


def build(kind: str, name: str, number: int) -> PreTrainedModel:
    """A tiny model of random weights, the same at each call, every one of which lets gradients through.

    Args:
        number: of its size in `SIZES`.
    """
    if kind in LEFT_OUT:
        raise NotBuilt(LEFT_OUT[kind])
    cls = getattr(transformers, name)
    config = shrunk(cls.config_class(), SIZES[number])
    if number:  # it may be large
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size:.1e} parameters at its smallest")
    torch.manual_seed(0)
    model = cls(config)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    enliven(model)
    return model.eval()


def enliven(model: nn.Module) -> None:
    """No weights of zeros, no tiny scales: no gradient would pass through them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not torch.isfinite(parameter).all() or parameter.abs().max() < 1e-3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.squeeze().dim() < 2 and not key.endswith("bias") and parameter.abs().max() < 0.1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2 + 0.5)  # layer scales


def smallest(kind: str, name: str) -> tuple[int, PreTrainedModel, dict[str, Any] | None]:
    """The number of the first size at which a model is built and runs; the model; and the inputs, None if it runs at
    no size.

    Raises:
        NotBuilt: it is built at no size.
    """
    errors, runs = [], {}
    for number in range(len(SIZES)):
        try:
            model = build(kind, name, number)
        except Late:
            raise
        except Exception as error:  # whatever a class raises on sizes that it was not made for
            errors.append(error)
            continue
        runs[number] = inputs = next((each for each in made_up_inputs(model) if _runs(model, each)), None)
        if inputs and ("pixel_values" in inputs or not _sees(model)):
            break
    if not runs:
        raise NotBuilt(f"{type(errors[0]).__name__}: {errors[0]}".splitlines()[0][:200])
    number = next((each for each, inputs in runs.items() if inputs and "pixel_values" in inputs), None)
    number = next((each for each, inputs in runs.items() if inputs), min(runs)) if number is None else number
    return number, build(kind, name, number), runs[number]


def _sees(model: nn.Module) -> bool:
    """Whether images may stand among its tokens."""
    return hasattr(model, "get_image_features") and "pixel_values" in inspect.signature(model.forward).parameters


def _runs(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    try:
        run(copy.deepcopy(model), inputs)
    except Late:
        raise
    except Exception:  # whatever it is, others are tried
        return False
    return True


# ---- one class -----------------------------------------------------------------------------------------------------


def floats(output: Any) -> list[Tensor]:
    """The finite parts of every floating-point tensor in a nested output."""
    leaves = torch.utils._pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [torch.where(torch.isfinite(leaf), leaf, 0) for leaf in found]


def loss_of(output: Any) -> Tensor:
    """A number on which all outputs tell."""
    return sum((tensor * torch.arange(tensor.numel()).view(tensor.shape).cos()).sum() for tensor in floats(output))


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Buffers, such as those of a batch norm, and random numbers are as before."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept and kept[name].shape == buffer.shape:
                buffer.copy_(kept[name])


def train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The model in a mode; batch norms, which need more rows than one, stay in evaluation mode."""
    for module in model.train(mode).modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return model


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad(), unmoved(model):
        return floats(model(**inputs))


def gradient(adapter: Adapter, inputs: Mapping[str, Any]) -> Tensor:
    """That of θ_d, as a training step makes it."""
    adapter.theta_d.grad = None
    with unmoved(adapter.model):
        loss_of(adapter.model(**inputs)).backward()
    grad, adapter.theta_d.grad = adapter.theta_d.grad, None
    for parameter in adapter.model.parameters():
        parameter.grad = None
    return torch.zeros_like(adapter.theta_d) if grad is None else grad


def dense_gradient(adapter: Adapter, base: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """The same of a plain model whose weights are W + B·A; and the targets whose weight it does not use."""
    replaced: dict[str, Tensor] = {}
    factors = adapter.factors()
    updates = []
    for target in adapter.targets:
        name = weight_name(target)
        weight = replaced.get(name, base.get_parameter(name))
        update = factors[f"{target.name}.B"].to(weight) @ factors[f"{target.name}.A"].to(weight)
        updates.append(update)
        update = update.mT if target.transposed else update.view(*update.shape[:-1], *weight.shape[1:])
        rows = slice(target.first_row, target.first_row + target.out_features)
        moved = torch.zeros_like(weight)
        moved = torch.slice_scatter(moved, update, -1 if target.transposed else 0, rows.start, rows.stop)
        replaced[name] = weight + moved
    trained = {name: dict(adapter.model.named_parameters())[name] for name in adapter.saved_parameters()}
    trained = {name: tensor for name, tensor in trained.items() if name in dict(base.named_parameters())}
    with unmoved(base):
        loss = loss_of(torch.func.functional_call(base, trained | replaced, kwargs=dict(inputs)))
        grads = torch.autograd.grad(loss, [adapter.theta_d, *updates], allow_unused=True)
    dead = [
        target.name for target, grad in zip(adapter.targets, grads[1:], strict=True) if grad is None or not grad.any()
    ]
    return grads[0] if grads[0] is not None else torch.zeros_like(adapter.theta_d), dead


def distance(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    if isinstance(a, list):
        if [each.shape for each in a] != [each.shape for each in b]:
            return float("inf")
        return max((distance(*pair) for pair in zip(a, b, strict=True)), default=0.0)
    if a.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


class Outcome(Exception):
    """An end of a class's row that is not "alive"."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.row = {"outcome": outcome, "why": _clean(why)}


def _clean(text: object) -> str:
    text = re.sub(r"(/[\w.+-]+)+/(?=[\w.+-])", "", str(text))  # no paths of this machine
    return re.sub(r"0x[0-9a-f]+", "0x…", text.splitlines()[0] if text else "")[:300]


def row(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """What comes of one class, and the largest errors."""
    start = time.perf_counter()
    try:
        found = tried(kind, name, folder)
    except NotBuilt as error:
        found = {"outcome": "not built", "why": _clean(str(error))}
    except Outcome as error:
        found = error.row
    except Late:
        found = {"outcome": "not built", "why": f"takes more than {SECONDS} seconds"}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "unilora" in f.filename), "")
        found = {"outcome": "wrong", "why": _clean(f"{type(error).__name__}: {error} {where}")}
    return {"type": kind, "class": name, **found, "seconds": round(time.perf_counter() - start, 1)}


def tried(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """See the module."""
    number, model, inputs = smallest(kind, name)
    base = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = unilora_transformers.attach(model)
        except TargetError as error:
            raise Outcome("refused", str(error)) from None
    asleep = ""
    for warning in caught:
        if "do not run this part" in (text := str(warning.message)):
            asleep = text.removeprefix("unilora: ")
        elif "unchecked" in text:
            raise Outcome("unchecked", re.sub(r"^unilora: | so its targets.*", "", text))
    told = int(re.search(r"\((\d+) such targets\)", asleep)[1]) if asleep else 0
    if inputs is None:
        raise Outcome("wrong", "attach ran what did not run before")
    with torch.no_grad():
        adapter.theta_d.add_(torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    found: dict[str, Any] = {"targets": len(adapter.targets)}
    found["eval gradient"] = compared(adapter, base, inputs, "eval", told)
    trains = not (why := alone(base, inputs, None))
    if trains:
        found["train gradient"] = compared(adapter, base, inputs, "train", told)
        found |= checkpointed(adapter, base, inputs)
    else:
        found["train gradient"] = _clean(f"transformers: {why}")
    stepped(adapter, inputs, (False, True) if trains else (False,))
    model.eval()
    outputs = run(model, inputs)
    saved({"type": kind, "class": name, "size": number, "inputs": inputs, "outputs": outputs}, adapter, folder)
    adapter.merge()
    found["merged"] = within("merged", distance(run(model, inputs), outputs), 1e-2)
    return {"outcome": "alive in part", "why": _clean(asleep), **found} if asleep else {"outcome": "alive", **found}


def within(what: str, error: float, limit: float = CLOSE) -> float:
    """The error, if it is small."""
    if not error <= limit:
        raise Outcome("wrong", f"{what}: off by {error:.2g}")
    return float(f"{error:.1e}")


def compared(adapter: Adapter, base: nn.Module, inputs: Mapping[str, Any], mode: str, told: int) -> float:
    """How far the gradient of θ_d is from that of the plain model; ``told``: of so many targets attach said that
    nothing has run them.
    """
    for each in (adapter.model, base):
        train(each, mode == "train")
    grad = gradient(adapter, inputs)
    expected, dead = dense_gradient(adapter, base, inputs)
    if len(dead) > told:
        raise Outcome("dead", f"{mode}: {dead[0]} and {len(dead) - 1} more of {len(adapter.targets)}")
    error = distance(grad, expected)
    if error > CHAOTIC:
        model, plain = copy.deepcopy(adapter.model).double(), copy.deepcopy(base).double()
        doubled = {key: value.double() if _is_float(value) else value for key, value in inputs.items()}
        with in_double():
            error = distance(gradient(model.unilora, doubled), dense_gradient(model.unilora, plain, doubled)[0])
    return within(f"gradient in {mode} mode", error)


class InDouble(TorchFunctionMode):
    """What asks for float32 gets float64. In float32 a model may turn rounding into something: a unit of a ReLU that is
    next to zero, an expert that is chosen or not.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = Tensor.double if function is Tensor.float else function
        return function(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def checkpointed(adapter: Adapter, base: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """How far the gradient is from the one without checkpointing, of both kinds."""
    model = train(adapter.model)
    if not model.supports_gradient_checkpointing:
        return {"checkpointing": "none"}
    expected, found = gradient(adapter, inputs), {}
    for reentrant in (False, True):
        what = "reentrant" if reentrant else "non-reentrant"
        try:
            getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})
            found[what] = within(f"{what} checkpointing", distance(gradient(adapter, inputs), expected))
        except TargetError as error:
            found[what] = _clean(f"refused: {error}")
        except (Outcome, Late):
            raise
        except Exception as error:
            if why := alone(base, inputs, reentrant):
                found[what] = _clean(f"transformers: {why}")
            else:
                raise Outcome("wrong", f"{what} checkpointing: {type(error).__name__}: {error}") from error
        finally:
            with contextlib.suppress(ValueError):
                getattr(model, f"{CHECKPOINTING}_checkpointing_disable")()
            model.disable_input_require_grads()
    return found


def alone(base: PreTrainedModel, inputs: Mapping[str, Any], reentrant: bool | None) -> str:
    """Why a model, frozen or not, cannot be trained so without an adapter; nothing if it can.

    Args:
        reentrant: the kind of checkpointing; None for none.
    """
    for trains in (False, True):
        model = train(copy.deepcopy(base)).requires_grad_(trains)
        try:
            if reentrant is not None:
                getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})
            loss = loss_of(model(**inputs))
            if trains:
                loss.backward()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def stepped(adapter: Adapter, inputs: Mapping[str, Any], modes: tuple[bool, ...]) -> None:
    """Two steps of AdamW in each mode; θ_d moves."""
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for mode in modes:
        train(adapter.model, mode)
        before = adapter.theta_d.detach().clone()
        for _ in range(2):
            with unmoved(adapter.model):
                loss_of(adapter.model(**inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if torch.equal(before, adapter.theta_d):
            raise Outcome("dead", f"θ_d does not move in {'train' if mode else 'eval'} mode")
        if not torch.isfinite(adapter.theta_d).all():
            raise Outcome("wrong", "θ_d is not finite after two steps")


def saved(expected: dict[str, Any], adapter: Adapter, folder: Path) -> None:
    """The file, loaded into a fresh copy here; and what a new process needs to do so."""
    path = folder / f"{expected['class']}.safetensors"
    adapter.save(path)
    torch.save(expected, path.with_suffix(".pt"))
    if why := reloaded(path):
        raise Outcome("wrong", why)


def reloaded(path: Path) -> str:
    """What is wrong with a saved adapter on a model made anew; nothing if it gives the same bits."""
    expected = torch.load(path.with_suffix(".pt"), weights_only=False)
    fresh = build(expected["type"], expected["class"], expected["size"])
    unilora_transformers.load(fresh, path)
    outputs = run(fresh, expected["inputs"])
    if all(torch.equal(a, b) for a, b in zip(outputs, expected["outputs"], strict=True)):
        return ""
    return f"loaded: off by {distance(outputs, expected['outputs']):.2g}"


# ---- the sweep -----------------------------------------------------------------------------------------------------


def sweep(kind: str, names: list[str], folder: Path) -> list[dict[str, Any]]:
    """The rows of a type, each class in a process of its own, which begins as a copy of this one."""
    rows = []
    for name in names:
        path = folder / f"{name}.json"
        if (child := os.fork()) == 0:
            status = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.signal(signal.SIGALRM, _late)
                signal.alarm(SECONDS)
                path.write_text(json.dumps(row(kind, name, folder)), encoding="utf-8")
                status = 0
            finally:
                os._exit(status)
        os.waitpid(child, 0)
        died = {"type": kind, "class": name, "outcome": "not built", "why": "its process ended", "seconds": 0}
        rows.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else died)
    return rows


class Late(BaseException):
    """A class has taken its time; what catches every error of a model must not catch this."""


def _late(*_: Any) -> None:
    raise Late


def in_new_process(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Load the saved adapters of a batch in a new process; what goes wrong there goes into their rows."""
    done = subprocess.run(
        [sys.executable, __file__, "--reload", str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},  # also where PYTHONSAFEPATH is set
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.removeprefix("RELOADED ") for line in done.stdout.splitlines() if line.startswith("RELOADED ")]
    found = dict(json.loads(line) for line in lines)
    for each in (row for row in rows if row["outcome"].startswith("alive")):
        if why := found.get(each["class"], f"the process ended: {done.stderr.strip().splitlines()[-1:]}"):
            each |= {"outcome": "wrong", "why": _clean(f"in a new process: {why}")}


def reload(folder: Path) -> None:
    """Say of each saved adapter what is wrong with it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            why = reloaded(path)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        print("RELOADED", json.dumps([path.stem, why]), flush=True)
        gc.collect()


def results() -> dict[str, dict[str, Any]]:
    """Class → row, of the runs so far."""
    path = RESULTS / f"{NAME}.json"
    return {each["class"]: each for each in json.loads(path.read_text("utf-8"))["classes"]} if path.exists() else {}


def main() -> None:
    command = parser(__doc__)
    default = ["deit", "mistral"] if SMOKE else []
    command.add_argument("types", nargs="*", default=default, help="model types; by default all without a result yet")
    command.add_argument("--write-doc", action="store_true", help="write the table of docs/bases.md and stop")
    command.add_argument("--counts", action="store_true", help="print what the results say and stop")
    command.add_argument("--reload", type=Path, metavar="FOLDER", help="load what a sweep has saved, and stop")
    options = command.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if options.reload:
        reload(options.reload)
    elif options.write_doc:
        write_doc(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8")))
    elif options.counts:
        print(counts(list(results().values())))
    else:
        _sweep_all(options.types)
        if SMOKE:
            write_doc(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8")))


def _sweep_all(types: list[str]) -> None:
    listed, rows = classes(), results()
    chosen = types or [kind for kind, names in listed.items() if not set(names) <= set(rows)]
    kept = any(each["type"] not in chosen for each in rows.values())
    for number in range(0, len(chosen), BATCH):
        with tempfile.TemporaryDirectory() as folder:
            batch: list[dict[str, Any]] = []
            for kind in chosen[number : number + BATCH]:
                for each in sweep(kind, listed[kind], Path(folder)):
                    print(json.dumps(each, ensure_ascii=False), flush=True)
                    batch.append(each)
            in_new_process(Path(folder), batch)
        rows |= {each["class"]: each for each in batch}
        ordered = [rows[name] for names in listed.values() for name in names if name in rows]
        write(NAME, ({"note": NOTE} if kept else {}) | {"classes": ordered})
        done = min(number + BATCH, len(chosen))
        print(f"{done} of {len(chosen)} types; {counts(list(rows.values()))}", flush=True)


BATCH = 20
NOTE = "rows of several runs, so not all of one commit"


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Outcome → how many classes."""
    return dict(Counter(each["outcome"] for each in rows).most_common())


MARKS = "<!-- transformers_classes -->\n", "<!-- /transformers_classes -->\n"
PAGE = """`python benchmarks/transformers_classes.py` tries {classes} classes of {types} model types, with
transformers {transformers} and PyTorch {torch}: one class of each type (of a dozen types all), tiny, with
random weights.
Towers of a type that is there whole are left out.{note}
[Which types are not alive, or in part](../benchmarks/results/transformers_classes.md).

| outcome | classes | what it means |
|---|---|---|
{outcomes}

Of those alive, {checkpointed} can be checkpointed. The largest difference of θ_d's gradient from the one without is
{non_reentrant:.0e} non-reentrant and {reentrant:.0e} reentrant, relative to the largest number. {plain} have no
checkpointing in transformers, {theirs} fail there without an adapter, too{refused_reentrant}.
The gradient is that of a plain model with weights W + B·A up to {gradient:.0e} ({worst}), merged outputs are
the adapted ones up to {merged:.0e}.
"""
REST = """# Types of transformers that are not alive, or in part

`python benchmarks/transformers_classes.py` wrote this list, with transformers {transformers}, PyTorch {torch}.

| not, or in part | model types |
|---|---|
{reasons}
"""
MEANING = {
    "alive": "gradients as of a plain model in both modes and under both kinds of checkpointing, two steps, "
    "saved and loaded bit for bit here and in a new process, merged",
    "alive in part": "the same, and a warning names the part that no made-up inputs run; give `example=…`",
    "refused": "`attach` said which target and what to do",
    "unchecked": "attached with a warning: no made-up inputs run the model; give `example=…`",
    "not built": "no tiny model of it was made",
    "dead": "a target without a gradient, and no word of it",
    "wrong": "anything else",
}
KINDS = {
    "refused: no query and value under a known name": r"no query and value",
    "refused: a target that no gradient reaches on these inputs": r"no gradient reaches",
    "refused: a tied weight": r"is tied",
    "refused: a layer that is never called": r"never calls",
    "alive in part": r"do not run this part",
    "unchecked": r"does not run",
    "not built: it needs another package, or a backbone by name": r"ImportError|backbone is not set",
    "not built: too large or too slow": r"parameters at its|takes more|memory|process ended",
}
"""A kind of reason → how to know it."""


def write_doc(found: dict[str, Any]) -> None:
    """The part of docs/bases.md between its marks, and beside the results the types that are not alive."""
    rows, versions = found["classes"], {name: found["machine"][name] for name in ("transformers", "torch")}
    number = counts(rows)
    alive = [each for each in rows if each["outcome"].startswith("alive")]
    kinds = {kind: [each[kind] for each in alive if isinstance(each.get(kind), float)] for kind in KEPT}
    texts = [each.get("reentrant", "") for each in alive]
    refused = [each["type"] for each in alive if str(each.get("reentrant")).startswith("refused")]
    worst = max(alive, key=lambda each: each["eval gradient"])
    page = PAGE.format(
        **versions,
        note=f" ({found['note'].capitalize()}.)" if "note" in found else "",
        classes=len(rows),
        types=len({each["type"] for each in rows}),
        outcomes="\n".join(f"| {name} | {number.get(name, 0)} | {meaning} |" for name, meaning in MEANING.items()),
        checkpointed=len(kinds["reentrant"]),
        non_reentrant=max(kinds["non-reentrant"]),
        reentrant=max(kinds["reentrant"]),
        plain=sum(each.get("checkpointing") == "none" for each in alive),
        theirs=sum(str(text).startswith("transformers") for text in texts),
        refused_reentrant=f"; refused in reentrant mode, with the remedy: {', '.join(refused)}" if refused else "",
        gradient=max(kinds["eval gradient"] + kinds["train gradient"]),
        worst=worst["class"],
        merged=max(kinds["merged"]),
    )
    (RESULTS / f"{NAME}.md").write_text(REST.format(**versions, reasons="\n".join(_reasons(rows))), encoding="utf-8")
    path = DOCS / "bases.md"
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text(before + MARKS[0] + page + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


KEPT = ("eval gradient", "train gradient", "non-reentrant", "reentrant", "merged")


def _reasons(rows: list[dict[str, Any]]) -> Iterator[str]:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for each in rows:
        if each["outcome"] != "alive":
            kinds = (kind for kind, sign in KINDS.items() if re.search(sign, each["why"]))
            by_kind[next((kind for kind in kinds if kind.startswith(each["outcome"])), each["outcome"])].append(
                each["type"]
            )
    for kind, types in sorted(by_kind.items(), key=lambda item: item[0], reverse=True):
        yield f"| {kind} | {', '.join(dict.fromkeys(types))} |"


if __name__ == "__main__":
    main()
