"""Every public reader of files that strangers write: how a hostile one is made for it, read, and judged.

A reader that refuses must leave its model as it was; one that accepts must give something that means something.
"""

import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mutations import (
    TEXTS,
    File,
    Raw,
    damage,
    dumps,
    hostile,
    mutate_file,
    mutate_json,
    mutate_tensors,
    pack,
    unpack,
)
from torch import nn

__all__ = ["READERS", "Reader", "Refused", "Unclear"]

KB, MB = 1024, 1024**2


class Unclear(AssertionError):
    """What a reader did is neither a clear refusal nor right."""


class Refused(Exception):
    """The command refused as it should."""


class Reader:
    """One public reader.

    Attributes:
        name: in the table.
        share: of the time of a run.
        seconds, megabytes: what a try may take beside what its file and its model account for.
    """

    name = ""
    share = 1.0
    seconds, megabytes = 1.5, 64

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.model_bytes = 0
        self.extra = strange_bases(scratch)
        self.setup()

    def setup(self) -> None:
        """Seeds and models, made once for a process."""

    def write(self, rng: random.Random) -> int:
        """Put a hostile file into place; its size in bytes."""
        raise NotImplementedError

    def read(self) -> Any:
        """What is measured."""
        raise NotImplementedError

    def check(self, result: Any) -> None:
        """Refuse a result that means nothing."""

    def settle(self, accepted: bool) -> None:
        """After every try: refuse a model that a refusal has changed; put it back after an acceptance."""


def strange_bases(scratch: Path) -> dict[str, list[Any]]:
    """Header fields that name a base, with what a stranger may try in them; `ran` says whether code ran."""
    evil, mark = scratch / "evil", scratch / "RAN"
    evil.mkdir()
    auto = {
        f"Auto{name}": "evil.X" for name in ("Config", "ModelForCausalLM", "Model", "ModelForSequenceClassification")
    }
    auto |= {"AutoTokenizer": ["evil.X", None], "AutoConfig": "evil.C"}
    (evil / "config.json").write_text(json.dumps({"model_type": "evilm", "auto_map": auto}))
    code = [f"open({str(mark)!r}, 'w').close()", "from transformers import *", "class C(PretrainedConfig):"]
    code += ["    model_type = 'evilm'", "class X(PreTrainedModel):", "    config_class = C", ""]
    (evil / "evil.py").write_text("\n".join(code))
    os.mkfifo(scratch / "pipe")
    names = [
        str(evil),
        str(scratch / "pipe"),
        str(scratch),
        "/dev/zero",
        "/proc/self/mem",
        "~",
        "../..",
        "a/b",
        "gpt2\0",
        "é",
    ]
    names += [
        "hf-hub:a/b",
        f"local-dir:{evil}",
        "x" * 5000,
        "",
        "http://localhost:9/a",
        "\x1b[31mx",
        "-h",
        "a b",
        "a/b/c/d",
    ]
    arguments = [
        {"trust_remote_code": True},
        {"token": True},
        {"device_map": "auto"},
        {"quantization_config": {"load_in_4bit": True}},
    ]
    arguments += [
        {"subfolder": "../.."},
        {"cache_dir": str(scratch / "stray")},
        {"torch_dtype": "float16"},
        {"num_labels": 10**9},
    ]
    arguments += [
        {"num_labels": -1},
        {"hidden_size": 2**20},
        {"vocab_size": 10**9},
        {"config": str(evil)},
        {"proxies": {"http": "x"}},
    ]
    arguments += [
        {"attn_implementation": "evil/kernel"},
        {"problem_type": "regression"},
        {"problem_type": "x"},
        {"num_classes": 10**9},
    ]
    arguments += [
        {"img_size": 10**6},
        {"img_size": -1},
        {"img_size": [0, 0]},
        {"depth": 10**6},
        {"pretrained_cfg": {"file": str(scratch / "pipe")}},
    ]
    arguments += [
        {"checkpoint_path": "/dev/zero"},
        {"scriptable": True},
        {"self": 1},
        {"name": 1},
        {"x": [1] * 100},
        {"gguf_file": "a"},
    ]
    fields = [{"arguments": each} for each in arguments]
    fields += [
        {"checkpoint": "/dev/zero"},
        {"checkpoint": str(scratch / "pipe")},
        {"checkpoint": 1},
        {"seed": "a"},
        {"seed": 2**80},
    ]
    fields += [
        {"seed": -1},
        {"pretrained": "x"},
        {"kind": "vit"},
        {"name": "x"},
        {"arguments": [1]},
        {"seed": None},
        {"checkpoint": []},
    ]
    return {
        "base_model": names,
        "base_class": ["AutoModelForCausalLM", "AutoModel", "Trainer", "pipeline", "LlamaConfig", "torch", "__path__",
                       "utils.logging", "BertModel", "GPT2LMHeadModel", "PreTrainedModel", "AutoTokenizer", "\x1b[31m",
                       "is_torch_available", "set_seed", "LlamaForCausalLM", "LlamaModel", "TrainingArguments",
                       "BertForSequenceClassification"],
        "base_arguments": fields,
        "task": ["vit", "text", "lm", "x", "\x1b[31m", ""],
        "labels": [["a"], ["a"] * 3, list(range(3)), [None, None], ["\x1b[31m", "b"], "ab", {"a": 1}, [["a"]],
                   [""] * 1000, {}],
    }  # fmt: skip


