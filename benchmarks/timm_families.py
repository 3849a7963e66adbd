"""Every family of timm: what is adapted, and how; PEFT's LoRA and UniLora on the same layers beside it.

    python benchmarks/timm_families.py                # all, about ten minutes on one core
    python benchmarks/timm_families.py beit eva       # some modules or members anew; the others' results are kept
    python benchmarks/timm_families.py --write-doc    # docs/timm-models.md from the results

One small member of each module of `timm.list_modules` that has attention or mixes by MLPs, and of each kind of
attention in it; and some convolutional networks (the other modules are built of the same layers); shrunken where the
class allows it, random weights, and no zeros or tiny scales among them, through which no gradient would pass. For the
default targets, all linear layers, and all convolutions, each: attach, one AdamW step, save, load into a fresh copy
(logits must be equal bit for bit), and the same logits and the same gradient of θ_d as a plain model whose weights are
W + B·A.
"""

import copy
import json
import re
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import DOCS, RESULTS, SMOKE, parser, write
from peft import LoraConfig, UniLoraConfig, get_peft_model
from torch import Tensor, nn

import unilora_timm
from unilora_core import TargetError
from unilora_timm.attach import example_of
from unilora_torch.adapter import Adapter
from unilora_torch.targets import Target, is_conv, is_linear, weight_name

