"""Every kind of base: attach, ten steps, save, reload in a new process; PEFT's UniLora beside it on 4-bit bases.

    python benchmarks/bases.py             # some minutes on two cores, no GPU, no network

Tiny random models of eight architectures are saved, loaded again in each dtype or quantisation that runs on a CPU, and
adapted at the default targets (a mixture: its experts, too). Writes ``benchmarks/results/bases.json`` and ``bases.md``.
"""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import common  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import unilora_transformers  # noqa: E402

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 16}),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "RoBERTa": ("RobertaForSequenceClassification", SMALL),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "T5": ("T5ForConditionalGeneration", {"vocab_size": 256} | T5),
    "Mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
}
PLAIN = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = [*PLAIN, "nf4", "bnb int8", "torchao int8", "torchao int4", "hqq int4"]
EXPERTS = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]
QUANTISERS = ("bitsandbytes", "torchao", "hqq")
STEPS = 2 if common.SMOKE else 10
if common.SMOKE:
    MODELS = {name: MODELS[name] for name in ("Llama", "Mixtral")}


def quantisation(dtype: str, cls: str) -> object:
    """What `from_pretrained` takes; nf4 with double quantisation. A classifier, which trains, is left out."""
    skip = ["classifier"] if cls.endswith("Classification") else None
    if dtype == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skip,
        )
    if dtype == "bnb int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return transformers.TorchAoConfig(
        Int8WeightOnlyConfig() if dtype == "torchao int8" else int4, modules_to_not_convert=skip
    )


def load(folder: Path, cls: str, dtype: str) -> transformers.PreTrainedModel:
    """A saved model, in a plain dtype or quantised (what is not quantised is bfloat16 then)."""
    model_class = getattr(transformers, cls)
    if dtype in PLAIN:
        return model_class.from_pretrained(folder, dtype=PLAIN[dtype]).eval()
    if dtype == "hqq int4":
        return with_hqq(model_class.from_pretrained(folder, dtype=torch.float32)).eval()
    config = quantisation(dtype, cls)
    return model_class.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    ).eval()


def with_hqq(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Transformers 5 does not quantise with HQQ yet, so the layers of the default targets are replaced by hand."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32)
    found = unilora_transformers.attach(model, targets_of(model), rank=4)
    names = [target.module for target in found.targets]
    found.detach()
    for name in dict.fromkeys(names):
        layer = model.get_submodule(name)
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))
    return model


def targets_of(model: transformers.PreTrainedModel) -> list[str] | None:
    return EXPERTS if model.config.model_type == "mixtral" else None


def batch_of(model: transformers.PreTrainedModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels, the same each time."""
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return inputs, torch.arange(4) % 2 if hasattr(model, "classifier") else ids


def steps(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> list[float]:
    """The losses of ten steps on one batch."""
    losses, (inputs, labels) = [], batch_of(model)
    for _ in range(STEPS):
        loss = model(**inputs, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


def adapt(folder: Path, cls: str, dtype: str, case: Path) -> dict[str, object]:
    """Attach, ten steps, save."""
    model = load(folder, cls, dtype)
    start = time.perf_counter()
    adapter = unilora_transformers.attach(model, targets_of(model), rank=4)
    attach_s = time.perf_counter() - start
    before, largest = adapter.theta_d.detach().clone(), []
    adapter.theta_d.register_hook(lambda grad: largest.append(grad.abs().max().item()))
    losses = steps(model, torch.optim.Adam(adapter.parameter_groups(2e-3)))
    with torch.no_grad():
        logits = model(**batch_of(model)[0]).logits.float().contiguous()
    case.mkdir(parents=True)
    adapter.save(case / "adapter.safetensors")
    save_file({"logits": logits}, case / "logits.safetensors")
    (case / "case.json").write_text(json.dumps({"folder": str(folder), "cls": cls, "dtype": dtype}))
    kind = type(model.get_submodule(adapter.targets[0].module)).__name__
    return {
        "layer": kind,
        "targets": len(adapter.targets),
        "d": adapter.spec.d,
        "attach_s": attach_s,
        "losses": losses,
        "largest_gradient": max(largest),
        "moved": (adapter.theta_d != before).float().mean().item(),
    }


def with_peft(folder: Path, cls: str, dtype: str) -> dict[str, object]:
    """PEFT's UniLora on the same base, d as ours: the largest gradient of its θ_d in ten steps."""
    model = load(folder, cls, dtype)
    adapter = unilora_transformers.attach(model, rank=4)
    modules, d = list(dict.fromkeys(target.module for target in adapter.targets)), adapter.spec.d
    heads = list(adapter.modules_to_save)
    adapter.detach()
    model = load(folder, cls, dtype)
    config = peft.UniLoraConfig(r=4, theta_d_length=d, target_modules=modules, modules_to_save=heads or None)
    model = peft.get_peft_model(model, config)
    theta = next(p for name, p in model.named_parameters() if "theta_d" in name)
    before, largest = theta.detach().clone(), []
    theta.register_hook(lambda grad: largest.append(grad.abs().max().item()))
    losses = steps(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3))
    return {"losses": losses, "largest_gradient": max(largest), "moved": (theta != before).float().mean().item()}