# ---- PyTorch --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of each kind that can be adapted."""

    def __init__(self, width: int):
        super().__init__()
        self.at = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x):
        x = x + self.at(x, x, x, need_weights=False)[0]
        x = x + self.down(self.up(self.norm(x)).relu())
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Tiny(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


LINEAR = ["blocks.0.up", "blocks.0.down", "blocks.1.up"]
ALL = [*LINEAR, "embed", "blocks.1.conv", "blocks.1.at.in_proj_weight"]


class Snapshot:
    """What a refusal must not change: values, flags, hooks, attributes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.facts = self._facts()

    def _facts(self) -> list[Any]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())
        flags = [(name, p.requires_grad) for name, p in self.model.named_parameters()]
        return [hooks, flags, [name for name, _ in self.model.named_modules()], sorted(vars(self.model))]

    def check(self, what: str) -> None:
        state = self.model.state_dict()
        for name, value in self.state.items():
            if name not in state or not torch.equal(state[name], value):
                raise Unclear(f"{what} has changed the model: {name}")
        if (facts := self._facts()) != self.facts:
            raise Unclear(
                f"{what} has changed the model: {[b for a, b in zip(self.facts, facts, strict=True) if a != b]!r:.200}"
            )

    def restore(self) -> None:
        self.model.load_state_dict(self.state, strict=False)


def adapter_file(
    scratch: Path, model: nn.Module, targets: Any, metadata: Any = None, grown: int = 1, **options: Any
) -> File:
    """The parts of a file that `Adapter.save` writes for the model, which stays as it is; ``grown``: times its d."""
    import unilora_torch

    adapter = unilora_torch.attach(model, targets, **{"rank": 2, "d": 24} | options)
    if grown > 1:
        adapter.grow(grown)
    adapter.save(scratch / "seed.safetensors", metadata=metadata)
    adapter.detach()
    model.requires_grad_(True)
    return File.of((scratch / "seed.safetensors").read_bytes())


def words_of(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, _ in model.named_modules()]
    return (*names, *(f"{name}.weight" for name in names[:6]))


def check_factors(adapter: Any) -> None:
    """Finite, and of the layout's shapes."""
    with torch.no_grad():
        factors = adapter.factors()
    for name, shape in adapter.spec.layout.shapes.items():
        if tuple(factors[name].shape) != tuple(shape) or not factors[name].isfinite().all():
            raise Unclear(
                f"accepted, but the factor {name:.50} has shape {tuple(factors[name].shape)} or no finite values"
            )


def plain(value: Any) -> None:
    """No bool or float where an integer belongs."""
    spec = value.spec
    numbers = [spec.d, spec.seed, *(size for shape in spec.layout.shapes.values() for size in shape)]
    if any(type(number) is not int for number in numbers):
        raise Unclear(f"accepted, but the spec has {next(n for n in numbers if type(n) is not int)!r} for an integer")


class Adapters(Reader):
    """A reader of one adapter file for one model."""

    seeds: list[File]
    words: tuple[str, ...] = ()

    def write(self, rng: random.Random) -> int:
        data = mutate_file(rng, rng.choice(self.seeds), self.words, self.extra)
        (self.scratch / "a.safetensors").write_bytes(data)
        return len(data)

    @property
    def path(self) -> Path:
        return self.scratch / "a.safetensors"


class ReadAdapter(Adapters):
    name, share = "read_adapter", 0.8

    def setup(self) -> None:
        import unilora_core

        self.core = unilora_core
        model = Tiny()
        self.words = words_of(model)
        self.seeds = [
            adapter_file(self.scratch, model, LINEAR, modules_to_save=["head"]),
            adapter_file(self.scratch, model, LINEAR, start="paper"),
        ]
        self.seeds[1].header.pop("targets")

    def read(self) -> Any:
        return self.core.read_adapter(self.path)

    def check(self, file: Any) -> None:
        plain(file)
        if file.theta_d.shape != (file.spec.d,) or not np.isfinite(file.theta_d).all():
            raise Unclear("accepted, but theta_d does not fit")
        again = self.scratch / "again.safetensors"
        self.core.save_adapter(again, file.spec, file.theta_d, tensors=file.tensors, metadata=file.metadata)
        other = self.core.read_adapter(again)
        same = (
            other.spec == file.spec and np.array_equal(other.theta_d, file.theta_d) and other.metadata == file.metadata
        )
        if not same or other.tensors.keys() != file.tensors.keys():
            raise Unclear("accepted, but saved and read again it is another")


class Load(Adapters):
    name, share = "load (torch)", 1.6

    def setup(self) -> None:
        import unilora_torch

        self.load = unilora_torch.load
        torch.manual_seed(0)
        self.model, self.again = self.build(), self.scratch / "again.safetensors"
        self.model_bytes = sum(value.nbytes for value in self.model.state_dict().values())
        self.words = words_of(self.model)
        self.seeds = self.files()
        self.before = Snapshot(self.model)

    def build(self) -> nn.Module:
        return Tiny()

    def files(self) -> list[File]:
        seeds = [adapter_file(self.scratch, self.model, ALL, modules_to_save=["head"])]
        return [
            *seeds,
            *(adapter_file(self.scratch, self.model, LINEAR, start=s, rank=1) for s in ("paper", "identity")),
        ]

    def read(self) -> Any:
        return self.load(self.model, self.path)

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.arange(10).view(2, 5))

    def check(self, adapter: Any) -> None:
        plain(adapter)
        check_factors(adapter)
        self.run()
        adapter.save(self.again)
        theta_d, spec, targets = adapter.theta_d.detach().clone(), adapter.spec, adapter.targets
        self.detach()
        other = self.load(self.model, self.again)
        if not torch.equal(other.theta_d, theta_d) or other.spec != spec or other.targets != targets:
            raise Unclear("accepted, but saved and loaded again it is another")

    def detach(self) -> None:
        from unilora_torch.adapter import adapters

        for adapter in adapters(self.model).values():
            adapter.detach()

    def settle(self, accepted: bool) -> None:
        self.detach()
        if accepted:
            self.before.restore()
        try:
            self.before.check("an adapter that was detached" if accepted else "a refusal")
        except Unclear:
            self.model = self.build()
            self.before.model.__dict__.update(self.model.__dict__)
            self.model, self.before = self.before.model, Snapshot(self.before.model)
            raise


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "tied-lora": {},
    "vera": {},
    "lora-xs": {},
    "tinylora": {"d": 5},
    "vb-lora": {"vectors": 4, "length": 4},
    "fourierft": {"rank": None, "frequencies": 9},
    "fastfood": {"d": 12},
    "gaussian": {"d": 12},
    "gpart": {"rank": None, "d": 12},
}


