"""Saved caches: what is loaded goes on exactly as what was saved; what does not fit is refused; files are whole."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3nTextConfig, PreTrainedModel

from kvcompress import CacheSpec, CompressedCache, basis, persist
from kvcompress.codecs.trellis import Trellis
from tests.families import build, left_padded, prompt

LONG, MORE, NEW = 300, 90, 8  # tokens: four pages (4 + 32 + 4 x 64 = 292), one page more, and what is generated
TRELLIS = CacheSpec("trellis3", "lloyd2", sinks=4, window=32)
SHARED = CacheSpec("trellis3", "trellis3", sinks=4, window=32, basis="shared")
WIDE = {"head_dim": 64}  # which spectral codecs need
SPECTRAL = CacheSpec("spectral3", "spectral2", sinks=4, window=32)

model = lru_cache(None)(build)  # tests only read them


@torch.no_grad()
def feed(own: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of one forward pass, with the positions that generate() would give."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return own(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


def filled(own: PreTrainedModel, spec: CacheSpec = TRELLIS, rows: int = 2, length: int = LONG) -> CompressedCache:
    cache = CompressedCache(own.config, spec)
    feed(own, cache, prompt(rows, length))
    return cache


def reload(cache: CompressedCache, own: PreTrainedModel, folder: Path) -> CompressedCache:
    cache.save(folder / "cache")
    return CompressedCache.load(folder / "cache", own.config)


def assert_go_on_alike(own: PreTrainedModel, first: CompressedCache, second: CompressedCache, rows: int = 2) -> None:
    """Bit by bit the same logits over a chunk that closes a page and a token, and no byte more held."""
    assert second.spec == first.spec
    assert second.memory().total <= first.memory().total
    assert second.memory().elements == first.memory().elements
    for length in (MORE, 1):
        ids = prompt(rows, length, seed=5)
        assert torch.equal(feed(own, first, ids), feed(own, second, ids))
    assert second.memory().coded_elements == first.memory().coded_elements


FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "falcon_h1", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path):
    """Also those with sliding windows, linear attention, latents whose last chunk waits to be settled."""
    own = model(family)
    cache = filled(own)
    assert_go_on_alike(own, cache, reload(cache, own, tmp_path))


@pytest.mark.parametrize(
    ("family", "padded"),
    [(family, False) for family in FAMILIES[:-1]] + [(family, True) for family in ("llama", "gemma3", "falcon_h1")],
)
def test_generate_gives_the_same_tokens(family: str, padded: bool, tmp_path: Path):
    """A turn, then another one with the cache of the first, saved in between."""
    own, rows = model(family), prompt(2, LONG)
    ids, mask = left_padded([rows[0], rows[1, : LONG - 50 * padded]])
    cache = CompressedCache(own.config, TRELLIS)
    options = {"max_new_tokens": NEW, "do_sample": False}
    first = own.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    ids = torch.cat([first, prompt(2, MORE, seed=3)], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, NEW + MORE)], dim=1)
    loaded = reload(cache, own, tmp_path)
    found = own.generate(ids, attention_mask=mask, past_key_values=loaded, **options)
    assert torch.equal(found, own.generate(ids, attention_mask=mask, past_key_values=cache, **options))
    assert found.shape == (2, LONG + MORE + 2 * NEW)


def test_padded_rows(tmp_path: Path):
    own, rows = model("llama"), prompt(2, LONG)
    ids, mask = left_padded([rows[0], rows[1, :150]])
    cache = CompressedCache(own.config, TRELLIS)
    feed(own, cache, ids, mask)
    loaded = reload(cache, own, tmp_path)
    assert loaded.layers[0].history.pads == [0, LONG - 150]
    more, mask = prompt(2, MORE, seed=5), torch.cat([mask, mask.new_ones(2, MORE)], dim=1)
    assert torch.equal(feed(own, loaded, more, mask), feed(own, cache, more, mask))


def test_beams_share_pages(tmp_path: Path):
    own = model("llama")
    cache = filled(own)
    cache.save(tmp_path / "two")
    cache.batch_select_indices(torch.tensor([1, 1, 0, 1]))
    loaded = reload(cache, own, tmp_path)
    exact = loaded.memory().exact  # of four rows; that of two is half of it
    growth = (tmp_path / "cache").stat().st_size - (tmp_path / "two").stat().st_size
    assert growth == pytest.approx(exact / 2, abs=1024)  # tables and facts of two rows more
    assert_go_on_alike(own, cache, loaded, rows=4)


def test_pages_that_no_row_names_are_left_out(tmp_path: Path):
    own = model("llama")
    cache = filled(own, rows=4)
    cache.batch_select_indices(torch.tensor([2]))
    loaded = reload(cache, own, tmp_path)
    assert 4 * loaded.memory().codes == cache.memory().codes
    assert [len(layer.history.pool.slabs) for layer in loaded.layers] == [1, 1]
    assert_go_on_alike(own, cache, loaded, rows=1)


@pytest.mark.parametrize("tokens", [20, 77, 250, LONG])
def test_after_crop(tokens: int, tmp_path: Path):
    """Pages cut short, and rows whose codes are all gone, which are fitted anew."""
    own = model("llama")
    cache = filled(own)
    cache.crop(-tokens)
    assert_go_on_alike(own, cache, reload(cache, own, tmp_path))


@pytest.mark.parametrize("tokens", [0, 3, 100])
def test_before_anything_is_coded(tokens: int, tmp_path: Path):
    own = model("llama")
    cache = filled(own, length=tokens) if tokens else CompressedCache(own.config, TRELLIS)
    loaded = reload(cache, own, tmp_path)
    assert loaded.memory().coded_elements == 0
    assert_go_on_alike(own, cache, loaded)


def test_queries_for_a_fit_that_is_to_come(tmp_path: Path):
    """Rows that were made from one row share their queries, which are written once."""
    own = build("llama", **WIDE)
    cache = filled(own, SPECTRAL, rows=1)  # 300 of the 512 tokens that the codecs want
    cache.batch_repeat_interleave(3)
    loaded = reload(cache, own, tmp_path)
    kept = loaded.layers[0].history.queries
    assert [q.shape for q in kept] == [(4, LONG - 4, 64)] * 3
    assert len({q.data_ptr() for q in kept}) == 1
    assert_go_on_alike(own, cache, loaded, rows=3)
    more = prompt(3, 200, seed=9)
    assert torch.equal(feed(own, loaded, more), feed(own, cache, more))
    assert loaded.memory().coded_elements == cache.memory().coded_elements > 0
    assert loaded.memory().total <= cache.memory().total
    # fitted: nothing but sinks and recent tokens is exact, in two layers, keys and values of two heads of 64
    held = cache.layers[0].history.held[0]
    assert cache.memory().exact == 4 * 3 * (4 + held) * 2 * 2 * 64 * 2


@pytest.mark.parametrize("spec", [SHARED, CacheSpec("trellis3", "spectral2", window=32, basis="shared")], ids=str)
def test_shared_basis(spec: CacheSpec, tmp_path: Path):
    own = build("llama", **WIDE)
    cache = filled(own, spec, length=600)
    loaded = reload(cache, own, tmp_path)
    assert {len(x) for x in loaded.layers[0].history.fits[0].values()} == {1}
    assert_go_on_alike(own, cache, loaded)


def test_basis_from_a_file_that_is_gone(tmp_path: Path):
    """What was learned is in the saved cache: the file that the spec names is not read again, even after reset."""
    own = model("llama")
    learned = filled(own)
    file = tmp_path / "basis.safetensors"
    layers = {i: (str(layer.codecs.key), str(layer.codecs.value)) for i, layer in enumerate(learned.layers)}
    firsts = [[{n: x[:1] for n, x in fit.items()} for fit in layer.history.fits] for layer in learned.layers]
    basis.save(file, {i: basis.Basis(codecs, tuple(firsts[i])) for i, codecs in layers.items()})
    cache = filled(own, CacheSpec("trellis3", "lloyd2", window=32, basis=str(file)))
    empty = CompressedCache(own.config, cache.spec)
    empty.save(tmp_path / "empty")
    file.unlink()
    loaded = reload(cache, own, tmp_path)
    assert_go_on_alike(own, cache, loaded)
    loaded.reset()
    assert torch.equal(feed(own, loaded, prompt(2, LONG)), feed(own, empty, prompt(2, LONG)))
    assert_go_on_alike(own, empty, loaded)
    loaded = CompressedCache.load(tmp_path / "empty", own.config)
    feed(own, loaded, prompt(2, LONG))
    assert loaded.layers[0].history.fit_of == [0, 0]


def test_layers_that_share_keys_and_values(tmp_path: Path):
    """Gemma 3n: the last layers use those of earlier ones and hold nothing."""
    config = Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=5, sliding_window=48)
    cache = CompressedCache(config, TRELLIS)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds[5:] == ["DummyLayer"] * 5
    for index in range(5):
        cache.update(torch.ones(1, 2, 60, 16), torch.ones(1, 2, 60, 16), index)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", config)
    assert [type(layer).__name__ for layer in loaded.layers] == kinds
    assert loaded.get_seq_length() == 60
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)


def test_rows_without_pages_beside_slabs_that_are_gone(tmp_path: Path):
    """Page 0 was the first row's, which has left; a row that has none yet does not ask for it."""
    own = model("llama")
    cache = CompressedCache(own.config, TRELLIS)
    x = torch.randn(3, 2, 800, 8, generator=torch.Generator().manual_seed(0))
    for layer in cache.layers:
        layer.lazy_initialization(x, x)
        for start, real in ((0, [400, 0, 0]), (400, [400, 400, 20])):
            layer.history.append(*[x[:, :, start : start + 400]] * 2, real)
            layer.history.code()
    cache.batch_select_indices(torch.tensor([1, 2]))
    feed(own, cache, prompt(2, MORE))
    assert cache.layers[0].history.coded == [448, 0]
    assert cache.layers[0].history.pool.slabs[0].numel() == 0
    assert_go_on_alike(own, cache, reload(cache, own, tmp_path))


