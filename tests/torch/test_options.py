"""The options that editors complete are those that there are."""

import inspect

import numpy as np
import pytest
import torch

import unilora_torch
from unilora_core import SpecError, TargetError
from unilora_core.frames import FRAMES
from unilora_core.maps import MAPS
from unilora_core.methods import MethodOptions, check_options
from unilora_torch import Target
from unilora_torch.options import AttachOptions, LoadOptions, check_attach

OFFERED = {"targets", "exclude", "method", "modules_to_save", "model", "path"}
"""What the integrations have of their own."""


def words(function):
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}


def test_methods_offer_their_options():
    found = {
        name: type(value) for each in (*FRAMES.values(), *MAPS.values()) for name, value in dict(each.options).items()
    }
    assert MethodOptions.__annotations__ == found


def test_attach_and_load_offer_theirs():
    assert (
        set(AttachOptions.__annotations__) - set(MethodOptions.__annotations__) == words(unilora_torch.attach) - OFFERED
    )
    assert set(LoadOptions.__annotations__) == words(unilora_torch.load) - OFFERED


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("uni-lora", {"rnk": 4}, r"the method 'uni-lora' has no option 'rnk'; it has none. Is rank meant\?"),
        ("vb-lora", {"rank": 4, "vector": 9}, r"no option 'vector'; known: vectors, length, topk. Is vectors meant\?"),
        ("veera", {}, "method"),
        ("uni-lora", {"grouping": "balancd"}, "grouping"),
    ],
)
def test_a_wrong_word_is_refused_by_name(method, options, message):
    with pytest.raises(SpecError, match=message):
        check_attach(method, options)


def test_options_of_a_grouping_that_takes_the_place_of_the_methods():
    check_options("vb-lora", ["topk"])
    with pytest.raises(SpecError, match="no option 'topk'"):
        check_options("vb-lora", ["topk"], "balanced")


def test_sizes_of_any_library_are_integers(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 3))
    target = Target("x", "0", np.int64(6), np.int32(3), np.int64(0))
    assert all(type(size) is int for size in (target.in_features, target.out_features, target.first_row))
    unilora_torch.attach(model, [target], rank=np.int64(2)).save(tmp_path / "a.safetensors")
    bank = unilora_torch.Bank(torch.nn.Sequential(torch.nn.Linear(6, 3)))
    with bank.rows([None], copies=np.int64(2)):
        pass
    with pytest.raises(TargetError, match=r"Target 'x': in_features must be an integer, got 6\.0\."):
        Target("x", "0", 6.0, 3)