class LoadMethods(Load):
    """As `Load`, of files of the other methods, and of Uni-LoRA with another d than it began with."""

    name, share = "load (methods)", 1.2

    def files(self) -> list[File]:
        return [
            adapter_file(self.scratch, self.model, LINEAR, **{"method": method, "d": "auto"} | options)
            for method, options in METHODS.items()
        ] + [adapter_file(self.scratch, self.model, LINEAR, d=12, grown=2)]


class Swap(Load):
    name, share = "swap", 0.8

    def files(self) -> list[File]:
        seeds = [adapter_file(self.scratch, self.model, ALL, modules_to_save=["head"], seed=5)]
        import unilora_torch

        self.adapter = unilora_torch.attach(self.model, ALL, rank=2, d=24, modules_to_save=["head"])
        return seeds

    def read(self) -> Any:
        self.old = self.adapter.spec
        self.adapter.swap(self.path)
        return self.adapter

    def check(self, adapter: Any) -> None:
        import unilora_core

        plain(adapter)
        check_factors(adapter)
        self.run()
        adapter.save(self.again)
        a, b = unilora_core.read_adapter(self.path), unilora_core.read_adapter(self.again)
        if not np.array_equal(a.theta_d, b.theta_d) or a.spec != b.spec:
            raise Unclear("accepted, but saved again it is another")

    def settle(self, accepted: bool) -> None:
        if accepted:
            self.adapter.reseed(self.old)
            self.before.restore()
        if self.adapter.spec != self.old:
            raise Unclear("a refusal has changed the adapter's spec")
        self.before.check("a refusal")


class BankAdd(Load):
    name, share = "Bank.add", 1.0

    def files(self) -> list[File]:
        import unilora_torch

        self.bank = unilora_torch.Bank(self.model)
        return [
            adapter_file(self.scratch, self.model, LINEAR, modules_to_save=["head"]),
            adapter_file(self.scratch, self.model, LINEAR, start="paper"),
        ]

    def read(self) -> Any:
        self.bank.add("a", self.path)
        return self.bank

    def check(self, bank: Any) -> None:
        with bank.rows(["a", None]):
            self.run()

    def settle(self, accepted: bool) -> None:
        if "a" in self.bank.names and accepted:
            self.bank.remove("a")
        if self.bank.names or self.bank.nbytes:
            names = self.bank.names
            self.bank.close()
            raise Unclear(f"a refusal has left {names!r} in the bank")
        self.before.check("a refusal")


