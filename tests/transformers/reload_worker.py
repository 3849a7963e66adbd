"""Loads bases as a user does, quantised or not; run as a script, a new process that reloads what `test_bases` saved."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def load_base(folder, cls, dtype):
    """The model of a class from a local folder: in a plain dtype, or quantised with the parts between in bfloat16."""
    if dtype in ("float32", "float16", "bfloat16"):
        return getattr(transformers, cls).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return (
        getattr(transformers, cls)
        .from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantisation(dtype, cls), device_map="cpu")
        .eval()
    )


def quantisation(dtype, cls=""):
    """What `from_pretrained` takes; a classifier, which trains, stays as it is."""
    if dtype == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier"] if cls.endswith("ForSequenceClassification") else None,
        )
    if dtype == "bnb-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if dtype == "torchao-int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def inputs(model):
    """The same tokens each time, as the model takes them."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def main(folder):
    """Print, for each case in the folder, how far its logits are from those that it had when it was saved."""
    import unilora_transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for case in sorted(path for path in folder.iterdir() if (path / "case.json").exists()):
        described = json.loads((case / "case.json").read_text())
        model = load_base(described["base"], described["cls"], described["dtype"])
        unilora_transformers.load(model, case / "adapter.safetensors")
        with torch.no_grad():
            logits = model(**inputs(model)).logits.float()
        found[case.name] = (logits - load_file(case / "logits.safetensors")["logits"]).abs().max().item()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
