"""Rules that say which serving engines take a plain LoRA folder: the limits of each, as its own sources state them.

They were read in November 2026: vLLM 0.33.0, SGLang 0.5.23, LoRAX (main), llama.cpp's converter (as llama-cpp-python
0.3.36 ships it). An engine that only logs a warning and then serves without a part of the adapter counts as one that
refuses it.
"""

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unilora_core.errors import AdapterFileError, CorruptFileError, SpecError, printable
from unilora_core.files import alone
from unilora_core.schema import read_json, shown, typed

__all__ = ["ENGINES", "Engine", "Lora", "check", "read_lora", "refuse", "served_rank", "serving", "verdicts"]

FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("base_model_name_or_path", "bias", "peft_type", "task_type"), str | None),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_qalora", "use_rslora"), bool | None),
    "alora_invocation_tokens": tuple[int, ...] | None,
    "alpha_pattern": dict[str, int | float] | None,
    "layer_replication": tuple[tuple[int, int], ...] | None,
    "lora_alpha": int | float | None,
    "modules_to_save": tuple[str, ...] | None,
    "r": int | None,
    "target_modules": str | tuple[str, ...] | None,
    "target_parameters": tuple[str, ...] | None,
}
"""The fields of ``adapter_config.json`` that are read, with their types; other fields of PEFT may hold anything."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank may have: MaxLoRARanks in vllm/config/lora.py."""

SGLANG_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
SGLANG_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
SGLANG_LAYERS = {"qkv_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj", "in_proj", "embed_tokens", "lm_head"}
SGLANG_LAYERS |= {"q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"}
"""The layers that have buffers: get_normalized_target_modules and get_hidden_dim in sglang/srt/lora/utils.py."""


A_AND_B = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA folder, as far as engines look at it.

    Attributes:
        config: the values of those `FIELDS` that ``adapter_config.json`` has.
        shapes: name → shape of each tensor in ``adapter_model.safetensors``.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer: layer → rows of its A."""
        return {_layer(name): shape[0] for name, shape in self.shapes.items() if name.endswith(A_AND_B[0])}

    @property
    def others(self) -> list[str]:
        """The names of the tensors that are neither A nor B of a layer."""
        return sorted(name for name in self.shapes if not re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", name))


Rule = Callable[[Lora], Iterator[str]]


@dataclass(frozen=True)
class Engine:
    """One serving engine: what it refuses, and how it is started.

    Attributes:
        version: the version of the sources that the rules come from.
        rules: each gives a sentence per reason to refuse: the field or tensor, the limit, and where the source is.
        command: how an adapter is served; `serving` fills it in.
    """

    version: str
    rules: tuple[Rule, ...]
    command: str


def check(folder: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Return for each engine why it would not serve this LoRA folder as it is; no reason where it would.

    Raises:
        FileNotFoundError, CorruptFileError: see `read_lora`.
    """
    return verdicts(read_lora(folder))


def verdicts(lora: Lora) -> dict[str, tuple[str, ...]]:
    """Return what `check` returns, for a folder that was read."""
    return {name: _reasons(engine, lora) for name, engine in ENGINES.items()}


def serving(engine: str, folder: str | os.PathLike, lora: Lora) -> str:
    """Return the command that serves a LoRA folder, quoted for a POSIX shell.

    Raises:
        SpecError: the engine is unknown.
    """
    name = lora.config.get("base_model_name_or_path") or "BASE"
    base, rank = _word(name), lora.config.get("r")
    config = f"--base {base}" if os.path.isdir(name) else f"--base-model-id {base}"
    return _engine(engine).command.format(folder=_word(os.fspath(folder)), base=base, config=config, rank=rank)


def refuse(lora: Lora, engine: str) -> None:
    """Raise an error for a folder that an engine would refuse.

    Raises:
        AdapterFileError: the engine would not serve it; the message has every reason.
        SpecError: the engine is unknown.
    """
    if reasons := _reasons(_engine(engine), lora):
        raise AdapterFileError(f"{engine} {_engine(engine).version} would not serve this export: {' '.join(reasons)}")


def served_rank(engine: str, rank: int) -> int:
    """Return the rank to export for an engine: for vLLM the next that it can be started with, else the same.

    Raises:
        SpecError: the engine is unknown.
    """
    allowed = VLLM_RANKS if engine == "vllm" else ()
    return next((each for each in allowed if each >= rank), rank) if _engine(engine) else rank


def read_lora(folder: str | os.PathLike) -> Lora:
    """Read what a LoRA folder holds, without the values of its tensors.

    Raises:
        FileNotFoundError: ``adapter_config.json`` or ``adapter_model.safetensors`` is missing.
        CorruptFileError: one of them cannot be read, or a field or a factor has another type or shape; the error names
            it.
    """
    config, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    with alone(folder, shared=True):
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; give a LoRA folder, as export_lora or PEFT writes it.")
        said, shapes = read_json(config), _shapes(weights)
    return Lora({key: typed(FIELDS[key], said[key], f"{config}: {key}") for key in FIELDS if key in said}, shapes)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error!s:.200}); fetch it again.") from error
    for name, shape in shapes.items():
        if name.endswith(A_AND_B) and len(shape) < 2:
            raise CorruptFileError(f"{path}: {_short(name)}: expected a matrix, got the shape {shape}.")
    return shapes


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise SpecError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}.")
    return ENGINES[name]