class LoadTimm(Load):
    name, share = "load (timm)", 0.7

    def build(self) -> nn.Module:
        import timm

        import unilora_timm

        self.load = unilora_timm.load
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3
        ).eval()

    def files(self) -> list[File]:
        return [
            adapter_file(self.scratch, self.model, ["blocks.0.attn.qkv", "patch_embed.proj"], modules_to_save=["head"]),
            adapter_file(self.scratch, self.model, "all-linear", start="paper", rank=1),
        ]

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.zeros(1, 3, 32, 32))


# ---- JAX ------------------------------------------------------------------------------------------------------------


class LoadJax(Adapters):
    name, share = "load (jax)", 0.9

    def setup(self) -> None:
        import jax.numpy as jnp

        import unilora_jax

        self.jax = unilora_jax
        block = {name: {"kernel": jnp.ones((8, 8))} for name in ("q", "v")}
        self.params = {
            "blocks": [block, {**block, "up": {"kernel": jnp.ones((8, 16))}}],
            "head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)},
        }
        self.model_bytes = 8 * KB
        self.words = (
            "",
            "blocks",
            "blocks.0",
            "blocks.0.q",
            "blocks.1.up",
            "head",
            "head.bias",
            "head.kernel",
            "blocks.2.q",
        )
        self.seeds, path = [], self.scratch / "seed.safetensors"
        for start in ("paper", "identity"):
            adapter = unilora_jax.plan(self.params, ".*(q|v|up)/kernel", rank=2, d=16, start=start)
            adapter.save(
                path, adapter.init(), tensors={"head.kernel": np.ones((8, 3), np.float32)} if start == "paper" else None
            )
            self.seeds.append(File.of(path.read_bytes()))
        self.checked = 0

    def read(self) -> Any:
        return self.jax.load(self.params, self.path)

    def check(self, result: Any) -> None:
        adapter, theta_d = result
        plain(adapter)
        if theta_d.shape != (adapter.spec.d,) or not np.isfinite(np.asarray(theta_d)).all():
            raise Unclear("accepted, but theta_d does not fit")
        adapter.save(self.scratch / "again.safetensors", theta_d)
        again, other = self.jax.load(self.params, self.scratch / "again.safetensors")
        if again.spec != adapter.spec or not np.array_equal(other, theta_d):
            raise Unclear("accepted, but saved and loaded again it is another")
        self.checked += 1
        if self.checked % 40 == 10:  # each new layout is compiled
            for name, factor in adapter.factors(theta_d).items():
                if (
                    tuple(factor.shape) != tuple(adapter.spec.layout.shapes[name])
                    or not np.isfinite(np.asarray(factor)).all()
                ):
                    raise Unclear(f"accepted, but the factor {name:.50} has no finite values, or another shape")


# ---- transformers ---------------------------------------------------------------------------------------------------


