"""The options of `unilora finetune`, in groups, with their defaults and the texts of the help.

A task's options are those of all its bases; a function takes the group that it needs.
"""
# ruff: noqa: RUF009  (`option` makes a field)

from dataclasses import dataclass
from typing import Any, Literal

from unilora_cli.options.fields import REQUIRED, Command, option
from unilora_cli.options.values import (
    Above0,
    Assignment,
    AutoOrPositive,
    File,
    Folder,
    Fraction,
    From0,
    Grouping,
    Method,
    Names,
    Natural,
    Part,
    Positive,
    Ranks,
    Rate,
    Selection,
    Span,
    Start,
)
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS
from unilora_core.spec import STARTS

WORDS = {"vit": "all-linear, qkv, q, mlp", "text": "all-linear, query of BERT", "lm": "all-linear, q_proj of Llama"}
"""What --targets takes, said by the names that the models of a task have."""

WRITES = """
Writes to the output folder: adapter.safetensors (theta_d, the trained head, and what they belong to), metrics.csv
(loss and rate of each step), summary.csv (a line per epoch), metrics.json (settings and results) and loss.png. A run
that was interrupted or killed goes on with --resume. With `torchrun --nproc-per-node 2 -m unilora_cli` in the place of
`unilora`, two processes share each step.
"""

PASSED_ON = "passed on when the model is built, such as img_size=384 or num_labels=3; may be repeated"


def _layers(words: str) -> Any:
    return option(
        f"layers: a word ({words}), a comma list, or a regular expression of whole names (default: the query and value "
        "layers, or what suits the model)"
    )


@dataclass(frozen=True, kw_only=True)
class Source(Command):
    """The model, and the data to train on and those held out."""

    group = "model and data"
    recipe: str | None = option("settings by name (see `unilora recipes`), or a .toml file; options win", scope="run")
    model: str = option("name on the hub, or a local folder", REQUIRED)
    model_arg: tuple[Assignment, ...] = option(PASSED_ON, ())
    data: str = option("training data, as said above", REQUIRED, metavar="DATA")
    eval_data: str | None = option("held-out data; else a split of the data, or a part of it", metavar="DATA")
    subset: str | None = option("configuration of a hub data set, such as sst2 of nyu-mll/glue")
    eval_subset: str | None = option("configuration of the hub data set that --eval-data names")
    train_split: str = option("split of a hub data set to train on; train[:1000]: a part", "train")
    eval_split: str | None = option("held-out split of a hub data set (default: found by name)")
    holdout: Fraction = option("the part held out where there is no held-out data", 0.1)
    limit: Positive | None = option("train on N examples only, drawn at random")


@dataclass(frozen=True, kw_only=True)
class Adapting(Command):
    """What is adapted, and how."""

    group = "adapter"
    method: Method = option(f"{', '.join(METHODS)} (`unilora analyze` compares them)", "uni-lora")
    method_arg: tuple[Assignment, ...] = option(
        "an option of the method, such as vectors=64 of vb-lora (repeat)", (), metavar="NAME=VALUE"
    )
    rank: Ranks | None = option(
        "of the factors, or one for each target, as in q_proj=8,v_proj=16 (default: the method's; uni-lora: 16)"
    )
    d: AutoOrPositive = option("trained numbers; auto: the method's", "auto")
    grow_to: Positive | None = option(
        "double d, up to N, after an epoch whose held-out loss has come to rest, while that pays"
    )
    targets: Selection | None = None  # a task has the help for it, with the names of its layers
    exclude: Selection | None = option("layers left out, said likewise")
    modules_to_save: Names | None = option("comma list of modules trained in full (default: the head)")
    seed: Natural = option("of the projection, the head and the data", 0)
    start: Start | None = option(f"{', '.join(STARTS)} (default: the method's)")
    bound: Above0 | None = option("theta_d starts as U(-X, X) (default: from the start)")
    grouping: Grouping | None = option(f"the map P: {', '.join(MAPS)} (default: the method's)")


