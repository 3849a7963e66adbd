"""Any JSON value in any place of a header, by hypothesis: refused by name, or accepted with finite factors."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import JSON_FIELDS, Raw
from readers import LINEAR, Snapshot, Tiny, adapter_file, check_factors, plain

import unilora_torch
from unilora_core import UniLoraError

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["blocks.0.up", "head", ""])
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
SPEC = ("layout", "d", "seed", "grouping", "grouping_version", "start", "bound")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = Tiny(), tmp_path_factory.mktemp("any-json")
    seed = adapter_file(folder, model, LINEAR, modules_to_save=["head"])
    return model, Snapshot(model), seed, folder / "a.safetensors"


def tried(tiny, change):
    model, before, seed, path = tiny
    file = copy.deepcopy(seed)
    change(file.header)
    path.write_bytes(file.pack())
    try:
        adapter = unilora_torch.load(model, path)
    except UniLoraError as error:
        adapter, refusal = None, str(error)
    if adapter is None:
        assert refusal.startswith(str(path))
        assert len(refusal) < 10_000
        before.check("a refusal")
        return
    plain(adapter)
    check_factors(adapter)
    adapter.detach()
    before.restore()
    before.check("detach")


TRIES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@TRIES
@given(st.sampled_from(JSON_FIELDS), JSON)
def test_in_place_of_a_field(tiny, field, value):
    tried(tiny, lambda header: header.update({field: value}))


@TRIES
@given(st.sampled_from(SPEC), JSON)
def test_in_the_spec(tiny, field, value):
    tried(tiny, lambda header: header["spec"].update({field: value}))


@TRIES
@given(st.integers(0, 5), st.integers(0, 1), JSON)
def test_in_the_layout(tiny, row, column, value):
    tried(tiny, lambda header: header["spec"]["layout"][row].__setitem__(column, value))


@TRIES
@given(st.integers(0, 2), st.integers(0, 3), JSON)
def test_in_a_target(tiny, row, column, value):
    tried(tiny, lambda header: header["targets"][row].__setitem__(column, value))


@TRIES
@given(st.sampled_from(("class", "name", "embeddings", "values")), JSON)
def test_in_the_base(tiny, field, value):
    tried(tiny, lambda header: header["base"].update({field: value}))


@TRIES
@given(TEXT, st.sampled_from(("spec", "targets", "base", "labels", "modules_to_save", "base_arguments")))
def test_text_that_is_no_json(tiny, text, field):

    tried(tiny, lambda header: header.update({field: Raw(text)}))