def llama(scratch: Path) -> Path:
    """A tiny Llama and a tokenizer, as a folder."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    folder = scratch / "llama"
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 31,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=32)).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "a", "b"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder


def bert(scratch: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    folder = scratch / "bert"
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 31,
    }
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(folder)
    return folder


class LoadTransformers(Load):
    name, share = "load (transformers)", 0.9

    def build(self) -> nn.Module:
        import transformers

        import unilora_transformers

        self.load = unilora_transformers.load
        self.folder = getattr(self, "folder", None) or llama(self.scratch)
        return transformers.LlamaForCausalLM.from_pretrained(self.folder)

    def files(self) -> list[File]:
        names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
        return [
            adapter_file(self.scratch, self.model, names),
            adapter_file(self.scratch, self.model, [*names, "model.embed_tokens"], start="paper"),
        ]

    def run(self) -> Any:
        with torch.no_grad():
            return self.model(torch.arange(5)[None])


class FromPretrained(LoadTransformers):
    """`from_pretrained`, which builds the base that the file names."""

    name, share = "from_pretrained", 1.3
    seconds, megabytes = 20.0, 300

    def setup(self) -> None:
        import transformers

        super().setup()
        (self.scratch / "adapters").mkdir()
        metadata = {"base_model": str(self.folder), "base_class": "LlamaForCausalLM", "task": "lm"}
        for seed in self.seeds:
            seed.header |= metadata
        text = transformers.BertForSequenceClassification.from_pretrained(bert(self.scratch))
        named = {
            "base_model": str(self.scratch / "bert"),
            "base_class": "BertForSequenceClassification",
            "task": "text",
        }
        named |= {"labels": '["a", "b"]', "base_arguments": '{"arguments": {}}'}
        self.seeds.append(adapter_file(self.scratch, text, ["query", "value"], named, modules_to_save=["classifier"]))
        self.model_bytes *= 2

    def write(self, rng: random.Random) -> int:
        folder = self.scratch / "adapters"
        for old in folder.iterdir():
            old.unlink()
        name = rng.choice(
            ["", "", "", "", "", "-b", "-a.b", "-forward", "-\x1b[31m", "-model", "-theta_d", "-", "-class", "-config"]
        )
        size = super().write(rng)
        shutil.copy(self.path, folder / f"adapter{name}.safetensors")
        if rng.random() < 0.1:
            (folder / "adapter-two.safetensors").write_bytes(rng.choice(self.seeds).pack())
        return size

    def read(self) -> Any:
        import unilora_transformers

        return unilora_transformers.from_pretrained(self.scratch / "adapters")

    def check(self, model: Any) -> None:
        from unilora_torch.adapter import adapters

        for adapter in adapters(model).values():
            plain(adapter)
            check_factors(adapter)

    def settle(self, accepted: bool) -> None:
        ran(self.scratch)


def ran(scratch: Path) -> None:
    """Whether the code of a base that a file named has run, or anything was written where a file said."""
    for name in ("RAN", "stray", "owned"):
        if (scratch / name).exists():
            path = scratch / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise Unclear(
                {"RAN": "the file's base ran its code", "stray": "the file chose a folder to write"}.get(
                    name, "a shell ran"
                )
            )


class Merge(FromPretrained):
    name, share = "merge_checkpoint", 1.2

    def setup(self) -> None:
        super().setup()
        self.seeds.pop()  # Llama only

    def write(self, rng: random.Random) -> int:
        shutil.rmtree(self.scratch / "out", ignore_errors=True)
        return Adapters.write(self, rng)

    def read(self) -> Any:
        import unilora_transformers

        unilora_transformers.merge_checkpoint(self.path, self.folder, self.scratch / "out")
        return None

    def check(self, _: Any) -> None:
        import transformers

        try:
            adapter = self.load(self.model, self.path)
        except Exception as error:
            raise Unclear(
                f"merge_checkpoint wrote what load refuses: {type(error).__name__}: {error!s:.200}"
            ) from error
        adapter.detach(merge=True)
        merged = transformers.LlamaForCausalLM.from_pretrained(self.scratch / "out").state_dict()
        for name, value in self.model.state_dict().items():
            if not torch.allclose(value, merged[name], atol=1e-5, rtol=1e-4, equal_nan=True):
                raise Unclear(f"merge_checkpoint and detach(merge=True) differ in {name}")

    def settle(self, accepted: bool) -> None:
        LoadTransformers.settle(self, accepted=True)
        ran(self.scratch)
        if not accepted and (
            left := [path.name for path in self.scratch.iterdir() if path.name.startswith((".out", "out"))]
        ):
            for name in left:
                shutil.rmtree(self.scratch / name)
            raise Unclear(f"a refusal left {left}")


# ---- folders --------------------------------------------------------------------------------------------------------


class Folders(LoadTransformers):
    """Readers of a config and a safetensors file."""

    def folder_of(self, rng: random.Random, configs: list[Any], tensors: list[Any], tries: dict[str, list[Any]]) -> int:
        i = rng.randrange(len(configs))
        config, values = configs[i], dict(tensors[i])
        text, data = None, None
        for _ in range(rng.choice([1, 1, 2, 3])):
            kind = rng.random()
            if kind < 0.35:
                config = mutate_json(rng, config, self.words)
            elif kind < 0.6 and isinstance(config, dict):
                key = rng.choice(list(tries))
                config = config | {key: rng.choice(tries[key])}
            elif kind < 0.9:
                values = mutate_tensors(
                    rng, values, tuple(f"base_model.model.{word}.lora_A.weight" for word in self.words)
                )
            elif kind < 0.92:
                text = str(rng.choice([*TEXTS, "[" * 10**5, "﻿{}", '{"r": 1' + "0" * 5000 + "}"]))
            elif kind < 0.95:
                values |= {
                    f"base_model.model.layers.{i}.q_proj.lora_A.weight": ("F32", (1, 1), b"\0" * 4) for i in range(3000)
                }
            else:
                data = damage(rng, pack({"format": "pt"}, values)) if rng.random() < 0.5 else pack(None, values, rng)
        folder = self.scratch / "folder"
        folder.mkdir(exist_ok=True)
        written = (dumps(config) if text is None else text).encode("utf-8", "surrogatepass")
        data = pack({"format": "pt"}, values) if data is None else data
        for name, content in (("adapter_config.json", written), ("adapter_model.safetensors", data)):
            (folder / name).write_bytes(content)
            if rng.random() < 0.01:
                (folder / name).unlink()
        return len(written) + len(data)


BACKTRACK = [
    "(a+)+$",
    "([a-z._0-9]+)+!",
    "(.*)*x",
    "(.*.*.*.*.*.*)*!",
    ".*",
    "(?P<",
    "[",
    "\\",
    "x{1000000000}",
    "(" * 5000,
    "(?i)q_proj",
]
RANKS = [0, -1, 1, 2.0, True, "2", None, 2**20, 2**31, 2**63, 2**64, 1e308, Raw("NaN"), Raw("Infinity"), [2], 3]


class LoadPeft(Folders):
    name, share = "load_peft", 1.4
    tries: ClassVar[dict[str, list[Any]]] = {
        "r": RANKS,
        "target_modules": [*BACKTRACK, ["q_proj"], ["\x1b[31m"], [1], {"q_proj": 1}, [["q_proj"]], ["q_proj"] * 1000,
                           "all-linear", [""], None, 5],
        "modules_to_save": [["lm_head"], ["("], ["model"], [""], ["q_proj"], "lm_head", [1], {"a": 1}, [None],
                            BACKTRACK, 1, True, ["embed_tokens"]],
        "layers_to_transform": [[0], 0, [1], "0", [None], {"0": 0}, True, 1.0, [[0]], [0] * 1000, -1],
        "layers_pattern": ["layers", ["layers"], "(", ["("], "(a+)+", [1], 1, {"a": 1}, True, [None], *BACKTRACK],
        "theta_d_length": [1, 0, -1, 24.0, True, 2**31, 2**63, "24", None, Raw("NaN"), [24]],
        "proj_seed": [-1, 2**64, 1.0, True, "0", None, Raw("NaN"), [0], 2**63],
        "init_theta_d_bound": [0, -1, Raw("NaN"), Raw("Infinity"), "a", [1], True, 1e-320, 1e308, None, Raw("1e999")],
        "bias": [None, "all", 1, [], "\x1b[31m", {"a": 1}],
        "unilora_dropout": [0.1, "a", [1], True, "\x1b[31m", Raw("NaN")],
        "peft_type": ["LORA", None, ["UNILORA"], 1, "\x1b[31m"],
        "revision": ["\x1b[31m", 1],
        "base_model_name_or_path": TEXTS,
    }  # fmt: skip

    def files(self) -> list[File]:
        import unilora_transformers

        self.configs, self.tensors = [], []
        for targets, options in ((["q_proj", "v_proj"], {}), (["up_proj"], {"modules_to_save": ["lm_head"]})):
            model = self.build()
            adapter = unilora_transformers.attach(
                model, targets, rank=2, d=24, grouping="numpy-shuffle", start="paper", **options
            )
            unilora_transformers.save_peft(adapter, self.scratch / "peft")
            self.configs.append(json.loads((self.scratch / "peft/adapter_config.json").read_text()))
            self.tensors.append(unpack((self.scratch / "peft/adapter_model.safetensors").read_bytes())[1])
        self.peft = unilora_transformers
        return []

    def write(self, rng: random.Random) -> int:
        return self.folder_of(rng, self.configs, self.tensors, self.tries)

    def read(self) -> Any:
        return self.peft.load_peft(self.model, self.scratch / "folder")

    def check(self, adapter: Any) -> None:
        plain(adapter)
        check_factors(adapter)
        self.run()
        theta_d = adapter.theta_d.detach().clone()
        self.peft.save_peft(adapter, self.scratch / "again")
        self.detach()
        if not torch.equal(self.peft.load_peft(self.model, self.scratch / "again").theta_d, theta_d):
            raise Unclear("accepted, but saved and loaded again it is another")


class ReadLora(Folders):
    """`read_lora`, `check`, `serving` and `refuse`: the whole of what looks at LoRA folders."""

    name, share = "engines.check", 1.0
    tries: ClassVar[dict[str, list[Any]]] = {
        "r": RANKS,
        "lora_alpha": RANKS,
        "target_modules": [*BACKTRACK, ["q_proj"], [1], {"a": 1}, 5, [["a"]], "all-linear", ["\x1b[31m"]],
        "modules_to_save": [["\x1b[31m"], "a", 1, [None]],
        "base_model_name_or_path": [*TEXTS, 1, [1], {"a": 1}, True, None],
        "bias": ["\x1b[31m", None, 1, [1]],
        "peft_type": ["\x1b[31m", None, 1, ["LORA"]],
        "alpha_pattern": [{"a": 1}, [1], "\x1b[31m"],
        "use_dora": [True, "a", [1]],
    }

    def files(self) -> list[File]:
        import unilora_core.engines
        import unilora_transformers

        self.engines = unilora_core.engines
        self.configs, self.tensors = [], []
        for targets in (["q_proj", "v_proj"], ["up_proj", "gate_proj", "lm_head"]):
            adapter = unilora_transformers.attach(self.build(), targets, rank=2, d=24)
            adapter.export_lora(self.scratch / "lora", base_model="a/b")
            self.configs.append(json.loads((self.scratch / "lora/adapter_config.json").read_text()))
            self.tensors.append(unpack((self.scratch / "lora/adapter_model.safetensors").read_bytes())[1])
        return []

    def write(self, rng: random.Random) -> int:
        size = self.folder_of(rng, self.configs, self.tensors, self.tries)
        path = self.scratch / "folder/adapter_model.safetensors"
        if rng.random() < 0.15 and path.is_file():
            number = rng.choice(["9" * 12, "9" * 5000, "00", "²", "-1", "1e9", "٣", str(2**31), "0", "1000000"])
            values = dict(self.tensors[0])
            values[f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_A.weight"] = ("F32", (2, 1), bytes(8))
            path.write_bytes(pack({"format": "pt"}, values))
        return size

    def read(self) -> Any:
        lora = self.engines.read_lora(self.scratch / "folder")
        found = self.engines.check(self.scratch / "folder")
        served = [self.engines.serving(name, "folder", lora) for name, reasons in found.items() if not reasons]
        return found, served

    def check(self, result: Any) -> None:
        found, served = result
        texts = [*served, *(reason for reasons in found.values() for reason in reasons)]
        if not all(isinstance(text, str) for text in texts):
            raise Unclear("reasons that are no texts")
        if any(controls(text) for text in texts):
            raise Unclear("a reason or a command holds control characters of the file")
        if sum(map(len, texts)) > 100_000:
            raise Unclear(f"reasons of {sum(map(len, texts))} characters")
        for text in served:
            check_shell(text)

    def settle(self, accepted: bool) -> None:
        self.before.check("reading")


def controls(text: str) -> list[str]:
    """Characters that a terminal acts on."""
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def check_shell(command: str) -> None:
    """A command for pasting has nothing of the file's that a shell acts on."""
    import shlex

    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Unclear(f"a command for pasting is not quoted ({error})") from error
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    operators = [word for word in lexer if word and set(word) <= set("();<>|&")]
    unquoted = re.sub(r"'[^']*'", "", command)
    if operators or re.search(r"[$`\n]", unquoted) or not words:
        raise Unclear(f"a command for pasting is not quoted: {command!r:.150}")


