"""What P costs at any size: slices of θ_D, plans of large models, and the bytes that processes send in each step.

    python benchmarks/scale.py             # some ten minutes on two cores, no GPU, no network; Linux

Each case has a process of its own, or one for each of the processes that train. Bytes are counted twice: what is
handed to collectives, by the operators of `torch.distributed` as they are dispatched, and what the kernel says that the
sockets of a process have sent (TCP_INFO), over gloo on one machine. Writes ``benchmarks/results/scale.json`` and the
tables of ``docs/scale.md``.
"""

import contextlib
import functools
import io
import json
import os
import socket
import statistics
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import common  # noqa: E402
import numpy as np  # noqa: E402

from unilora_core import Layout, ProjectionSpec, read_adapter  # noqa: E402
from unilora_core.frames import Sizes  # noqa: E402
from unilora_core.methods import plan_spec  # noqa: E402

PAGE = common.DOCS / "scale.md"
ROUNDS = 1 if common.SMOKE else 3


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the processor, which others on the machine do not change, and what came back."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


# ---- slices of θ_D -----------------------------------------------------------------------------------------------

SIZES = [10**5, 10**6] if common.SMOKE else [10**7, 10**8, 10**9, 10**12]
TRAINED, SLICE, SLICES = (2**10, 2**12, 2) if common.SMOKE else (2**20, 2**20, 16)