VIT = {"img_size": 64, "depth": 2}
SMALL = {**VIT, "embed_dim": 96, "num_heads": 3}
CHAOTIC = 1e-4
"""A random model whose gradient differs by more in float32 is compared in float64, too: some pass rounding errors on,
a thousandfold larger.
"""
MEMBERS: dict[str, dict] = {
    # transformers
    "beit_base_patch16_224": SMALL,
    "beitv2_base_patch16_224": SMALL,
    "cait_xxs24_224": VIT,
    "coat_tiny": {"img_size": 96},
    "coat_lite_tiny": {"img_size": 96},
    "convit_tiny": VIT,
    "crossvit_tiny_240": {},
    "csatv2": {"image": 256},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8), "image": 96},
    "deepseek_vit_412m": {"depth": 1, "img_size": 56, "embed_dim": 96, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": SMALL,
    "eva02_tiny_patch14_224": {**SMALL, "img_size": 56},
    "eva02_base_patch14_224": {**SMALL, "img_size": 56},
    "eva_giant_patch14_224": {**SMALL, "img_size": 56},
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_plus_patch16_dinov3": SMALL,
    "vit_base_patch16_rope_mixed_224": SMALL,
    "vit_pe_core_tiny_patch16_384": SMALL,
    "vit_pe_spatial_tiny_patch16_512": SMALL,
    "focalnet_tiny_srf": {"image": 96},
    "gcvit_xxtiny": {"img_size": 64, "image": 64},
    "gemma4_vit_167m": {"depth": 2, "image": 96},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 32},
    "hieradet_small": {"stages": (1, 1, 2, 1), "embed_dim": 32, "global_att_blocks": (3,)},
    "levit_128s": {},
    "levit_conv_128s": {},
    "mvitv2_tiny": {"img_size": 64, "image": 64},
    "mvitv2_small_cls": {"img_size": 64, "image": 64},
    "naflexvit_base_patch16_gap": {"embed_dim": 96, "depth": 2, "num_heads": 3},
    "naflexvit_base_patch16_map": {"embed_dim": 96, "depth": 2, "num_heads": 3},
    "nest_tiny": {},
    "pit_ti_224": {},
    "pvt_v2_b0": {"image": 96},
    "pvt_v2_b2_li": {"depths": (1, 1, 1, 1)},
    "qwen3_vit_88m": {"depth": 2, "image": 128},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "swinv2_cr_tiny_224": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "tiny_vit_5m_224": {},
    "tnt_s_patch16_224": {"depth": 2},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1), "image": 96},
    "twins_svt_small": {"depths": (1, 1, 1, 1), "image": 96},
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_small_patch16_18x2_224": SMALL,
    "vit_so150m2_patch16_reg1_gap_256": SMALL,
    "vit_base_patch16_xp_224": SMALL,
    "vit_dpwee_patch16_reg1_gap_256": VIT,
    "vit_dwee_patch16_reg1_gap_256": VIT,
    "vit_dlittle_patch16_reg1_gap_256": VIT,
    "aimv2_large_patch14_224": {**SMALL, "img_size": 56},
    "vit_relpos_small_patch16_224": SMALL,
    "vit_srelpos_small_patch16_224": SMALL,
    "samvit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3, "global_attn_indexes": (1,)},
    "volo_d1_224": {"img_size": 64, "image": 64},
    "xcit_nano_12_p16_224": {"depth": 2},
    # hybrids
    "botnet26t_256": {"img_size": 128, "image": 128},
    "eca_halonext26ts": {"image": 256},
    "lambda_resnet26t": {"image": 128},
    "resnet50_clip": {"img_size": 64, "image": 64},
    "cpubone_nano": {"image": 96},
    "edgenext_xx_small": {"image": 96},
    "efficientformer_l1": {},
    "efficientformerv2_s0": {},
    "efficientvim_m1": {"image": 96},
    "efficientvit_b0": {"image": 96},
    "efficientvit_m0": {},
    "fastvit_sa12": {"image": 96},
    "iformer_t": {"image": 96},
    "lowformer_b0": {"image": 96},
    "maxvit_pico_rw_256": {},
    "test_maxvit": {},
    "test_coatnet": {},
    "maxxvit_rmlp_nano_rw_256": {},
    "poolformer_s12": {"image": 96},
    "caformer_s18": {"image": 96},
    "mobilenetv4_hybrid_medium": {"image": 96},
    "mobilenetv5_base": {"image": 128},
    "mobilevit_xxs": {"image": 128},
    "mobilevitv2_050": {"image": 128},
    "nextvit_small": {"depths": (1, 1, 5, 1), "image": 96},
    "shvit_s1": {"image": 96},
    "swiftformer_xs": {"image": 96},
    "visformer_tiny": {"img_size": 64, "image": 64},
    "vit_tiny_r_s16_p8_224": {"depth": 2},
    "vitamin_small_224": {"depth": 2},
    # MLPs and other mixers
    "mambaout_femto": {"image": 96},
    "mixer_s32_224": {},
    "gmlp_ti16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    # convolutions
    "test_byobnet": {"image": 96},
    "test_convnext": {"image": 96},
    "test_efficientnet": {"image": 96},
    "test_nfnet": {"image": 96},
    "test_resnet": {"image": 96},
    "convmixer_768_32": {"image": 64},
    "inception_next_atto": {"image": 96},
    "mobilenetv3_small_050": {"image": 96},
    "regnetx_002": {"image": 96},
    "repvit_m0_9": {"image": 96},
    "starnet_s1": {"image": 96},
}
SELECTIONS = {"default": None, "all-linear": "all-linear", "conv": "conv"}