# ---- the command ----------------------------------------------------------------------------------------------------


class Command(FromPretrained):
    """`unilora …` in this process: exit code 0, or 1 and one line."""

    def words_of_try(self, rng: random.Random) -> list[str]:
        raise NotImplementedError

    def write(self, rng: random.Random) -> int:
        for name in ("out", "out.safetensors"):
            path = self.scratch / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        size = Adapters.write(self, rng)
        self.line = self.words_of_try(rng)
        return size

    def read(self) -> Any:
        from unilora_cli.main import main

        return self.run_main(lambda: main(self.line))

    def run_main(self, main: Callable[[], Any]) -> str:
        """Its output; `Refused` where it refused as it should."""
        streams, kept = (
            [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2)],
            (sys.stdout, sys.stderr),
        )
        here = os.getcwd()
        os.chdir(self.scratch)
        sys.stdout, sys.stderr = streams
        try:
            code = main()
        except SystemExit as stop:
            code = f"exit {stop.code}"
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = kept
            os.chdir(here)
        out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)
        if code == 1:
            lines = [line for line in re.split(r"[\r\n]", err) if line.strip()]
            if not lines or not lines[-1].startswith("unilora: error: ") or not err.endswith("\n"):
                raise Unclear(f"exit code 1 without a line that says why: {err!r:.200}")
            if others := [line for line in lines[:-1] if "%|" not in line and "file/s" not in line]:
                raise Unclear(f"more than one line: {others!r:.200}")
            if controls(lines[-1]):
                raise Unclear(f"control characters in {lines[-1]!r:.200}")
            if len(lines[-1]) > 2000:
                raise Unclear(f"a line of {len(lines[-1])} characters")
            raise Refused(lines[-1])
        if code != 0:
            raise Unclear(f"exit code {code!r}: {err!r:.200}")
        return out

    def check(self, out: str) -> None:
        if found := controls(out):
            raise Unclear(f"control characters {found[:3]!r} of the file are printed")

    def settle(self, accepted: bool) -> None:
        ran(self.scratch)
        if not accepted and (left := [p.name for p in self.scratch.iterdir() if p.name.startswith((".out", "out"))]):
            for name in left:
                path = self.scratch / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise Unclear(f"a refusal left {left}")