def test_recording_of_the_past_goes_on(tmp_path: Path):
    own = model("gemma3")
    cache = CompressedCache(own.config, TRELLIS)
    cache.activate_past_recording()
    feed(own, cache, prompt(2, LONG))
    loaded = reload(cache, own, tmp_path)
    for either in (cache, loaded):
        either.crop(-30)  # a sliding window that records nothing could not
    assert_go_on_alike(own, cache, loaded)


@pytest.mark.parametrize("spec", [TRELLIS, CacheSpec("exact", "exact", window=32)], ids=str)
def test_file_is_as_large_as_what_is_held(spec: CacheSpec, tmp_path: Path):
    own = model("qwen3")
    cache = filled(own, spec, rows=8, length=900)
    cache.save(tmp_path / "cache")
    size = (tmp_path / "cache").stat().st_size
    assert size == pytest.approx(cache.memory().total, rel=0.05, abs=65536)
    assert size > 65536 * 4  # so that the bound means something


# --- what is refused


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """The file with its tensors and metadata changed by `change(tensors, metadata)`, and the checksum of that."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    metadata["sha256"] = persist.checksum(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    filled(model("llama")).save(tmp_path / "cache")
    return tmp_path / "cache"


def test_another_version_is_refused(saved: Path):
    rewritten(saved, lambda _, metadata: metadata.update(version="7"))
    with pytest.raises(ValueError, match="is of version '7', this kvcompress reads version '4'"):
        CompressedCache.load(saved, model("llama").config)


CHANGES = {
    "num_hidden_layers": (3, "num_hidden_layers is 2, that of the config 3"),
    "num_key_value_heads": (4, "num_key_value_heads is 2, that of the config 4"),
    "head_dim": (16, "head_dim is 8, that of the config 16"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 5e5}, "rope_parameters is .*10000.0.*500000.0"),
    "dtype": ("bfloat16", "holds float32, the config says bfloat16"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_geometry_is_refused(saved: Path, name: str):
    value, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(saved, build("llama", **{name: value}).config)


def test_another_kind_of_model_is_refused(saved: Path):
    with pytest.raises(ValueError, match="model_type is 'llama', that of the config 'qwen3'"):
        CompressedCache.load(saved, model("qwen3").config)


def test_another_dtype_is_refused_at_the_first_token(saved: Path):
    """Where the config does not say it."""
    own = build("llama").to(torch.bfloat16)
    cache = CompressedCache.load(saved, own.config)
    with pytest.raises(ValueError, match=r"in torch\.float32, got .* in torch\.bfloat16"):
        feed(own, cache, prompt(2, 1))


def test_other_files_are_refused(saved: Path, tmp_path: Path):
    config = model("llama").config
    whole = saved.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is no safetensors file, or is cut short"):
            CompressedCache.load(saved, config)
    save_file({"weight": torch.zeros(3)}, saved)
    with pytest.raises(ValueError, match="is no saved cache: its format is None"):
        CompressedCache.load(saved, config)
    basis.save(saved, {})
    with pytest.raises(ValueError, match="its format is 'kvcompress-basis', not 'kvcompress-cache'"):
        CompressedCache.load(saved, config)
    with pytest.raises(FileNotFoundError, match="there is no cache file"):
        CompressedCache.load(tmp_path / "nothing", config)


def _without(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, _: tensors.pop(name)


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    return lambda tensors, _: tensors.update({name: change(tensors[name]).contiguous()})


def _facts(**facts: object) -> Callable[[dict, dict], None]:
    def change(_: dict, metadata: dict) -> None:
        content = json.loads(metadata["cache"])
        content["layers"][1] |= facts
        metadata["cache"] = json.dumps(content)

    return change


DAMAGES = {
    "no sinks": (_without("1.sink.value"), "not complete: KeyError"),
    "no codes": (_without("1.pages"), r"not complete: \['pages'\] missing"),
    "no means": (_without("1.fit.key.mean"), r"not complete: \['fit.key.mean'\] missing"),
    "fewer pages": (_changed("1.pages", lambda x: x[1:]), "contradicts itself: pages"),
    "pages beyond": (_changed("1.table.ids", lambda x: x + 1), "contradicts itself: pages"),
    "fewer recent tokens": (_changed("1.recent.key", lambda x: x[:, :, 1:]), "contradicts itself: exact tokens"),
    "other codes": (_changed("1.pages", lambda x: x ^ 1), "keys are not decoded to what they were"),
    "other means": (_changed("1.fit.key.mean", lambda x: x + 0.1), "keys are not decoded to what they were"),
    "narrower means": (_changed("1.fit.key.mean", lambda x: x[:, :, :4]), "contradicts itself: fits"),
    "means of one row": (_changed("1.fit.key.mean", lambda x: x[:1]), "contradicts itself: fits"),
    "rows": (_facts(lengths=[LONG]), "contradicts itself: 1 rows have lengths, 2 have pads"),
    "lengths": (_facts(lengths=[LONG, 200]), "contradicts itself: lengths"),
    "kind": (_facts(kind="DynamicSlidingWindowLayer"), "it is a DynamicSlidingWindowLayer, the model has a Compressed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_contradict_themselves_are_refused(saved: Path, damage: str):
    change, message = DAMAGES[damage]
    rewritten(saved, change)
    with pytest.raises(ValueError, match=rf"layer 1 of .* cannot be loaded: .*({message})"):
        CompressedCache.load(saved, model("llama").config)


def test_a_codec_that_has_changed_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """As after an update of the package, or of another one's codec, in which codes mean something else."""
    decode = Trellis.decode
    monkeypatch.setattr(Trellis, "decode", lambda self, coded, width: -decode(self, coded, width))
    with pytest.raises(ValueError, match=r"its keys are not decoded to what they were .* codec trellis3 has changed"):
        CompressedCache.load(saved, model("llama").config)