@dataclass(frozen=True, kw_only=True)
class Training(Command):
    """Rates, steps and precision."""

    group = "training"
    lora_rate: Rate = option("the learning rate that LoRA would have; theta_d's follows from it", 5e-3)
    theta_rate: Rate | None = option("theta_d's own learning rate instead", instead_of="lora-rate")
    head_rate: Rate = option("of the head", 5e-3)
    epochs: Positive = option("passes over the data", 3)
    max_steps: Positive | None = option("stop after N steps")
    batch_size: Positive = option("examples at once (per process)", 32)
    accumulate: Positive = option("batches per step; together they act as one", 1)
    warmup: Part = option("the part of the steps in which rates rise", 0.06, metavar="PART")
    schedule: Literal["linear", "cosine"] = option("how the rates fall to 0 after that", "linear")
    weight_decay: From0 = option("of the head (AdamW)", 0.01)
    max_grad_norm: Above0 | None = option("gradients are scaled down to this norm")
    keep: Literal["last", "best"] = option(
        "which epoch's adapter to keep; the best by the first --metric on held-out data", "last"
    )
    patience: Positive | None = option(
        "stop after N epochs in which that metric has not become better; --keep says what is in the file then"
    )
    bf16: bool = option("bfloat16 autocast (theta_d stays float32)", False)
    fp16: bool = option("float16 autocast with scaled gradients, for GPUs without bfloat16", False)
    gradient_checkpointing: bool = option(
        "compute activations again in the backward pass: less memory, more time", False, scope="computing"
    )
    compile: str | None = option(
        "torch.compile the model (without BACKEND: inductor): slow first steps, then fast ones",
        metavar="BACKEND",
        nargs="?",
        const="inductor",
        scope="computing",
    )
    device: str = option("cpu, cuda, cuda:1, mps, or auto; with torchrun cuda or cpu", "auto", scope="computing")
    workers: Natural = option("processes that read data", 0, scope="computing")
    report_to: Names | None = option("trackers to write to, as well: tensorboard, wandb, mlflow, …", scope="run")
    trainer_arg: tuple[Assignment, ...] = option(
        "any other option of transformers' TrainingArguments, such as lr_scheduler_type=polynomial (repeat)",
        (),
        metavar="NAME=VALUE",
    )

    @property
    def precision(self) -> str | None:
        """The type of autocast, by torch's name; None without."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else None


@dataclass(frozen=True, kw_only=True)
class Memory(Training):
    """How a base model of transformers is held in memory while it trains."""

    group = "precision and memory"
    dtype: Literal["auto", "float32", "bf16"] = option(
        "of the base model's weights; auto: as in the checkpoint. Beside half precision, bfloat16 autocast is on",
        "auto",
    )
    load_in_4bit: bool = option("base in 4-bit nf4 with double quantisation (needs bitsandbytes)", False)


@dataclass(frozen=True, kw_only=True)
class Output(Command):
    """Where a run goes."""

    group = "output"
    out: Folder | None = option("output folder (default: a new one, runs/MODEL-DATA)", scope="run")
    overwrite: bool = option(
        "replace an adapter that is already in that folder", False, action="store_true", scope="run"
    )
    resume: bool = option(
        "go on with the interrupted run in --out, with the same arguments", False, action="store_true", scope="run"
    )
    push_to_hub: str | None = option(
        "upload the adapter, its losses and a model card in the end", metavar="USER/NAME", scope="run"
    )
    private: bool = option("that repository is private, if it is made now", False, action="store_true", scope="run")


@dataclass(frozen=True, kw_only=True)
class Finetune(Output, Training, Adapting, Source):
    """What all tasks share."""

    run = "unilora_cli.commands.finetune:run"
    usage = "%(prog)s --model NAME --data DATA [options]\n       %(prog)s --recipe NAME [options]"


@dataclass(frozen=True, kw_only=True)
class Augmentation(Command):
    """What is done to images, labels and model against overfitting."""

    group = "augmentation and regularisation, with the names that timm gives them"
    augment: Literal["none", "crop", "timm"] = option(
        "training images: as those to read; random crop of 60 to 100 %% and flip; or timm's own defaults", "crop"
    )
    scale: Span | None = option("area of a random crop, such as 0.08,1 (default: from --augment)")
    hflip: Part | None = option("how often an image is mirrored (default: 0.5)")
    vflip: Part | None = option("how often it is turned upside down (default: 0)")
    color_jitter: From0 | None = option("changes of colour (default: 0; 0.4 with --augment timm)")
    aa: str | None = option("RandAugment and the like, such as rand-m9-mstd0.5-inc1", metavar="POLICY")
    reprob: Part | None = option("how often a rectangle is erased")
    mixup: From0 = option("mixup, such as 0.8", 0.0, metavar="ALPHA")
    cutmix: From0 = option("CutMix, such as 1.0", 0.0, metavar="ALPHA")
    mixup_prob: Part = option("how often a batch is mixed at all", 1.0)
    mixup_switch_prob: Part = option("how often by CutMix, where both are on", 0.5)
    smoothing: Part = option("label smoothing, such as 0.1", 0.0, metavar="X")
    drop: Part | None = option("dropout of the model")
    drop_path: Part | None = option("stochastic depth of the model")
    crop_pct: Above0 | None = option("of an image to read, the part (default: the model's)")
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = option("when resizing (default: the model's)")


@dataclass(frozen=True, kw_only=True)
class Vit(Augmentation, Finetune):
    """The options of `unilora finetune vit`."""

    word, purpose = "vit", "fine-tune an image classifier of timm"
    details = f"""
