"""Choice of the adapted layers: names go in, a checked tuple of `Target` comes out."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from unilora_core import TargetError
from unilora_core.header import TargetRow
from unilora_core.layout import integer
from unilora_core.selecting import given, matches
from unilora_torch.replaced import convolves

__all__ = [
    "Target",
    "attention_targets",
    "block_of",
    "conv_target",
    "embedding_target",
    "features",
    "find_targets",
    "is_conv",
    "is_linear",
    "layer_target",
    "linear_target",
    "matrices_in",
    "matrix_of",
    "nearest",
    "parameter_target",
    "row_of",
    "shaped",
    "target_of",
    "weight_name",
]


@dataclasses.dataclass(frozen=True)
class Target:
    """One low-rank update: B·A beside a layer, or beside a block of its outputs; or B·A added to a parameter.

    Attributes:
        name: the prefix of its two factors, ``name.A`` (r, in_features) and ``name.B`` (out_features, r).
        module: the qualified name of the layer; with ``parameter``, of the module whose forward pass reads it.
        in_features: the width of the layer's input; for an embedding, the size of its vocabulary; for a convolution,
            the channels that a kernel sees times its size.
        out_features: the width of the outputs that are adapted; for a convolution, their channels.
        first_row: where these outputs start in the layer's output; not 0 for the k and v blocks of a fused qkv.
        transposed: whether the weight is stored (in, out), as in transformers' Conv1D and in every embedding.
        parameter: None for a layer, whose output gets B·A·x. Else the name, inside ``module``, of a parameter that is
            W + B·A while ``module`` runs: ``"gate_up_proj"``, or ``"qkv.weight"`` where a module uses the weight of a
            layer without calling it.
        experts: how many matrices a 3-D parameter stacks, each with factors of its own: ``name.A`` is then (experts, r,
            in_features), ``name.B`` (experts, out_features, r). 0 for a plain matrix.
    """

    name: str
    module: str
    in_features: int
    out_features: int
    first_row: int = 0
    transposed: bool = False
    parameter: str | None = None
    experts: int = 0

    def __post_init__(self) -> None:
        """Take the integers of any library for sizes."""
        for name in ("in_features", "out_features", "first_row", "experts"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, integer(value))
            except TypeError:
                raise TargetError(f"Target {self.name!r}: {name} must be an integer, got {value!r}.") from None


def is_linear(module: nn.Module) -> bool:
    """Say whether a module maps (…, in) to (…, out): an `nn.Linear`, or a layer that says so by integer ``in_features``
    and ``out_features``, as those of GPTQ, AWQ, HQQ and EETQ do. Its weight, if it has one, is never read.
    """
    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    weight = getattr(module, "weight", None)  # some modules without a weight have such sizes, too
    inside = any(is_conv(child) or is_linear(child) for child in module.modules() if child is not module)
    return not inside and (not isinstance(weight, Tensor) or weight.dim() == 2)


def linear_target(name: str, module: nn.Module) -> Target:
    """Make the `Target` of a linear layer; see `is_linear`.

    Raises:
        TargetError: the module is of another kind.
    """
    if is_linear(module):
        return Target(name, name, int(module.in_features), int(module.out_features))
    matrices = sorted(_matrices(module))
    raise TargetError(
        f"{name}: a {type(module).__name__} is no linear layer; unilora adapts nn.Linear here, and what says its "
        "in_features and out_features. "
        + (f"Name its parameters {matrices}" if matrices else "Name its linear submodules")
        + ", or exclude it."
    )


def is_conv(module: nn.Module) -> bool:
    """Say whether a module is an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`; a transposed convolution is not."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def conv_target(name: str, module: nn.Module) -> Target:
    """Make the `Target` of a convolution: B·A as its weight has the shape (out, in / groups, *kernel).

    A convolution with groups, or whose forward pass is not linear in its weight, is adapted through its parameter
    ``weight``.
    """
    width, height = features(module)
    return Target(name, name, width, height, parameter=None if convolves(module) else "weight")


def embedding_target(name: str, module: nn.Embedding) -> Target:
    """Make the `Target` of an embedding: A (r, vocabulary), B (width, r)."""
    return Target(name, name, module.num_embeddings, module.embedding_dim, transposed=True)


def layer_target(name: str, module: nn.Module) -> Target:
    """Make the `Target` of an `nn.Embedding`, of a convolution or of a linear layer.

    Raises:
        TargetError: the module is of another kind.
    """
    if isinstance(module, nn.Embedding):
        return embedding_target(name, module)
    return conv_target(name, module) if is_conv(module) else linear_target(name, module)


def parameter_target(module: str, parameter: str, weight: Tensor, transposed: bool = False) -> Target:
    """Make the `Target` of a parameter: a matrix, the matrices of all experts in one, or the kernels of a 2-D or 3-D
    convolution.

    Args:
        module: the name of the module whose forward pass reads it.
        parameter: its name inside that module.
        weight: (out, in) or (experts, out, in); with ``transposed``, (in, out) or (experts, in, out); or
            (out, in / groups, *kernel).

    Raises:
        TargetError: the parameter has fewer than two axes.
    """
    name = f"{module}.{parameter}" if module else parameter
    experts, width, height = matrices_in(name, weight, weight.dim() == 3, transposed)
    return Target(name, module, width, height, 0, transposed, parameter, experts)


def matrices_in(name: str, weight: Tensor, stacked: bool, transposed: bool = False) -> tuple[int, int, int]:
    """Return how many matrices a parameter stacks, their inputs and their outputs.

    A parameter that stacks none is one matrix (the first number is 0); the kernels of a convolution are its rows.

    Raises:
        TargetError: the parameter has fewer than two axes, or too many to be transposed.
    """
    stacked = stacked and weight.dim() == 3
    if weight.dim() < 2 or (transposed and weight.dim() > 2 + stacked):
        raise TargetError(f"{name}: expected a parameter of 2 or 3 axes, got {tuple(weight.shape)}; exclude it.")
    experts = len(weight) if stacked else 0
    height, width = weight.shape[1:] if stacked else (len(weight), weight[0].numel())
    return (experts, height, width) if transposed else (experts, width, height)


def attention_targets(name: str, module: nn.MultiheadAttention) -> dict[str, Target]:
    """Make the `Target` of each of ``"q"``, ``"k"``, ``"v"`` and ``"proj"``, all parameters of the attention: it calls
    no layer, not even its ``out_proj``.
    """
    fused = module.in_proj_weight is not None
    widths = {"q": module.embed_dim, "k": module.kdim, "v": module.vdim}
    found = {}
    for row, (word, width) in enumerate(widths.items()):
        parameter, first_row = ("in_proj_weight", row * module.embed_dim) if fused else (f"{word}_proj_weight", 0)
        prefix = f"{name}.{word}".lstrip(".")
        found[word] = Target(prefix, name, width, module.embed_dim, first_row, parameter=parameter)
    return found | {"proj": _attention_matrices(name, module)[-1]}


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str | Target],
    *,
    exclude: str | Iterable[str] = (),
    to_target: Callable[[str, nn.Module], Target] = layer_target,
    all_linear: Callable[[nn.Module], bool] = is_linear,
) -> tuple[Target, ...]:
    """Return the targets that ``targets`` selects, in the order of `model.named_modules`.

    Names are the names of modules, and of the parameters of two or three axes that a module uses by itself, such as
    ``mlp.experts.gate_up_proj``.

    Args:
        targets: ``"all-linear"`` (linear layers and the matrices of `nn.MultiheadAttention`; no embeddings,
            convolutions or other parameters); or a regular expression that the whole name must match; or a list of
            names, each of which selects what it equals or what ends in ``.name``; or a list of `Target`, taken as it
            is.
        exclude: a regular expression or a list of names, likewise, to remove from the selection.
        to_target: a function that makes the `Target` of a selected module, or raises `TargetError`.
        all_linear: a function that says which modules ``"all-linear"`` means.

    Raises:
        TargetError: nothing is selected (the error lists the nearest names), or a selected module is no linear layer.
    """
    if not isinstance(targets, str):
        targets = tuple(targets)
        if made := given(targets, Target):
            return made
    candidates = _candidates(model, all_linear)
    linear = [
        name
        for name, found in candidates.items()
        if (_is_attention(model.get_submodule(found.module)) if isinstance(found, Target) else all_linear(found))
    ]
    chosen = linear if targets == "all-linear" else [name for name in candidates if matches([name], targets)]
    kept = [name for name in chosen if not matches([name], exclude)]
    if not kept:
        raise TargetError(_no_match(targets, exclude, chosen, linear))
    found = ((name, candidates[name]) for name in kept)
    return tuple(each if isinstance(each, Target) else to_target(name, each) for name, each in found)


def features(module: nn.Module, transposed: bool = False) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer, an embedding or a convolution; (0, 0) for another module."""
    if is_linear(module):
        return int(module.in_features), int(module.out_features)
    if is_conv(module):
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return 0, 0
    height, width = weight.shape
    return (height, width) if transposed else (width, height)


def row_of(target: Target, sized: bool) -> tuple:
    """Return what a file's header says of a target (`unilora_core.header.write_targets`).

    Args:
        sized: whether to add its sizes, which the factors of a pair tell by themselves.
    """
    row = (target.name, target.module, target.first_row, target.transposed)
    if sized:
        return (*row, target.parameter, target.in_features, target.out_features, target.experts)
    return row if target.parameter is None else (*row, target.parameter)


def target_of(row: TargetRow, module: nn.Module) -> Target:
    """Make the target of a row of the header, with the widths that the file's layout gives: the inverse of `row_of`.

    The module says whether the weight is transposed: a Conv1D that is quantised becomes a linear layer, and an
    adapter that was trained beside one fits the other.
    """
    transposed = row.transposed
    if row.parameter is None:
        linear = is_linear(module)
        transposed = not linear and (
            transposed or isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        )
    sizes = (row.in_features, row.out_features, row.first_row, transposed)
    return Target(row.name, row.module, *sizes, row.parameter, row.experts)


def weight_name(target: Target) -> str:
    """Return the qualified name of the weight that a target adapts (a quantised layer may have none of that name)."""
    parameter = "weight" if target.parameter is None else target.parameter
    return f"{target.module}.{parameter}".lstrip(".")


def shaped(update: Tensor, target: Target, weight: Tensor | None) -> Tensor:
    """Return B·A (out, in), or (experts, out, in), in the orientation of a target's weight, and as its kernels."""
    if target.transposed:
        return update.mT
    if weight is not None and weight.dim() > 2 and not target.experts:
        return update.unflatten(1, weight.shape[1:])
    return update


def matrix_of(weight: Tensor, target: Target) -> Tensor:
    """Return the part of a weight that a target adapts as (out, in), or (experts, out, in): the inverse of `shaped`."""
    block = block_of(weight, target)
    if target.transposed:
        return block.mT
    return block if target.experts else block.flatten(1)


def block_of(weight: Tensor, target: Target) -> Tensor:
    """Return the part of a weight that a target adapts, as a view."""
    rows = slice(target.first_row, target.first_row + target.out_features)
    if target.transposed:
        return weight[..., rows]
    return weight[:, rows] if target.experts else weight[rows]


def nearest(model: nn.Module, name: str) -> list[str]:
    """Return the names of the model's modules that look most like ``name``."""
    return difflib.get_close_matches(name[:200], [other for other, _ in model.named_modules() if other], 3)


def _candidates(model: nn.Module, all_linear: Callable[[nn.Module], bool]) -> dict[str, nn.Module | Target]:
    """Return each module by its name, or the target that a parameter makes, in the order of `model.named_modules`."""
    found: dict[str, nn.Module | Target] = {}
    for name, module in model.named_modules():
        if name and name not in found:
            found[name] = module
        if _is_attention(module):
            found |= {target.name: target for target in _attention_matrices(name, module)}
        elif not all_linear(module):
            transposed = getattr(module, "is_transposed", False)  # transformers marks its experts so
            made = (parameter_target(name, key, weight, transposed) for key, weight in _matrices(module).items())
            found |= {target.name: target for target in made}
    return found


def _is_attention(module: nn.Module) -> bool:
    """Say whether a module is PyTorch's attention, or computes as it does; other attention may call its layers."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def _attention_matrices(name: str, module: nn.MultiheadAttention) -> list[Target]:
    """Return the targets of an attention's whole matrices; the last is ``out_proj``, under the layer's name."""
    own = [parameter_target(name, key, weight) for key, weight in _matrices(module).items() if key.endswith("weight")]
    out = parameter_target(name, "out_proj.weight", module.out_proj.weight)
    return [*own, dataclasses.replace(out, name=out.name.removesuffix(".weight"))]


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of two or three axes that a module uses by itself."""
    if is_linear(module) or isinstance(
        module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.Conv1d, nn.ConvTranspose1d)
    ):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if parameter.dim() in (2, 3)}


def _no_match(targets: str | Iterable[str | Target], exclude: object, chosen: list[str], linear: list[str]) -> str:
    if chosen:
        return f"all {len(chosen)} modules selected by {targets!r} are excluded by {exclude!r}."
    if not linear:
        return f"no module matches {targets!r}: the model has no linear layer at all."
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))
    words = [targets] if isinstance(targets, str) else [str(target) for target in targets]
    near = [match for word in words for match in difflib.get_close_matches(word.rsplit(".", 1)[-1], ends, 3, 0.4)]
    return (
        f"no module matches {targets!r}; the nearest linear layers end in {list(dict.fromkeys(near)) or ends[:8]}, "
        f"for example {linear[0]!r}. A list holds names or endings, a string is a regular expression of the whole name."
    )