class Inspect(Command):
    name, share = "unilora inspect", 0.6
    seconds, megabytes = 1.5, 64

    def words_of_try(self, rng: random.Random) -> list[str]:
        return ["inspect", str(self.path), *(["--json"] if rng.random() < 0.4 else [])]

    def check(self, out: str) -> None:
        super().check(out)
        if "--json" in self.line:
            json.loads(out, parse_constant=lambda name: (_ for _ in ()).throw(Unclear(f"{name} is no JSON")))


class Check(ReadLora, Command):
    name, share = "unilora check", 0.6
    seconds, megabytes = 1.5, 64

    def setup(self) -> None:
        LoadTransformers.setup(self)

    def write(self, rng: random.Random) -> int:
        size = ReadLora.write(self, rng)
        self.line = [
            "check",
            "folder",
            *(["--engine", rng.choice(["vllm", "llama.cpp"])] if rng.random() < 0.3 else []),
        ]
        return size

    read = Command.read

    def check(self, out: str) -> None:
        Command.check(self, out)
        for line in out.splitlines():
            if line.startswith(("  vllm serve", "  python -m", "  lorax-launcher", "  python convert")):
                check_shell(line.strip())

    def settle(self, accepted: bool) -> None:
        pass


class Convert(Command):
    name, share = "unilora convert", 1.3

    def setup(self) -> None:
        super().setup()
        import timm

        arguments = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
        named = {"base_model": "vit_tiny_patch16_224", "task": "vit", "labels": '["a", "b"]'}
        named["base_arguments"] = json.dumps(
            {"arguments": arguments, "pretrained": False, "checkpoint": None, "seed": 0}
        )
        self.seeds.append(
            adapter_file(self.scratch, model, ["blocks.0.attn.qkv"], named, modules_to_save=["head"], seed=1)
        )
        for seed in self.seeds[:-1]:
            seed.header.pop("base", None)  # its values are another seed's
        self.seeds[-1].header.pop("base")

    def words_of_try(self, rng: random.Random) -> list[str]:
        to = rng.choice(["lora", "lora", "peft-unilora"])
        return [
            "convert",
            str(self.path),
            "--to",
            to,
            *(["--engine", "vllm"] if rng.random() < 0.1 and to == "lora" else []),
            "out",
        ]