def slices(D: int) -> dict[str, float]:
    """Seconds for a million numbers, of slices evenly spread over all of θ_D, and the process's most memory."""
    spec = ProjectionSpec(Layout([("all.A", (D,))]), TRAINED)
    table = spec.init() * spec.scale()
    columns = max(1, SLICE * TRAINED // D)
    works = {
        "groups": lambda at: spec.groups(at, at + SLICE).size,
        "numbers of θ_D": lambda at: table[spec.groups(at, at + SLICE)].size,
        "members": lambda at: spec.members(at * TRAINED // D, at * TRAINED // D + columns)[1].size,
    }
    spent, count, found = Counter(), Counter(), {}
    for at in np.linspace(0, D - max(SLICE, columns * D // TRAINED), SLICES).astype(np.int64).tolist():
        for name, work in works.items():
            seconds, size = timed(functools.partial(work, at))
            spent[name] += seconds
            count[name] += size
    for name in works:
        found[name] = 1e6 * spent[name] / count[name]
    return found | {"peak_bytes": common.peak()}


# ---- plans of large models -----------------------------------------------------------------------------------------

LLAMAS = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 80), "405B": (16384, 53248, 126)}
"""Of Llama-3.1: the width of the model, of its MLP, and its layers; keys and values have 1,024 numbers in each."""
KEYS, WORDS, RANK = 1024, 128256, 16
ATTACHED = {"8B": ["cached"], "405B": ["cached", "computed"]}
if common.SMOKE:
    LLAMAS, WORDS, ATTACHED = {"8B": (64, 96, 1)}, 128, {"8B": ["cached"]}


def widths(name: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name → in and out."""
    width, inner, _ = LLAMAS[name]
    keys = min(KEYS, width)
    attention = {"q_proj": (width, width), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (width, width)}
    return attention | {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}


def layers(name: str) -> list[tuple[str, Sizes]]:
    """Every adapted layer of a model: its name and sizes."""
    blocks = range(LLAMAS[name][2])
    return [(f"layers.{block}.{layer}", Sizes(*sides)) for block in blocks for layer, sides in widths(name).items()]


def base_parameters(name: str) -> int:
    """How many numbers the model has, its embeddings and norms among them."""
    width, _, blocks = LLAMAS[name]
    block = sum(height * across for height, across in widths(name).values()) + 2 * width
    return blocks * block + 2 * WORDS * width + width


def skeleton(name: str) -> object:
    """The transformers model in bfloat16 on the meta device."""
    import torch
    import transformers

    width, inner, blocks = LLAMAS[name]
    heads = width // 128 if width > 128 else 1
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).bfloat16()


def planned(found: Iterable[tuple[str, Sizes]]) -> ProjectionSpec:
    """Uni-LoRA's spec, with its own d."""
    return plan_spec(found, rank=RANK)


def plan_torch(name: str) -> Callable[[], ProjectionSpec]:
    """From a model on the meta device."""
    from unilora_torch import find_targets

    model, names = skeleton(name), list(widths(name))
    return lambda: planned(
        (each.name, Sizes(each.in_features, each.out_features)) for each in find_targets(model, names)
    )


def plan_jax(name: str) -> Callable[[], ProjectionSpec]:
    """From a tree of shapes."""
    import jax
    import jax.numpy as jnp

    import unilora_jax

    def made() -> dict:
        return {each: {"kernel": jnp.zeros((sides.in_features, sides.out_features))} for each, sides in layers(name)}

    shapes = jax.eval_shape(made)
    return lambda: unilora_jax.plan(shapes, ".*kernel", rank=RANK).spec


PLANS = {"core": lambda name: lambda: planned(layers(name)), "torch": plan_torch, "jax": plan_jax}


def plans(library: str) -> dict[str, dict]:
    """Of each model: seconds, how much the process grew, D and d."""
    found = {}
    PLANS[library]("8B")()  # what is made once
    for name in LLAMAS:
        run = PLANS[library](name)
        before = common.peak()
        seconds, spec = timed(run)
        found[name] = {"D": spec.D, "d": spec.d, "seconds": seconds, "peak_growth_bytes": common.peak() - before}
    return found


def attach(name: str, groups: str) -> dict[str, object]:
    """`unilora_torch.attach` with a table of groups or without; each weight is one number seen as many."""
    import attach_8b

    import unilora_torch

    model = attach_8b.with_values(skeleton(name))
    before = common.peak()
    seconds, adapter = timed(lambda: unilora_torch.attach(model, list(widths(name)), rank=RANK, groups=groups))
    size = sum(tensor.nbytes for tensor in (*adapter.parameters(), *adapter.projection.tensors))
    return {"seconds": seconds, "bytes": size, "peak_growth_bytes": common.peak() - before}


# ---- bytes that are sent ---------------------------------------------------------------------------------------------

PROCESSES = [2] if common.SMOKE else [2, 4]
WIDTH = 64 if common.SMOKE else 512
NUMBERS = 512 if common.SMOKE else 32768
STEPS = 3
SMALL = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 8, "vocab_size": 256, "tie_word_embeddings": False}
METHODS = {"uni-lora, r = 4": 4, "uni-lora, r = 16": 16, "PEFT LoRA, r = 4": 4, "full": None}
COMMAND = {
    "uni-lora, r = 4": ("--rank", 4, "--d", NUMBERS // 16),
    "uni-lora, r = 16": ("--rank", 16, "--d", NUMBERS // 16),
    "--method lora, r = 4": ("--method", "lora", "--rank", 4),
}


def sent() -> dict[str, int]:
    """The bytes that each TCP socket of this process has sent, without headers and what was sent again."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket
            if (name := os.readlink(link)).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as each:
                    info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    once, again = struct.unpack_from("QQ", info, 200)
                    found[name] = once - again
    return found


def since(before: dict[str, int], after: dict[str, int]) -> int:
    """How much more, by all that were there at the end."""
    return sum(count - before.get(name, 0) for name, count in after.items())


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """The bytes given to collectives, by kind; ``sent`` the bytes that left; both complete when it ends."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, int] = Counter()

    def size(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        return max(map(size, value), default=0) if isinstance(value, (list, tuple)) else 0

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator: object, types: object, args: tuple = (), kwargs: dict | None = None):
            if operator.namespace == "c10d":
                found[operator.__name__.partition(".")[0].strip("_")] += size(args)  # the longer of in and out
            return operator(*args, **(kwargs or {}))

    before = sent()
    with Seen():
        yield found
    found["sent"] = since(before, sent())


def small_model(method: str) -> tuple[object, int]:
    """A small Llama with this method, and how many numbers train."""
    import torch
    import transformers

    import unilora_torch

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    names = list(widths("8B"))
    if method.startswith("uni-lora"):
        adapter = unilora_torch.attach(model, names, rank=METHODS[method], d=NUMBERS)
        assert adapter.theta_d.numel() == NUMBERS
    elif method.startswith("PEFT"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=METHODS[method], target_modules=names))
    elif method == "base":
        model.requires_grad_(False)
        model.enable_input_require_grads()  # so that it has a backward pass
    return model, sum(each.numel() for each in model.parameters() if each.requires_grad)


def sharded(model: object) -> object:
    """FSDP2: θ_d, each layer, and the rest are units."""
    from torch.distributed.fsdp import fully_shard

    if hasattr(model, "unilora"):
        fully_shard(model.unilora)
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module)
    return fully_shard(model)


def steps(wrap: Callable[[object], object], method: str) -> dict[str, float]:
    """What a process hands over and sends in a step of training, after a first step that is not counted."""
    import torch
    import torch.distributed as dist

    model, trained = small_model(method)
    net = wrap(model)
    words = torch.arange(16).view(2, 8)

    def step() -> None:
        net(input_ids=words, labels=words).loss.backward()

    for _ in range(2):  # DDP settles its buckets in the second
        step()
    dist.barrier()
    with counting() as found:
        for _ in range(STEPS):
            step()
    dist.barrier()
    return {"trained": trained, **{name: size / STEPS for name, size in found.items()}}


def loops() -> dict[str, dict]:
    """DDP and FSDP2: method → what a step costs."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    found = {"DDP": {method: steps(DistributedDataParallel, method) for method in METHODS}}
    found["FSDP2"] = {method: steps(sharded, method) for method in ["base", *METHODS]}
    dist.destroy_process_group()
    return found


def run_of_command(words: Iterable[object]) -> dict[str, int]:
    """What one run of the command hands over, from its start to its end.

    What its sockets send is not read: they come and go with the run, and hold what the processes meet by.
    """
    from unilora_cli.main import main as run

    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # that of the last group may still be taken
    with counting() as found, contextlib.redirect_stdout(io.StringIO()):
        if code := run([str(word) for word in words]):
            raise SystemExit(code)
    del found["sent"]
    return found


def process(rank: int, folder: Path) -> None:
    """One of those that train: every case, then what it found as JSON."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = loops()
    cases = list(COMMAND)[:1] if common.SMOKE else COMMAND
    found["unilora finetune"] = {case: command_steps(case, folder) for case in cases}
    (folder / f"{rank}.json").write_text(json.dumps(found), "utf-8")


def worker(folder: Path, count: int) -> None:
    """Import what is needed once, and fork so many processes."""
    import peft  # noqa: F401
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import unilora_cli.main  # noqa: F401
    import unilora_torch  # noqa: F401

    torch.multiprocessing.start_processes(process, (folder,), nprocs=count, start_method="fork")


def pictures(folder: Path) -> Path:
    """A tiny folder of images, two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("one", "two"):
            (folder / split / kind).mkdir(parents=True)
            for at in range(16 if split == "train" else 2):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{at}.png")
    return folder


def command_steps(method: str, folder: Path) -> dict[str, float]:
    """What a step of `unilora finetune` costs: a run of six steps, less one of two."""
    model = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--model-arg", "img_size=32")
    fixed = ("--data", folder / "images", "--augment", "none", "--device", "cpu", "--batch-size", 1, "--epochs", 1)
    words, runs = ("finetune", "vit", *model, "--model-arg", "depth=2", *fixed, *COMMAND[method]), {}
    for last in (2, 6):
        out = folder / f"{method} {last}"
        runs[last] = run_of_command((*words, "--max-steps", last, "--out", out))
    file = read_adapter(out / "adapter.safetensors")
    trained = file.spec.d + sum(tensor.size for tensor in file.tensors.values())
    kinds = {name: (runs[6][name] - size) / 4 for name, size in runs[2].items()}
    return {"trained": trained, **{name: size for name, size in kinds.items() if size}}


def together(count: int) -> dict[str, dict]:
    """Way of training → method → trained numbers, and the bytes of a step in each of so many processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder, "images"))
        common.again(__file__, "--worker", folder, str(count), **meeting, CUDA_VISIBLE_DEVICES="")
        found = [json.loads(Path(folder, f"{rank}.json").read_text("utf-8")) for rank in range(count)]
    return found[0]  # what it handed over, all did


