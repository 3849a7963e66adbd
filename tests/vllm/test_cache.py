"""The cache: each folder made once, A and B bounded in bytes, and what left comes back the same."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_llama import make_adapter, make_base

from unilora_core import AdapterFileError, CorruptFileError, MismatchError, SpecError
from unilora_vllm.cache import CONFIG, FILE, WEIGHTS, Cache


@pytest.fixture
def fr(adapter, tmp_path):
    return (tmp_path / "files" / "fr.safetensors").read_bytes()


@pytest.fixture
def name(tmp_path):
    return str(tmp_path / "base")


def test_a_folder_is_what_export_lora_writes(adapter, fr, name, settings, tmp_path):
    adapter.export_lora(tmp_path / "lora", base_model=name)
    folder = Cache(settings()).add(fr, name)
    assert {path.name for path in folder.iterdir()} == {FILE, CONFIG, WEIGHTS}
    assert (folder / FILE).read_bytes() == fr
    for file in (CONFIG, WEIGHTS):
        assert (folder / file).read_bytes() == (tmp_path / "lora" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_rounded_once(adapter, fr, name, settings, dtype):
    wide = load_file(Cache(settings()).add(fr, name) / WEIGHTS)
    found = load_file(Cache(settings(DTYPE=dtype)).add(fr, name) / WEIGHTS)
    assert all(torch.equal(found[key], tensor.to(getattr(torch, dtype))) for key, tensor in wide.items())


def test_equal_contents_are_made_once(fr, name, settings):
    cache = Cache(settings())
    folder = cache.add(fr, name)
    before = (folder / WEIGHTS).stat().st_ino
    assert cache.add(fr, name) == Cache(settings()).add(fr, name) == folder
    assert (folder / WEIGHTS).stat().st_ino == before


def test_the_bound_holds_and_the_least_recently_used_leaves(base, adapter, fr, name, settings, tmp_path):
    adapter.detach()
    folders = [Cache(settings()).add(fr, name)]
    cache = Cache(settings(CACHE_BYTES=3 * (folders[0] / WEIGHTS).stat().st_size + 100))
    for seed in range(1, 6):
        if seed >= 3:
            cache.restore(folders[0])  # used again, so another leaves first
        make_adapter(base, tmp_path / "more", seed=seed, rank=4).detach()
        folders.append(cache.add((tmp_path / "more").read_bytes(), name))
        sizes = [(folder / WEIGHTS).stat().st_size for folder in folders if (folder / WEIGHTS).is_file()]
        assert sum(sizes) <= cache.settings.limit
    assert [(folder / WEIGHTS).is_file() for folder in folders] == [True, False, False, False, True, True]


def test_what_left_comes_back_bit_for_bit(fr, name, settings):
    cache = Cache(settings())
    folder = cache.add(fr, name)
    before = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    Cache(settings()).restore(folder)  # another process, which never saw the adapter
    assert (folder / WEIGHTS).read_bytes() == before


def test_one_that_cannot_fit_is_refused_before_it_is_written(fr, name, settings, tmp_path):
    cache = Cache(settings(CACHE_BYTES=100))
    with pytest.raises(SpecError, match=r"take [\d,]+ bytes, the cache has 100 .*UNILORA_VLLM_CACHE_BYTES"):
        cache.add(fr, name)
    assert list((tmp_path / "cache").glob("*/*")) == []


def test_a_rank_beyond_the_servers_is_refused(fr, name, settings):
    with pytest.raises(AdapterFileError, match=r"its rank is 4, and vLLM was started with --max-lora-rank 1 "):
        Cache(settings(MAX_RANK=1)).add(fr, name)


def test_a_rank_that_no_vllm_takes_is_refused(base, name, settings, tmp_path):
    make_adapter(base, tmp_path / "a", method="vera", rank=600)
    with pytest.raises(AdapterFileError, match="the rank is 600, the largest --max-lora-rank is 512"):
        Cache(settings()).add((tmp_path / "a").read_bytes(), name)


def test_another_base_is_refused(fr, settings, tmp_path):
    make_base(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"it was made for .* values of its norms"):
        Cache(settings()).add(fr, str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="narrow: no folder"):
        Cache(settings()).add(fr, str(tmp_path / "narrow"))


def test_the_base_may_lie_under_another_path(fr, settings, tmp_path):
    folder = Cache(settings(BASE=tmp_path / "base")).add(fr, "org/served-as")
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "org/served-as"


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_file_is_refused_and_leaves_nothing(fr, name, settings, tmp_path, damage):
    torn = fr[:-40] + b"x" * 40 if damage is None else damage
    with pytest.raises(CorruptFileError):
        Cache(settings()).add(torn, name)
    assert list((tmp_path / "cache").glob("*/*")) == []