Data: a folder of class folders of images (train/, val/ and test/ inside it are used, if there); a data set of
torchvision as timm names it (torch/cifar10, torch/image_folder); or an image data set of the hub (or a local folder
that datasets can load). Model: a name that timm knows, hf-hub:NAME, or a local folder.
{WRITES.rstrip()}
Also confusion.csv and .png, predictions.csv (each held-out image, or test image where there are any) and mistakes.png
(the most confident ones), all of the adapter that is kept.
"""
    examples = """
  unilora finetune vit --model vit_base_patch16_224.augreg_in21k --data flowers/
  unilora finetune vit --model vit_small_patch16_224 --data uoft-cs/cifar10 --limit 5000 --epochs 1
  unilora finetune vit --model vit_small_patch16_224 --data torch/cifar10 --data-dir ~/data --download
  unilora finetune vit --model vit_base_patch16_224 --data flowers/ --augment timm --aa rand-m9-mstd0.5-inc1 \\
      --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --drop-path 0.1 --epochs 30
  unilora finetune vit --model vit_small_patch16_224 --checkpoint mine.pth --data photos/ --bad-images skip
  unilora finetune vit --model vit_tiny_patch16_224 --no-pretrained --model-arg img_size=32 --data digits/ --d 2000
  unilora finetune vit --recipe vision/vit-base/pets --seed 1
"""
    group = Source.group
    no_pretrained: bool = option("random weights instead of pretrained ones", False, action="store_true")
    checkpoint: File | None = option(
        "pretrained weights from a file (.safetensors, .pth; .npz of some models)", instead_of="no-pretrained"
    )
    data_dir: Folder | None = option("where data of torchvision are")
    download: bool = option("let torchvision fetch them, if they are not there", False)
    test_data: str | None = option("scored once, at the end, with the adapter that is kept", metavar="DATA")
    test_split: str | None = option("the split or folder of the data for that (default: test/ beside val/)")
    image_column: str | None = option("of a hub data set (default: the one that holds images)")
    label_column: str = option("of a hub data set", "label")
    bad_images: Literal["stop", "skip"] = option(
        "an image that does not decode ends the run (one to test on, before it begins); or all are decoded once "
        "before, and such are left out",
        "stop",
    )
    targets: Selection | None = _layers(WORDS["vit"])


@dataclass(frozen=True, kw_only=True)
class Text(Finetune, Memory):
    """The options of `unilora finetune text`."""

    word, purpose = "text", "fine-tune a text classifier of transformers"
    details = f"""