def build(name: str) -> nn.Module:
    """A member with random weights, every one of which lets gradients through."""
    torch.manual_seed(0)
    changes = {key: value for key, value in MEMBERS[name].items() if key != "image"}
    model = timm.create_model(name, num_classes=5, **changes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.squeeze().dim() > 1:
                if parameter.abs().max() < 1e-3:
                    parameter.normal_(std=0.1)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.abs().max() < 0.1:  # layer scales, norms that start at zero
                parameter.uniform_(0.5, 1)
    return model


def images(name: str, model: nn.Module) -> Tensor:
    """Two images of the size that the model takes, or of the size that `MEMBERS` says."""
    channels, *size = example_of(model).shape[1:]
    if smaller := MEMBERS[name].get("image"):
        size = [smaller, smaller]
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


# ---- one selection -------------------------------------------------------------------------------------------------


def has(base: nn.Module, targets: str | None) -> bool:
    """Whether a model has what a word means."""
    if targets is None:
        return True
    kind = is_linear if targets == "all-linear" else is_conv
    heads = tuple(f"{head}." for head in unilora_timm.classifier(base))
    return any(kind(module) and not f"{name}.".startswith(heads) for name, module in base.named_modules())


def tried(base: nn.Module, x: Tensor, targets: str | None) -> dict:
    """What came of adapting a copy of ``base``: counts, the largest errors, or why it is refused."""
    model = copy.deepcopy(base)
    try:
        adapter = unilora_timm.attach(model, targets, example=x)
    except TargetError as error:
        return {"refused": str(error)}
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=1e-2, head_rate=1e-4))
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    before = adapter.theta_d.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(before, adapter.theta_d)
    with torch.no_grad():
        adapter.theta_d.add_(torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    fresh = copy.deepcopy(base)
    logits_error, gradient_error = errors(model, fresh, x)
    in_double = {}
    if gradient_error > CHAOTIC:
        double = (copy.deepcopy(each).double() for each in (model, fresh))
        in_double = {"gradient in float64": errors(*double, x.double())[1]}
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "a.safetensors")
        unilora_timm.load(fresh, Path(folder) / "a.safetensors")
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(fresh(x), logits), "the loaded adapter gives other logits"
        adapter.merge()
        merged, plain = model(x), base(x)
    modes = [how(target) for target in adapter.targets]
    return {
        "targets": len(modes),
        **{mode: modes.count(mode) for mode in ("beside", "in the weight", "in the caller's weight")},
        "names": sorted({target.name for target in adapter.targets}) if targets is None else [],
        "layers": sorted({weight_name(target).removesuffix(".weight") for target in adapter.targets})
        if targets is None
        else [],
        "moved": distance(logits, plain),
        "logits": logits_error,
        "gradient": gradient_error,
        **in_double,
        "merged": distance(merged, logits),
    }


def errors(adapted: nn.Module, base: nn.Module, x: Tensor) -> tuple[float, float]:
    """How far the logits, and the gradient of θ_d, are from those of a plain model whose weights are W + B·A."""
    adapter = adapted.unilora
    logits, grad = outputs(adapter, adapted, x)
    dense_logits, dense_grad = dense(adapter, base, adapted, x)
    return distance(logits, dense_logits), distance(grad, dense_grad)


def how(target: Target) -> str:
    """Where B·A acts."""
    if target.parameter is None:
        return "beside"
    return "in the weight" if target.parameter == "weight" else "in the caller's weight"


def outputs(adapter: Adapter, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of θ_d."""
    logits = model(x)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    grad, adapter.theta_d.grad = adapter.theta_d.grad, None
    return logits.detach(), grad


def dense(adapter: Adapter, base: nn.Module, adapted: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a plain model whose weights are W + B·A, and whose classifier is the trained one."""
    replaced = {name: dict(adapted.named_parameters())[name] for name in adapter.saved_parameters()}
    factors = adapter.factors()
    for target in adapter.targets:
        name = weight_name(target)
        weight = replaced.get(name, base.get_parameter(name))
        update = (factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]).view(-1, *weight.shape[1:])
        stop = target.first_row + target.out_features
        replaced[name] = torch.cat(
            [weight[: target.first_row], weight[target.first_row : stop] + update, weight[stop:]]
        )
    logits = torch.func.functional_call(base, replaced, (x,))
    loss = F.cross_entropy(logits, torch.tensor([0, 1]))
    return logits.detach(), torch.autograd.grad(loss, adapter.theta_d)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def with_peft(base: nn.Module, x: Tensor, layers: list[str], kind: str) -> dict:
    """How many of these layers PEFT's adapter never reaches, or the error that it raises."""
    options = {
        "r": 4,
        "target_modules": "|".join(re.escape(name) for name in layers),
        "modules_to_save": [
            name  # PEFT takes no lists of modules
            for head in unilora_timm.classifier(base)
            for name, module in base.get_submodule(head).named_modules(prefix=head)
            if isinstance(module, nn.Linear)
        ],
    }
    config = LoraConfig(**options) if kind == "lora" else UniLoraConfig(theta_d_length=256, **options)
    called: set[str] = set()
    try:
        model = get_peft_model(copy.deepcopy(base), config)
        for name in layers:
            wrapper = model.get_submodule(f"base_model.model.{name}")
            wrapper.register_forward_hook(lambda _module, _args, _output, name=name: called.add(name))
        model(x).square().sum().backward()
    except Exception as error:  # whatever it is, it goes into the table
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    factors = [parameter for name, parameter in model.named_parameters() if "lora_B" in name or "theta_d" in name]
    silent = sum(factor.grad is None or not factor.grad.any() for factor in factors)
    return {"layers": len(layers), "dead": len(set(layers) - called), "tensors without gradient": silent}