class ConvertPeft(LoadPeft, Command):
    name, share = "unilora convert peft", 0.8

    def setup(self) -> None:
        LoadTransformers.setup(self)
        for config in self.configs:
            config |= {"base_model_name_or_path": str(self.folder), "task_type": "CAUSAL_LM"}

    def write(self, rng: random.Random) -> int:
        (self.scratch / "out.safetensors").unlink(missing_ok=True)
        size = LoadPeft.write(self, rng)
        self.line = ["convert", "folder", "--to", "unilora", "out.safetensors"]
        return size

    read, check, settle = Command.read, Command.check, Command.settle


class MergeCommand(Convert):
    name, share = "unilora merge", 1.0

    def words_of_try(self, rng: random.Random) -> list[str]:
        return ["merge", str(self.path), "--out", "out"]


class Recipes(Command):
    name, share = "recipes", 0.5
    seconds, megabytes = 1.5, 64

    def setup(self) -> None:
        from unilora_cli import recipes

        self.recipes = sorted(recipes.FOLDER.rglob("*.toml"))

    def write(self, rng: random.Random) -> int:
        source = rng.choice(self.recipes).read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if "=" in line]
        self.task = next((line.split('"')[1] for line in lines if line.startswith("task")), "vit")
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(lines))
            key = lines[at].split("=")[0].strip()
            value = hostile(rng)
            text = dumps(value)
            kind = rng.random()
            if kind < 0.6:
                toml = [
                    text,
                    "inf",
                    "nan",
                    "1979-05-27",
                    "0x" + "f" * 9000,
                    "[1, [2]]",
                    "{a = 1}",
                    "'''\n\x1b[31m'''",
                    '"\\u001b[31m"',
                    "-0",
                    "1e400",
                    "true",
                    "[]",
                    "[" * 10**4,
                    '""',
                    "07:32:00",
                ]
                lines[at] = f"{key} = {rng.choice([text, rng.choice(toml)])}"
            elif kind < 0.8:
                name = rng.choice(
                    [
                        "help",
                        "debug",
                        "recipe",
                        "model-arg",
                        "out",
                        "overwrite",
                        "resume",
                        "data",
                        "x",
                        '"\\u001b[31m"',
                        "task.a",
                        "lora-rate",
                        "theta-rate",
                        "a.b.c",
                        '""',
                        "model",
                        "seed",
                        "d",
                        "about",
                        "kind",
                        "run",
                        "parser",
                    ]
                )
                lines.append(f"{name} = {text}")
            elif kind < 0.9:
                lines.append(lines[at])
            else:
                lines[at] = lines[at][: rng.randrange(len(lines[at]))] + str(rng.choice(TEXTS))
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        data = damage(rng, data) if rng.random() < 0.1 else data
        (self.scratch / "r.toml").write_bytes(data)
        self.show = rng.random() < 0.3
        return len(data)

    def read(self) -> Any:
        from unilora_cli.main import main, parse

        if self.show:
            return self.run_main(lambda: main(["recipes", "r.toml"]))

        def parsed() -> int:
            from unilora_core import UniLoraError

            try:
                self.parsed = parse(
                    ["finetune", self.task, "--recipe", "r.toml", "--data", "none", "--out", "x", "--model", "a"]
                )
            except (UniLoraError, OSError) as error:  # as `main` does
                from unilora_cli.main import _message

                sys.stderr.write(f"unilora: error: {_message(error)}\n")
                return 1
            return 0

        return self.run_main(parsed)

    def check(self, out: str) -> None:
        super().check(out)


READERS: list[type[Reader]] = [
    ReadAdapter, Load, LoadMethods, Swap, BankAdd, LoadTimm, LoadJax, LoadTransformers, FromPretrained, Merge, LoadPeft,
    ReadLora, Inspect, Check, Convert, ConvertPeft, MergeCommand, Recipes,
]  # fmt: skip


def scratch_folder() -> Path:
    """Memory where there is some, as thousands of small files are written."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=base))
