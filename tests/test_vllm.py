"""The vLLM plugin inside vLLM; skipped where that is not installed (`python -m benchmarks.vllm_check` says how it is).

The last test starts engines and takes minutes: `pytest tests/test_vllm.py -m "not slow"` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own")

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks import vllm_check
from kvcompress.store import PAGE
from kvcompress.vllm import VARIABLE, register
from kvcompress.vllm.backend import KVCompressBackend, KVCompressImpl, as_blocks, layer_index


@pytest.fixture(autouse=True)
def vllm_as_it_was() -> Iterator[None]:
    yield
    for backend in (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN):
        backend.clear_override()


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, "trellis:k4v3")
    return "trellis:k4v3"


def test_entry_point() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "kvcompress"]
    assert found.load() is register


def test_installed_but_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_registered(spec: str) -> None:
    register()
    register()  # vLLM may call it again
    assert AttentionBackendEnum.CUSTOM.get_class() is KVCompressBackend
    assert AttentionBackendEnum.CPU_ATTN.get_class() is KVCompressBackend  # these tests run on CPUs


@pytest.mark.parametrize(
    ("text", "size", "bytes_wanted"),
    [
        ("trellis:k4v3", 64, (4 + 3) * 64 // 8 + 4),  # codes and a half-precision gain on either side
        ("trellis3", 128, 2 * 3 * 128 // 8 + 4),
        ("trellis1", 8, 8),  # 2 (1 + 2) bytes, rounded up to whole float32 numbers
        ("exact", 64, 2 * 4 * 64),
    ],
)
def test_bytes_of_a_token(text: str, size: int, bytes_wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM reckons with: bytes of a token and KV head, and of a block of 64 tokens."""
    monkeypatch.setenv(VARIABLE, text)
    own = KVCompressBackend.customize_spec(
        FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=size, dtype=torch.float32)
    )
    assert own.state_content_bytes == bytes_wanted
    assert own.page_size_bytes == PAGE * 2 * bytes_wanted
    assert KVCompressBackend.customize_spec(own) == own


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "share another one's cache"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ],
)
def test_refusals(spec: str, given: dict[str, object], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        KVCompressImpl(4, 64, 0.125, 2, **given)  # type: ignore[arg-type]


def test_codecs_that_learn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "spectral3")
    with pytest.raises(ValueError, match=r"These can: .*trellis3"):
        KVCompressBackend.customize_spec(
            FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.float32)
        )


def test_blocks_are_views() -> None:
    cache = torch.zeros(5, 3, 2, PAGE, 15)[:, 1]  # another layer's blocks on either side
    blocks = as_blocks(cache)
    assert blocks.shape == (5, 2 * PAGE * 15 * 4)
    blocks[4] = 255
    assert cache[4].isnan().all()
    with pytest.raises(ValueError, match="whole and of 64 tokens"):
        as_blocks(torch.zeros(5, 2, 32, 15))
    with pytest.raises(ValueError, match="whole and of 64 tokens"):
        as_blocks(torch.zeros(5, PAGE, 2, 15).transpose(1, 2))


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.attn", "model.blocks.3.attn.1"])
def test_names_of_layers_matter_to_a_basis_only(spec: str, name: str) -> None:
    """Two tokens written and read back by a layer whose name has more than one number, as LongCat's have."""
    impl = KVCompressImpl(2, 64, 0.125, 1)
    layer = type("Layer", (), {"layer_name": name})()
    cache = torch.zeros(2, 1, PAGE, 15)
    vectors = torch.randn(2, 1, 64)
    impl.do_kv_cache_update(layer, vectors, vectors, cache, torch.tensor([PAGE, PAGE + 1]))
    assert cache[1].view(torch.uint8).any()
    assert not cache[0].view(torch.uint8).any()


def test_layer_index() -> None:
    assert layer_index("model.layers.13.self_attn.attn") == 13
    with pytest.raises(ValueError, match="expected one number"):
        layer_index("lm_head")


@pytest.mark.slow
def test_served(tmp_path: Path) -> None:
    """Engines with and without the plugin: prompts in chunks, several at once, prefixes from vLLM's cache."""
    plain, exact, coded = (
        vllm_check.child(text, 8, tmp_path / "vllm.log", tmp_path) for text in ("", "exact", "trellis:k4v3")
    )
    assert exact.capacity == plain.capacity
    assert coded.capacity / plain.capacity == pytest.approx(64 / 7.5, rel=0.02)  # bits; whole blocks
    assert sum(plain.cached) == sum(exact.cached) == sum(coded.cached) > 1000
    # the same numbers attended in another order of sums
    assert vllm_check.equal_share(plain.tokens, exact.tokens) == 1
    assert vllm_check.equal_share(exact.tokens, exact.again) == 1
    assert vllm_check.differences(plain.forced, exact.forced)[1] < 1e-4
    # `python -m benchmarks.vllm_check` prints 0.056 for this spec
    assert 0.03 < vllm_check.differences(plain.forced, coded.forced)[1] < 0.08