# ---- the sweep -----------------------------------------------------------------------------------------------------


def module_of(name: str) -> str:
    """The module of timm that defines a member."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def row(name: str) -> dict:
    """One line of the table."""
    start = time.perf_counter()
    base = build(name)
    x = images(name, base)
    with torch.no_grad():
        base(x)
    ours = {selection: tried(base, x, targets) for selection, targets in SELECTIONS.items() if has(base, targets)}
    layers = ours["default"].get("layers", [])
    peft = {kind: with_peft(base, x, layers, kind) for kind in ("lora", "unilora")} if layers else {}
    return {
        "module": module_of(name),
        "member": name,
        "changed": MEMBERS[name],
        "image": list(x.shape[1:]),
        **{selection: ours.get(selection) for selection in SELECTIONS},
        "peft": peft,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    command = parser(__doc__)
    default = ["vit_tiny_patch16_224", "test_byobnet"] if SMOKE else []
    command.add_argument("modules", nargs="*", default=default, help="modules or members of timm; by default all")
    command.add_argument("--write-doc", action="store_true", help="write docs/timm-models.md from the results and stop")
    options = command.parse_args()
    if options.write_doc:
        write_doc(json.loads((RESULTS / "timm_families.json").read_text(encoding="utf-8")))
        return
    warnings.filterwarnings("ignore")
    path = RESULTS / "timm_families.json"
    rows = {row["member"]: row for row in json.loads(path.read_text("utf-8"))["families"]} if path.exists() else {}
    for name in MEMBERS:
        if not options.modules or {name, module_of(name)} & set(options.modules):
            rows[name] = row(name)
            print(json.dumps(rows[name]), flush=True)
            write("timm_families", {"families": [rows[member] for member in MEMBERS if member in rows]})
    if SMOKE:
        write_doc(json.loads(path.read_text(encoding="utf-8")))


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE = """# What is adapted in the models of timm

`unilora_timm.attach(model, targets)` knows the layers of every family by the same words. {adapted} of {members}
models are adapted by default; none is silently dead, as `attach` checks every target.

## The words of `targets`

* `"q"`, `"k"`, `"v"`: layers of that name, or their blocks of a fused `qkv`, `kv`, `qk`, `qkv_proj`, `in_proj`, or of
  `in_proj_weight` of `nn.MultiheadAttention`. Some families keep each head's q, k and v together (MaxViT, CoAtNet,
  LeViT, TinyViT, EfficientFormer, HaloNet, EfficientViT of MIT): they have no such blocks, and `"qkv"` instead.
* `"qkv"`, `"proj"`: the fused layer as a whole, and the output projection of attention.
* `"fc1"`, `"fc2"`, `"mlp"`: the layers of the MLPs, also where they are 1×1 convolutions; not squeeze-and-excitation.
* `"patch_embed"`: the layer that makes patches of the image, or the stem. `"conv"`: every convolution.
  `"all-linear"`: every linear layer. None of them has the classifier, which trains in full.

Without `targets`, q and v are adapted; where a model has none outside of its pooling, `"qkv"`, else `"mlp"`, else all
layers. Attention that pools the features has the same words.

## What `attach` runs

`attach` runs the model on one image: in training mode, in evaluation mode, and once for the gradients. It puts modes,
buffers and random numbers back. The image has the size of the model's `pretrained_cfg` or `img_size`; a model that
needs another takes it as `example=`. This finds a layer whose weight is read without a call, and a target that no
gradient reaches. Some families with random weights have such targets, behind a norm or a layer scale of zeros: load
the weights before `attach`. `load` runs nothing: the file says where each update belongs.

## Every family