Data: a .tsv, .csv, .jsonl or .parquet file with a column of texts and one of labels, or a data set of the hub (or a
local folder that datasets can load). Model: anything that AutoModelForSequenceClassification loads.
{WRITES}"""
    examples = """
  unilora finetune text --model roberta-base --data train.tsv --eval-data dev.tsv
  unilora finetune text --model roberta-base --data nyu-mll/glue --subset mrpc \\
      --text-column sentence1 --pair-column sentence2
  unilora finetune text --model roberta-base --data nyu-mll/glue --subset stsb --regression \\
      --text-column sentence1 --pair-column sentence2
  unilora finetune text --recipe glue/roberta-base/cola --seed 1
  unilora finetune text --model ./my-bert --data reviews.csv --text-column review --label-column stars --bf16
"""
    group = Source.group
    text_column: str | None = option("of the texts (default: sentence or text)")
    pair_column: str | None = option("of the second texts, for tasks on pairs")
    label_column: str = option("of the labels: words or integers", "label")
    regression: bool = option("the labels are numbers: one output, squared error", False)
    length: Positive = option("tokens at most", 128)
    metric: Names | None = option(
        "comma list of accuracy, f1, mcc; with --regression of pearson, spearman (default: accuracy; pearson and "
        "spearman)"
    )
    targets: Selection | None = _layers(WORDS["text"])


@dataclass(frozen=True, kw_only=True)
class Lm(Finetune, Memory):
    """The options of `unilora finetune lm`."""

    word, purpose = "lm", "fine-tune a causal language model of transformers"
    details = f"""
Data: a .txt file (cut into blocks of --length tokens); a .csv, .tsv, .jsonl, .json or .parquet file, or a data set of
the hub, with the columns "text" (joined and cut likewise); "prompt" and "response" (or "completion"), "question" and
"answer", "query" and "response", "instruction", "output" and perhaps "input"; or "messages" or "conversations" (lists
of {{"role", "content"}} or {{"from", "value"}}; the tokenizer's chat template makes a text of them, "tools" and all).
Model: anything that AutoModelForCausalLM loads. Reported: loss and perplexity, before and after.
{WRITES}"""
    examples = """
  unilora finetune lm --model HuggingFaceTB/SmolLM2-135M --data book.txt --length 512
  unilora finetune lm --model meta-llama/Llama-3.2-1B --data instructions.jsonl --response-only --bf16
  unilora finetune lm --model Qwen/Qwen3-0.6B --data chats.jsonl --response-only --packing --load-in-4bit
  unilora finetune lm --recipe math/mistral-7b --batch-size 4 --accumulate 16
  unilora finetune lm --model gpt2 --data roneneldan/TinyStories --limit 2000
"""
    group = Source.group
    text_column: str | None = option("of whole texts (default: text)")
    prompt: str | None = option(
        "the words of a prompt, with columns in braces: 'Question: {question} Answer:'", metavar="TEXT"
    )
    response_column: str | None = option("of the responses to --prompt (default: by name)")
    response_only: bool = option("no loss on the tokens of the prompt; in a chat, on the assistant's turns only", False)
    packing: bool = option("several examples in one block of --length tokens; none attends to another", False)
    shard: bool = option(
        "each process of torchrun holds a part of the base's weights (FSDP2), for large ones", False, scope="computing"
    )
    length: Positive = option("tokens at most", 256)
    metric: Names | None = option(
        "comma list of perplexity and exact-match (of the final number in an answer that the model writes to a "
        "held-out prompt, as for GSM8K) (default: perplexity)"
    )
    eval_prompts: Positive = option("held-out prompts answered for exact-match", 100)
    max_new_tokens: Positive = option("of an answer", 256)
    targets: Selection | None = _layers(WORDS["lm"])
    lora_rate: Rate = 2e-4
    head_rate: Rate = 1e-3
    batch_size: Positive = 8


TASKS: dict[str, type[Finetune]] = {task.word: task for task in (Vit, Text, Lm)}
