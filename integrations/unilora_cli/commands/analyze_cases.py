"""What `unilora analyze` looks at: methods for the targets of a file, or of a small transformer."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from unilora_cli.console import CommandError, say
from unilora_cli.tasks.models import Base, build
from unilora_core import ProjectionSpec, SpecError, read_adapter
from unilora_core.frames import FRAMES, Sizes
from unilora_core.header import FROZEN, read_header
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS, method_of, plan_spec
from unilora_core.spec import known

__all__ = ["ALL", "Case", "Targets", "made_up", "of_file", "of_model", "planned"]

ABLATIONS = tuple(f"uni-lora/{name}" for name, each in MAPS.items() if each.groups and name != "balanced")
ALL = (*METHODS, *ABLATIONS)
"""Every method, and Uni-LoRA's with another grouping."""

LARGEST = 2**27
"""Rows of the largest P that is looked at: a gigabyte for each vector of so many. A file may state any sizes."""

PATIENCE = 1.0
"""Seconds that one product with P may take if the method was not named."""

Sized = tuple[tuple[str, Sizes], ...]
Arrays = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Targets:
    """What is adapted.

    Attributes:
        sizes: name and sizes of each.
        options: for methods that take them, where their defaults do not fit.
        frozen: spec → what its frame makes of each target's weight; without it the weights are random, N(0, 1/in).
    """

    sizes: Sized
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen: Callable[[ProjectionSpec], Arrays] | None = None


@dataclass(frozen=True)
class Case:
    """One P: its name in the table, and what `unilora_core.analyze` takes; of a pair P ends at θ_D."""

    name: str
    spec: ProjectionSpec
    targets: Sized | None
    frozen: Arrays


def made_up(layers: int, width: int) -> Targets:
    """q and v of each layer of a transformer, with random weights.

    VB-LoRA's codebook and FourierFT's frequencies are as small as the layers.
    """
    sizes = tuple((f"layers.{i}.{name}", Sizes(width, width)) for i in range(layers) for name in ("q", "v"))
    return Targets(sizes, options={"length": width, "vectors": 16, "frequencies": min(32, width * width)})


def of_file(path: str) -> tuple[Case, Targets]:
    """The P of an adapter file, and what it adapts.

    Raises:
        FileNotFoundError, CorruptFileError: the file.
        SpecError: a P that is too large to be looked at.
    """
    file = read_adapter(path)
    rows = read_header(path, file).targets
    sizes = tuple((row.name, Sizes(row.in_features, row.out_features, row.experts)) for row in rows)
    _refuse_large(file.spec, sizes)
    frozen: dict[str, dict[str, np.ndarray]] = {}
    for name, array in file.tensors.items():
        if name.startswith(FROZEN):
            target, _, piece = name.removeprefix(FROZEN).rpartition(".")
            frozen.setdefault(target, {})[piece] = array
    return _case(f"{Path(path).name} ({_name(file.spec)})", file.spec, sizes, frozen), Targets(sizes)


def _name(spec: ProjectionSpec) -> str:
    """METHOD, METHOD/GROUPING, or what it is made of where it is neither."""
    method = method_of(spec)
    if method is None:
        return f"{spec.frame} × {spec.grouping}"
    return method if METHODS[method].grouping == spec.grouping else f"{method}/{spec.grouping}"


def of_model(base: Base, wanted: str | tuple[str, ...] | None) -> Targets:
    """The targets of a base model, by default or as ``--targets`` says, and its own weights.

    Raises:
        CommandError: there is no such model.
        TargetError: nothing to adapt.
    """
    from unilora_torch.chains import sizes_of
    from unilora_torch.frozen import frozen_of

    attach = import_module("unilora_timm" if base.kind == "vit" else "unilora_transformers").attach
    model, _ = build(base)
    adapter = attach(model, wanted)
    found = adapter.targets
    adapter.detach()

    def frozen(spec: ProjectionSpec) -> Arrays:
        made = frozen_of(model, spec, found)
        return {name: {piece: array.numpy() for piece, array in arrays.items()} for name, arrays in made.items()}

    return Targets(tuple((target.name, sizes_of(target)) for target in found), frozen=frozen)