def _reasons(engine: Engine, lora: Lora) -> tuple[str, ...]:
    return tuple(reason for rule in (_is_lora, *engine.rules) for reason in rule(lora))


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def _some(names: list[str]) -> str:
    return ", ".join(map(_short, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(name: str) -> str:
    """Return a name from a file for a message: on one line, and without control characters."""
    return shown(name)[1:-1]


def _word(text: str) -> str:
    """Return the text as one word of a shell that is never read as an option."""
    text = printable(text).replace("\n", "\\n")
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


# ---- every engine ---------------------------------------------------------------------------------------------------


def _is_lora(lora: Lora) -> Iterator[str]:
    kind = lora.config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {shown(kind)}, expected 'LORA'; `unilora convert --to lora` writes one."
    for field in ("r", "lora_alpha"):
        if (value := lora.config.get(field)) is None or value <= 0:
            yield f"{field} is {shown(value)}, expected a number above 0."
    if not lora.config.get("target_modules"):
        yield "target_modules is missing."
    if not lora.ranks:
        yield "there is no tensor *.lora_A.weight in adapter_model.safetensors."
    for field in ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora"):
        if lora.config.get(field):
            yield f"{field} is set; engines add B·A to a layer's output and nothing else."
    if lora.config.get("target_parameters"):
        yield (
            "target_parameters is set: the factors of experts as PEFT packs them. vLLM reads these for some models, "
            "which was not tried here; merge the adapter into a full checkpoint instead."
        )
    if kernels := [_layer(name) for name, shape in lora.shapes.items() if "lora_A" in name and len(shape) > 2]:
        yield (
            f"{_some(kernels)}: the factors of a convolution, which none of the engines adapts; merge the adapter into "
            "a full checkpoint instead."
        )
    if (bias := lora.config.get("bias", "none")) != "none":
        yield f"bias is {shown(bias)}, expected 'none'."


def _no_other_tensors(what: str) -> Rule:
    def rule(lora: Lora) -> Iterator[str]:
        if others := lora.others:
            saved = lora.config.get("modules_to_save")
            yield (
                f"{_some(others)} (modules_to_save = {shown(saved and list(saved))}): {what} "
                "Merge the adapter into a full checkpoint instead."
            )

    return rule


def _one_rank(what: str) -> Rule:
    def rule(lora: Lora) -> Iterator[str]:
        ranks, r = lora.ranks, lora.config.get("r")
        odd = sorted(layer for layer, rank in ranks.items() if rank != r)
        if odd or lora.config.get("alpha_pattern"):
            where = f"{_short(odd[0])} has rank {ranks[odd[0]]} and r is {shown(r)}" if odd else "alpha_pattern is set"
            yield f"{where}; {what} Export it again: export_lora gives every layer the same rank."

    return rule


def _no_rslora(lora: Lora) -> Iterator[str]:
    if lora.config.get("use_rslora"):
        yield "use_rslora is set; the scaling is taken as lora_alpha / r."


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _vllm_rank(lora: Lora) -> Iterator[str]:
    """Refuse ranks above the largest: PEFTHelper.validate_legal in vllm/lora/peft_helper.py."""
    largest = max([lora.config.get("r") or 0, *lora.ranks.values()])
    if largest > VLLM_RANKS[-1]:
        yield f"the rank is {shown(largest)}, the largest --max-lora-rank is {VLLM_RANKS[-1]}."


def _vllm_names(lora: Lora) -> Iterator[str]:
    """Refuse other tensors: parse_fine_tuned_lora_name in vllm/lora/utils.py; PEFTHelper._validate_features."""
    head = r"\.(score|classifier)\.(weight|bias)$"
    if others := [name for name in lora.others if not re.search(head, name)]:
        yield (
            f"{_some(others)}: an unsupported LoRA weight; of modules_to_save it takes one layer named score or "
            "classifier. Merge the adapter into a full checkpoint instead."
        )


def _vllm_conv1d(lora: Lora) -> Iterator[str]:
    """Refuse GPT-2: GPT2LMHeadModel in vllm/model_executor/models/gpt2.py has no SupportsLoRA."""
    if lora.config.get("fan_in_fan_out"):
        yield "fan_in_fan_out is set: its GPT-2 takes no LoRA. Merge the adapter into a full checkpoint instead."


# ---- SGLang ---------------------------------------------------------------------------------------------------------


def _sglang_targets(lora: Lora) -> Iterator[str]:
    """Refuse unknown layers: get_normalized_target_modules and get_hidden_dim in sglang/srt/lora/utils.py."""
    targets = lora.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield f"target_modules is {shown(targets)}, expected a list of names or 'all-linear'."
    ends = {layer.rsplit(".", 1)[-1] for layer in lora.ranks}
    if unknown := sorted(ends - SGLANG_FUSED.keys() - SGLANG_LAYERS):
        yield f"it has no buffers for layers named {_some(unknown)}, only for {sorted(SGLANG_LAYERS)}."


def _sglang_layers(lora: Lora) -> Iterator[str]:
    """Refuse layers without a number: _process_weight in sglang/srt/lora/lora.py takes the number after "layers."."""
    lost = [n for n in lora.ranks if not re.search(r"layers\.\d+\.", n) and not re.search("embed_tokens|lm_head", n)]
    if lost:
        yield f"{_some(sorted(lost))}: dropped without a word, as it is in no numbered layer."


def _sglang_fused(lora: Lora) -> Iterator[str]:
    """Refuse parts of fused layers: normalize_qkv_proj and normalize_gate_up_proj in sglang/srt/lora/lora.py."""
    blocks: dict[str, set[str]] = defaultdict(set)
    for layer in lora.ranks:
        parent, _, end = layer.rpartition(".")
        blocks[parent].add(end)
    for parent, ends in sorted(blocks.items()):
        qkv = ends & {"q_proj", "k_proj", "v_proj"}
        if qkv and not {"q_proj", "v_proj"} <= qkv:
            yield f"{_short(parent)}: {_some(sorted(qkv))} alone; it joins q, k and v and expects q_proj and v_proj."
            return
        if "up_proj" in ends and "gate_proj" not in ends:
            yield f"{_short(parent)}: up_proj without gate_proj, with which it would be joined."
            return


# ---- LoRAX ----------------------------------------------------------------------------------------------------------


def _lorax_every_layer(lora: Lora) -> Iterator[str]:
    """Refuse a kind of layer that is missing anywhere: LoraWeights.load in lorax_server/adapters/lora.py drops it."""
    layers: dict[str, set[int]] = defaultdict(set)
    for layer in lora.ranks:
        if match := re.match(r"(.*?)\.([0-9]{1,9})\.(.*)", layer):
            layers[f"{match[1]}.*.{match[3]}"].add(int(match[2]))
    last = max((max(found) for found in layers.values()), default=0)
    for kind, found in sorted(layers.items()):
        missing = next((i for i, number in enumerate(sorted(found)) if i != number), len(found))
        if missing <= last:
            yield f"{_short(kind)}: not in layer {missing}; it serves a kind of layer only where every layer has it."
            return


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def _llama_cpp_conv1d(lora: Lora) -> Iterator[str]:
    """Refuse GPT-2: modify_tensors in conversion/gpt2.py transposes the weight, and B·A with it."""
    if lora.config.get("fan_in_fan_out"):
        yield (
            "fan_in_fan_out is set: its converter turns GPT-2's weights round, and B·A with them. Merge the adapter "
            "into a full checkpoint instead."
        )


def _llama_cpp_base(lora: Lora) -> Iterator[str]:
    if not lora.config.get("base_model_name_or_path"):
        yield "base_model_name_or_path is empty; give the base model's name when you export."


def _llama_cpp_tied_head(lora: Lora) -> Iterator[str]:
    """Refuse an adapted head that is tied: modify_tensors in convert_lora_to_gguf.py, and llama.cpp issue 9065."""
    if not (base := lora.config.get("base_model_name_or_path")) or not any("lm_head" in layer for layer in lora.ranks):
        return
    if not os.path.isfile(path := os.path.join(base, "config.json")):
        return
    if typed(bool | None, read_json(path).get("tie_word_embeddings"), f"{path}: tie_word_embeddings"):
        yield "lm_head is adapted, but tied to the embeddings in the base model; the converter stops there."


ENGINES = {
    "vllm": Engine(
        "0.33.0",
        (_vllm_rank, _vllm_names, _vllm_conv1d),
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={folder}",
    ),
    "sglang": Engine(
        "0.5.23",
        (
            _one_rank("its buffers expect r rows in every layer (sglang/srt/lora/mem_pool.py)."),
            _no_rslora,
            _sglang_targets,
            _sglang_layers,
            _sglang_fused,
            _no_other_tensors("dropped without a word (_process_weight in sglang/srt/lora/lora.py)."),
        ),
        "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={folder}",
    ),
    "lorax": Engine(
        "main",
        (
            _one_rank("lora_alpha / r scales every layer, and the layers of a kind are stacked."),
            _lorax_every_layer,
            _no_other_tensors("ignored."),
        ),
        "lorax-launcher --model-id {base} --adapter-source local --adapter-id {folder}",
    ),
    "llama.cpp": Engine(
        "convert_lora_to_gguf.py, 2026-10",
        (
            _one_rank("a GGUF adapter has one alpha, which is divided by each layer's rank."),
            _no_rslora,
            _no_other_tensors("the converter stops at a tensor that is neither A nor B."),
            _llama_cpp_conv1d,
            _llama_cpp_base,
            _llama_cpp_tied_head,
        ),
        "python convert_lora_to_gguf.py {folder} {config} --outfile lora.gguf, then llama-server -m … --lora lora.gguf",
    ),
}
"""The engines by the names that ``engine=`` and ``unilora check --engine`` take."""