def reload(cases: Path) -> None:
    """Print the largest difference of the logits of each case in a folder, by name. Runs in a new process."""
    found = {}
    for case in sorted(cases.glob("*/case.json")):
        described = json.loads(case.read_text())
        model = load(Path(described["folder"]), described["cls"], described["dtype"])
        unilora_transformers.load(model, case.parent / "adapter.safetensors")
        with torch.no_grad():
            logits = model(**batch_of(model)[0]).logits.float()
        found[case.parent.name] = (logits - load_file(case.parent / "logits.safetensors")["logits"]).abs().max().item()
    print(json.dumps(found))


def table(results: dict) -> str:
    """The matrix as Markdown: first and last loss, and the largest difference of a logit after reloading."""
    lines = ["| | " + " | ".join(DTYPES) + " |", "|" + "---|" * (len(DTYPES) + 1)]
    for name in MODELS:
        cells = []
        for dtype in DTYPES:
            row = results["unilora"][name].get(dtype)
            cells.append(
                f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f}, {row['reloaded']:.0e}" if "losses" in row else "–"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| nf4 | θ_d's largest gradient | θ_d that moved | loss |", "|---|---|---|---|"]
    for name, row in results["peft_nf4"].items():
        ours = results["unilora"][name]["nf4"]
        shown = ", ".join(f"{loss:.3f}" for loss in (row["losses"][0], row["losses"][-1]))
        lines.append(f"| {name}: PEFT | {row['largest_gradient']:g} | {row['moved']:.0%} | {shown} |")
        shown = ", ".join(f"{loss:.3f}" for loss in (ours["losses"][0], ours["losses"][-1]))
        lines.append(f"| {name}: unilora | {ours['largest_gradient']:.2g} | {ours['moved']:.0%} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--reload", type=Path, metavar="FOLDER", help="load what a run has saved, in this process")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.reload:
        reload(arguments.reload)
        return
    versions = {name: importlib.metadata.version(name) for name in QUANTISERS if importlib.util.find_spec(name)}
    results: dict = {"versions": versions, "unilora": {name: {} for name in MODELS}, "peft_nf4": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (cls, config) in MODELS.items():
            folder = Path(scratch, "models", name)
            torch.manual_seed(0)
            model_class = getattr(transformers, cls)
            model_class(model_class.config_class(**config)).save_pretrained(folder)
            for dtype in DTYPES:
                reason = why_not(cls, dtype)
                case = Path(scratch, "cases", f"{name}, {dtype}")
                row = {"skipped": reason} if reason else adapt(folder, cls, dtype, case)
                results["unilora"][name][dtype] = row
                print(name, dtype, row.get("losses", [None])[-1], flush=True)
            if name != "Mixtral":
                results["peft_nf4"][name] = with_peft(folder, cls, "nf4")
        out = common.again(__file__, "--reload", str(Path(scratch, "cases")))
        for case, difference in json.loads(out.splitlines()[-1]).items():
            name, dtype = case.split(", ")
            results["unilora"][name][dtype]["reloaded"] = difference
    common.write("bases", results)
    (common.RESULTS / "bases.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def why_not(cls: str, dtype: str) -> str | None:
    """Why a case is left out."""
    if dtype == "float16" and cls.endswith("Classification"):
        return "the head trains in full, and Adam's state underflows in float16: use mixed precision"
    if dtype == "hqq int4" and cls.startswith("GPT2"):
        return "HQQ quantises nn.Linear only"
    if dtype == "hqq int4" and importlib.util.find_spec("hqq") is None:
        return "hqq is not installed"
    return None


if __name__ == "__main__":
    main()