def planned(
    names: Iterable[str], targets: Targets, fields: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Case]:
    """A case for each name; of ``all``, those that these targets can have, and the others' reasons are printed.

    Args:
        names: methods, ``METHOD/GROUPING``, or ``all``.
        fields: ``rank``, ``d`` and ``seed``, for the methods that have one.
        options: name → value, for the methods that take them.

    Raises:
        SpecError: a method that there is not, or one that was named and that these targets cannot have.
        CommandError: an option that none of these methods takes.
    """
    every = [name for word in names for name in (ALL if word == "all" else (word,))]
    if stray := sorted(options.keys() - {key for name in every for key in _options(name)}):
        raise CommandError(f"--option {stray[0]}: none of these methods takes it.")
    found = []
    for name in every:
        try:
            case = _planned(name, targets, fields, {**targets.options, **options})
            _refuse_slow(case, asked_for=name in names)
            found.append(case)
        except SpecError as error:
            if name in names:
                raise
            say(f"left out: {name}: {error}")
    return found


def _method(name: str) -> tuple[str, str]:
    """The method and the grouping that METHOD or METHOD/GROUPING is."""
    method, _, grouping = name.partition("/")
    known("method", method, METHODS)
    known("grouping", grouping or METHODS[method].grouping, MAPS)
    return method, grouping or METHODS[method].grouping


def _options(name: str) -> set[str]:
    """The options that it takes."""
    method, grouping = _method(name)
    return {*FRAMES[METHODS[method].frame].options, *MAPS[grouping].options}


def _planned(name: str, targets: Targets, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Case:
    method, grouping = _method(name)
    spec = plan_spec(
        targets.sizes,
        method=method,
        rank=fields["rank"] if FRAMES[METHODS[method].frame].ranked else None,
        d="auto" if MAPS[grouping].fixed else fields["d"],
        seed=fields["seed"],
        grouping=grouping,
        options={key: options[key] for key in _options(name) & options.keys()},
    )
    _refuse_large(spec, targets.sizes)
    return _case(name, spec, targets.sizes, _of_weights(spec, targets))


def _case(name: str, spec: ProjectionSpec, sizes: Sized, frozen: Arrays) -> Case:
    """P of a pair ends at θ_D, whatever its factors are called."""
    return Case(name, spec, None if spec.frame == "pair" else sizes, frozen)


def _of_weights(spec: ProjectionSpec, targets: Targets) -> Arrays:
    """What the frame makes of the weights, where it makes something of them."""
    of_weight, rng, found = spec.form.of_weight, np.random.default_rng(spec.seed), {}
    if of_weight is None:
        return {}
    if targets.frozen is not None:
        return targets.frozen(spec)
    for name, each in targets.sizes:
        weight = rng.normal(0, each.in_features**-0.5, (*each.stack, each.out_features, each.in_features))
        found[name] = of_weight(weight.astype(np.float32), int(spec.chosen["rank"]))
    return found


def _refuse_large(spec: ProjectionSpec, sizes: Sized) -> None:
    """Refuse what memory has no room for.

    Raises:
        SpecError: P, or what it is made of, is too large.
    """
    form, rank, numbers = spec.form, int(spec.chosen.get("rank", 0)), spec.D
    for _, each in sizes if spec.frame != "pair" else ():
        whole, factors = each.in_features * each.out_features, rank * (each.in_features + each.out_features)
        numbers += max(1, each.experts) * (whole if form.dense or form.of_weight else factors)
    if numbers > LARGEST:
        raise SpecError(f"P has {numbers:,} numbers to a column, too many to look at; at most {LARGEST:,} are.")


def _refuse_slow(case: Case, asked_for: bool) -> None:
    """Refuse a P that takes long, unless it was asked for; told from some of its rows.

    Raises:
        SpecError: with the time of one product.
    """
    spec, rows = case.spec, min(64, case.spec.D)
    if asked_for or spec.map.groups is not None:
        return
    theta, kept = np.ones(spec.d, np.float32), spec.map.frozen(spec, np, None)
    start = time.perf_counter()
    spec.map.project(spec, theta, kept, 0, rows)
    seconds = (time.perf_counter() - start) * spec.D / rows
    if seconds > PATIENCE:
        raise SpecError(f"one product with P takes about {seconds:.0f} s here; name the method to wait for it.")