def test_layers_of_unknown_kinds_are_refused(tmp_path: Path):
    class Strange(type(CompressedCache(model("gemma3").config, TRELLIS).layers[0])):
        pass

    cache = filled(model("gemma3"))
    cache.layers[2].__class__ = Strange
    with pytest.raises(ValueError, match=r"layer 2 is a Strange of .*, whose state is not known"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


# --- whole files, whole passes


def test_a_failed_save_leaves_the_older_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    cache = filled(model("llama"), length=50)
    monkeypatch.setattr(persist, "save_file", fail)
    for path in (saved, saved.with_name("new")):
        with pytest.raises(OSError, match="no space left"):
            cache.save(path)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before
    monkeypatch.undo()
    cache.save(saved)
    assert CompressedCache.load(saved, model("llama").config).get_seq_length() == 50
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert stat.S_ISREG(saved.stat().st_mode)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(saved.parent / "missing" / "cache")


def test_saving_changes_nothing(tmp_path: Path):
    own = model("gemma3")
    first, second = filled(own), filled(own)
    first.save(tmp_path / "a")
    assert_go_on_alike(own, first, second)
    loaded = CompressedCache.load(tmp_path / "a", own.config)
    loaded.save(tmp_path / "b")
    with safe_open(str(tmp_path / "b"), framework="pt") as file:
        for name, x in load_file(tmp_path / "a").items():
            assert torch.equal(file.get_tensor(name), x), name


def test_the_middle_of_a_forward_pass(tmp_path: Path):
    """Layers of different lengths are refused; a chunk that no attention came for is settled."""
    own = model("llama")
    cache = filled(own)
    x = torch.randn(2, 2, 10, 8)
    cache.update(x, x, 0)
    with pytest.raises(ValueError, match=r"layer 0 holds 310 tokens, layer 1 300: .* rollback\(\) first"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    cache.rollback()
    assert_go_on_alike(own, filled(own), reload(cache, own, tmp_path))
    cache = filled(own)
    for layer in (0, 1):
        cache.update(x, x, layer)
    assert reload(cache, own, tmp_path).get_seq_length() == 310


def test_the_file_is_not_kept_open(saved: Path):
    """What was loaded does not look into the file, which may change or go."""
    own = model("llama")
    loaded = CompressedCache.load(saved, own.config)
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    assert_go_on_alike(own, filled(own), loaded)


def test_device(saved: Path):
    cache = CompressedCache.load(saved, model("llama").config, device="cpu")
    assert cache.layers[0].device == torch.device("cpu")