`python benchmarks/timm_families.py --write-doc` wrote this page from `benchmarks/results/timm_families.json` (timm
{timm}, PyTorch {torch}, PEFT {peft}). The table has one small member of each module of timm that has attention or
mixes by MLPs, of each kind of attention, and some convolutional networks. The models are shrunken, with random
weights, so the names are those of the full models, but not the counts.

Each selection was attached, trained one step, saved, and loaded into a fresh copy: the logits were equal bit for bit.
Logits and the gradient of θ_d were those of a plain model whose weights are W + B·A: the largest differences,
relative to the largest value, are {logits:.0e} and {gradient:.0e} over all rows. ({chaotic} selections of random
members whose gradient is chaotic in float32 are compared in float64: {members_of_chaos}.)

* **by default**: the first of the adapted names, without the block's number, and how many targets there are;
* **linear**, **conv**: targets of `"all-linear"` and of `"conv"`;
* **how**: *beside* a layer that the model calls; *in its weight*, for convolutions with groups or with standardised
  kernels; *in its caller*, where the model reads the weight of a layer that it does not call;
* **PEFT LoRA**, **PEFT UniLora**: how many of the same layers, whole, PEFT's adapter never reaches; *ok*: it reaches
  all.

| module | member | by default | linear | conv | how | PEFT LoRA | PEFT UniLora |
|---|---|---|---|---|---|---|---|
{table}

## Refused selections

{refused} are refused:

{reasons}
"""

HOW = {"beside": "beside", "in the weight": "in its weight", "in the caller's weight": "in its caller"}


def write_doc(results: dict) -> None:
    """docs/timm-models.md."""
    rows = results["families"]
    tried = [(row, name, row[name]) for row in rows for name in SELECTIONS if row[name]]
    refused = [(row["member"], name, found["refused"]) for row, name, found in tried if "refused" in found]
    measured = [found for *_, found in tried if "refused" not in found]
    double = "gradient in float64"
    chaotic = [row["member"] for row, _, found in tried if double in found]
    page = PAGE.format(
        **{name: results["machine"][name] for name in ("timm", "torch", "peft")},
        logits=max(found["logits"] for found in measured),
        gradient=max(found.get(double, found["gradient"]) for found in measured),
        chaotic=len(chaotic),
        members_of_chaos=", ".join(f"`{member}`" for member in dict.fromkeys(chaotic)),
        members=len(rows),
        adapted=sum("refused" not in row["default"] for row in rows),
        refused=f"{len(refused)} selections",
        table="\n".join(map(line, rows)),
        reasons="\n".join(f"* `{member}`, {name}: {reason}" for member, name, reason in refused) or "None.",
    )
    (DOCS / "timm-models.md").write_text(page, encoding="utf-8")


def line(row: dict) -> str:
    """A row of the page's table."""
    default = row["default"]
    counts = [str(found.get("targets", "refused")) if (found := row[name]) else "" for name in ("all-linear", "conv")]
    cells = ["refused", *counts, ""]
    if "refused" not in default:
        every = [row[name] for name in SELECTIONS if row[name] and "refused" not in row[name]]
        modes = [label for mode, label in HOW.items() if any(found[mode] for found in every)]
        cells = [f"{names(default['names'])} ({default['targets']})", *counts, ", ".join(modes)]
    peft = [verdict(row["peft"].get(kind)) for kind in ("lora", "unilora")]
    return "| " + " | ".join([row["module"], f"`{row['member']}`", *cells, *peft]) + " |"


def names(listed: list[str]) -> str:
    """The last parts of the names, each once."""
    ends = dict.fromkeys(".".join(re.sub(r"\d+\.", "", name).split(".")[-2:]) for name in listed)
    shown = ", ".join(f"`{end}`" for end in list(ends)[:3])
    return shown + (", …" if len(ends) > 3 else "")


def verdict(found: dict | None) -> str:
    """What PEFT does with the same layers."""
    if found is None:
        return ""
    if "refused" in found:
        return f"error: {found['refused'].partition(':')[0]}"
    return f"**{found['dead']} of {found['layers']} dead**" if found["dead"] else "ok"


if __name__ == "__main__":
    main()
