"""Bad input: an error that names the module and the remedy, and a model that is as it was."""

import pytest
import torch
from small_models import Conv1D, Mlp, assert_unchanged, mlp, snapshot
from torch import nn

import unilora_torch
from unilora_core import SpecError, TargetError, UniLoraError
from unilora_torch import Target


def refused(error, match, model=None, *args, **kwargs):
    model = mlp() if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match):
        unilora_torch.attach(model, *args, **kwargs)
    assert_unchanged(model, before)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [0, -3, 325, 10**9])
def test_d_out_of_range(d):
    message = (
        rf"expected 1 ≤ d ≤ min\(D, 2\^31\), got d = {d} with D = 324; .* a sixteenth of the numbers of LoRA at rank 4"
    )
    refused(SpecError, message, rank=4, d=d)


@pytest.mark.parametrize("d", [1.5, "many", None])
def test_d_that_is_no_integer(d):
    refused(SpecError, "d must be an integer, got", d=d)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(rank):
    refused(SpecError, rf"expected rank ≥ 1, got {rank}; LoRA ranks are usually 4 to 64", rank=rank)


def test_rank_that_is_no_integer():
    refused(SpecError, "expected rank ≥ 1, got 1.5", rank=1.5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"seed": -1}, "0 ≤ seed < 2"),
        ({"grouping": "random"}, "unknown grouping 'random'; known: balanced"),
        ({"start": "warm"}, "unknown start 'warm'; known: paper, identity, zero"),
        ({"bound": 0.0}, "bound must be a positive float32 number, got 0.0"),
        ({"bound": float("nan")}, "bound must be a positive float32 number, got nan"),
    ],
)
def test_a_field_of_the_spec_out_of_range(wrong, match):
    refused(SpecError, match, **wrong)


# ---- nothing to adapt -----------------------------------------------------------------------------------------------


def test_no_match_lists_the_nearest_names():
    refused(TargetError, r"no module matches \('donw',\); the nearest linear layers end in \['down'", None, ["donw"])
    refused(TargetError, r"no module matches 'upp'.*\['up'.*regular expression of the whole name", None, "upp")
    refused(
        TargetError, r"no module matches \('zzz',\).*\['up', 'down', 'head'\], for example 'blocks.0.up'", None, ["zzz"]
    )
    many = nn.ModuleDict({f"query{i}": nn.Linear(6, 6) for i in range(5)})
    refused(TargetError, r"nearest linear layers end in \[('query\d'(, )?){3}\], for example", many, ["quer"])


def test_an_empty_list():
    refused(TargetError, r"no module matches \(\)", None, [])


def test_a_model_without_linear_layers():
    refused(TargetError, "the model has no linear layer at all", nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_everything_excluded():
    refused(TargetError, r"all 5 modules selected by 'all-linear' are excluded by '\.\*'", exclude=".*")


def test_everything_saved_in_full():
    refused(
        TargetError, r"every target lies inside modules_to_save = \('head',\)", None, "head", modules_to_save=["head"]
    )


def test_a_module_to_save_that_is_missing():
    refused(
        TargetError,
        r"modules_to_save: the model has no module 'hed'; the nearest are \['head'\]",
        modules_to_save=["hed"],
    )


def test_what_is_no_regular_expression():
    refused(TargetError, r"'\*\.up' is not a regular expression.*give a list for plain names", None, "*.up")


# ---- what cannot be adapted -----------------------------------------------------------------------------------------


def test_no_linear_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(1, 1, 1))
    refused(TargetError, "^1: a ConvTranspose2d is no linear layer.*exclude it", model, ["1"])
    refused(TargetError, "^blocks: a ModuleList is no linear layer", mlp(), ["blocks"])
    refused(TargetError, "^0: a Conv1D is no linear layer", nn.Sequential(Conv1D(4, 4)), ["0"])


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (Target("x", "heed", 6, 3), r"^heed: no such module; the nearest are \['head'\]"),
        (
            Target("x", "head", 7, 3),
            "^head: the target expects a linear layer of 7 inputs and at least 3 outputs, Linear has 6",
        ),
        (Target("x", "head", 6, 3, 1), "^head: .* at least 4 outputs, Linear has 6 and 3"),
        (Target("x", "head", 6, 2, -1), "^head: "),
        (Target("x", "blocks", 6, 3), "^blocks: .*ModuleList has 0 and 0"),
    ],
)
def test_a_hand_written_target_that_does_not_fit(target, match):
    refused(TargetError, match, None, [target])


@pytest.mark.parametrize("rows", [(0, 0), (0, 2), (2, 0), (1, 2)])
def test_overlapping_blocks(rows):
    blocks = [Target(name, "head", 6, 2 if row < 2 else 1, row) for name, row in zip("qk", rows, strict=True)]
    if rows in ((0, 2), (2, 0)):
        unilora_torch.attach(mlp(), blocks)
    else:
        refused(TargetError, "q and k adapt the same outputs of head", None, blocks)


def test_two_targets_of_one_name():
    blocks = [Target("q", "head", 6, 1, 0), Target("q", "head", 6, 1, 1)]
    refused(SpecError, "'q.A' occurs twice", None, blocks)


def test_two_modules_that_share_a_weight():
    model = mlp()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    refused(TargetError, r"^blocks.0.up: its weight is tied, it is also blocks.1.up.weight.*[Ee]xclude it", model)
    model = mlp()
    model.embedding = nn.Embedding(3, 6)
    model.embedding.weight = model.head.weight
    refused(TargetError, r"^head: its weight is tied, it is also embedding.weight.*untie", model, ["head"])
    unilora_torch.attach(model, exclude="head")


def test_a_layer_registered_under_two_names():
    model = mlp()
    model.blocks[1] = model.blocks[0]
    refused(TargetError, r"^blocks.0.up: its weight is tied, it is also blocks.1.up.weight", model)


def test_weights_without_values():
    with torch.device("meta"):
        model = Mlp()
    names = list(model.state_dict())
    with pytest.raises(TargetError, match=r"^blocks.0.up: its weight is on the meta device.*load the model's weights"):
        unilora_torch.attach(model)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_weights_of_integers(dtype):
    model = mlp()
    model.head.weight = nn.Parameter(torch.zeros(3, 6, dtype=dtype), requires_grad=False)
    refused(TargetError, rf"^head: its weight holds {dtype}, which an nn.Linear cannot multiply by", model)


def test_messages_are_those_of_one_family():
    for wrong in ({"targets": ["nope"]}, {"d": 0}):
        with pytest.raises(UniLoraError):
            unilora_torch.attach(mlp(), **wrong)
        with pytest.raises(ValueError, match=r"nope|d = 0"):
            unilora_torch.attach(mlp(), **wrong)


def test_names_and_targets_in_one_list_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="got both in one"):
        unilora_torch.attach(model, ["0", unilora_torch.Target("1", "1", 4, 4)])
