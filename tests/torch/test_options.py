"""The options that editors complete are those that there are."""

import inspect

import pytest

import unilora_torch
from unilora_core import SpecError
from unilora_core.frames import FRAMES
from unilora_core.maps import MAPS
from unilora_core.methods import MethodOptions, check_options
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