# ---- the page --------------------------------------------------------------------------------------------------------


def measured(part: str, *words: str) -> dict:
    """A case in a process of its own."""
    return json.loads(common.again(__file__, "--measure", part, *words).splitlines()[-1])


def bytes_of(size: float) -> str:
    """In the unit that gives it one to three digits before the point."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:.3g} {unit}"


UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def models_table() -> str:
    """What follows from the layouts."""
    cells = [["Llama-3.1", "parameters", "D", "d", "groups, 4·D", "θ_d and AdamW, 16·d", "Uni-LoRA", "LoRA", "full"]]
    for name in LLAMAS:
        spec, size = planned(layers(name)), base_parameters(name)
        sizes = (4 * spec.D, 16 * spec.d, 4 * spec.d, 4 * spec.D, 2 * size)
        cells.append([name, f"{size:,}", f"{spec.D:,}", f"{spec.d:,}", *map(bytes_of, sizes)])
    return common.table(cells)


def slices_table(found: dict[str, dict]) -> str:
    """Seconds of a million numbers, and the memory of the process, for each D."""
    columns = [name for name in next(iter(found.values())) if name != "peak_bytes"]
    cells = [["D", *columns, "the process at most"]]
    for D, row in found.items():
        cells.append([D, *(f"{row[name]:.3f} s" for name in columns), bytes_of(row["peak_bytes"])])
    return common.table(cells)


def plans_table(found: dict[str, dict]) -> str:
    """Seconds and memory of a plan, for each library and model."""
    cells = [["", *LLAMAS]]
    for library, by_model in found.items():
        shown = (f"{row['seconds']:.2f} s, {bytes_of(row['peak_growth_bytes'])}" for row in by_model.values())
        cells.append([library, *shown])
    return common.table(cells)


def expected(row: dict[str, float], count: int) -> float:
    """What a process should send in a step, of what it handed over: a ring's, and gloo's scatter is a whole sum."""
    shares = {"allreduce": 2, "reduce_scatter_base": 2, "allgather_base": 1, "broadcast": 1}
    return (count - 1) / count * sum(share * row.get(name, 0) for name, share in shares.items())


def against(row: dict[str, float], count: int) -> str:
    """What was sent, where it was counted, and the formula."""
    counted = f"{row['sent']:,.0f} " if "sent" in row else ""
    return f"{counted}({expected(row, count):,.0f})"


def sent_table(found: dict[str, dict]) -> str:
    """What a step hands over and sends, for each way, method and number of processes."""
    kinds = {"allreduce": "added up", "allgather_base": "gathered", "reduce_scatter_base": "added up and scattered"}
    head = ["", "", "trained", *kinds.values(), *(f"sent, {count} processes (formula)" for count in found)]
    cells, first = [head], next(iter(found.values()))
    for way, by_method in first.items():
        for method, row in by_method.items():
            both = [against(found[count][way][method], int(count)) for count in found]
            cells.append([way, method, f"{row['trained']:,}", *(f"{row.get(kind, 0):,.0f}" for kind in kinds), *both])
    return common.table(cells)


def write_page(results: dict) -> None:
    """Put each table into its place of docs/scale.md."""
    tables = {"models": models_table(), "slices": slices_table(results["slices"])}
    tables |= {"plans": plans_table(results["plans"]), "sent": sent_table(results["sent"])}
    text = PAGE.read_text("utf-8")
    for name, made in tables.items():
        mark = f"<!-- {name}: written by python benchmarks/scale.py; do not edit -->\n"
        before, _, after = text.partition(mark)
        text = before + mark + made + "\n" + after[after.index("\n\n") + 1 :]
    PAGE.write_text(text, "utf-8")


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--measure", nargs="+", metavar="WORD", help="one case, in this process")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "COUNT"), help="the processes that train")
    arguments = parser.parse_args()
    if arguments.worker:
        folder, count = arguments.worker
        worker(Path(folder), int(count))
        return
    if arguments.measure:
        part, *words = arguments.measure
        run = {"slices": lambda D: slices(int(D)), "plans": plans, "attach": attach}[part]
        print(json.dumps(run(*words)))
        return
    turns = [{D: measured("slices", str(D)) for D in SIZES} for _ in range(ROUNDS)]
    results = {"slices": {f"{D:.0e}": medians([turn[D] for turn in turns]) for D in SIZES}}
    results["plans"] = {library: measured("plans", library) for library in PLANS}
    results["attach"] = {
        name: {groups: measured("attach", name, groups) for groups in ways} for name, ways in ATTACHED.items()
    }
    results["sent"] = {str(count): together(count) for count in PROCESSES}
    common.write("scale", results)
    write_page(results)


if __name__ == "__main__":
    main()
