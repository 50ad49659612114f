"""Which backend attends and encodes, and how a refusal shows."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, prompt
from torch import Tensor

from kvcompress import CompressedCache, backends, reference
from kvcompress.backends import BACKENDS, VARIABLE, choose
from kvcompress.codecs import Codec, Coded, Fit, Geometry
from kvcompress.history import History
from kvcompress.reference import Mask, Scores
from kvcompress.spec import CodecSpec

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NO_INTERPRETER = "Triton does not run on cpu (on a CPU only with TRITON_INTERPRET=1)"
SPEC = "trellis3,window=16"
TOKENS = 150  # of a prompt: the codec learns from 128, and then there are two pages


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is asked for, there is no interpreter, and nothing has been said."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_said", set())


def chunk(Q: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, 4, Q, 16], key and value [1, 2, Q, 16]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, Q, 16, generator=generator) for heads in (4, 2, 2))
    return query, key, value


class Recorder:
    """A backend that takes what it is not told to refuse, and answers with ones and with nothing."""

    name = "recorder"

    def __init__(self, missing: str | None = None, refusal: str | None = None):
        self.missing, self.refusal = missing, refusal

    def unavailable(self, device: torch.device) -> str | None:
        return self.missing

    def rejects(self, query: Tensor, history: History | None, mask: Mask, scores: Scores) -> str | None:
        return self.refusal

    def attend(
        self, query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores
    ) -> Tensor:
        return torch.ones_like(query).transpose(1, 2)

    def encode(self, codec: Codec, side: int, pages: Tensor, fit: Fit) -> Coded | str:
        return {} if self.refusal is None else self.refusal


def record(monkeypatch: pytest.MonkeyPatch, backend: Recorder) -> None:
    monkeypatch.setitem(BACKENDS._items, "recorder", backend)
    monkeypatch.setenv(VARIABLE, "recorder")


class TestChoice:
    def test_torch_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for asked in (None, "", "torch"):
            if asked is not None:
                monkeypatch.setenv(VARIABLE, asked)
            assert choose(CPU) == (BACKENDS["torch"], None)

    def test_an_unknown_name_is_answered_with_the_known_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setenv(VARIABLE, "tritn")
        with pytest.raises(ValueError, match=r"unknown backend 'tritn'; did you mean 'triton'\? Known: torch, triton"):
            choose(CPU)

    def test_triton_needs_its_interpreter_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setenv(VARIABLE, "triton")
        assert choose(CPU) == (BACKENDS["torch"], NO_INTERPRETER)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        backend, reason = choose(CPU)
        assert (backend.name, reason) == ("triton", None)
        backend, reason = choose(torch.device("meta"))
        assert (backend.name, reason) == ("torch", NO_INTERPRETER.replace("cpu", "meta"))

    def test_triton_where_there_is_a_gpu(self) -> None:
        pytest.importorskip("triton")
        assert choose(torch.device("cuda"))[0].name == "triton"

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU without Triton is served by the reference, which says so."""
        monkeypatch.setitem(sys.modules, "kvcompress.fused", None)
        monkeypatch.setattr(backends, "_import_triton", backends._import_triton.__wrapped__)
        for asked, device in (("triton", CPU), ("", torch.device("cuda"))):
            monkeypatch.setenv(VARIABLE, asked)
            backend, reason = choose(device)
            assert backend.name == "torch"
            assert reason is not None
            assert reason.startswith("Triton cannot be imported: ")

    def test_one_from_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        record(monkeypatch, Recorder())
        assert choose(CPU)[0].name == "recorder"
        counts: Counter[str] = Counter()
        query, key, value = chunk()
        out = backends.attend(query, None, key, value, Mask(None, True), Scores(0.25), counts)
        assert out.eq(1).all()
        codec = CodecSpec.parse("trellis3").build(Geometry(16))
        assert backends.encode(Counter(), codec, 0, torch.zeros(1, 1, 64, 16), {}) == {}
        assert not counts


class TestRefusals:
    @pytest.mark.parametrize("backend", [Recorder(missing="no device"), Recorder(refusal="no device")])
    def test_counted_and_said_once(
        self, backend: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        record(monkeypatch, backend)
        counts: Counter[str] = Counter()
        query, key, value = chunk()
        asked = Mask(None, True), Scores(0.25)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                out = backends.attend(query, None, key, value, *asked, counts)
        assert torch.equal(out, reference.attend(query, None, key, value, *asked))
        assert counts == {"refused: no device": 3}
        assert [r.getMessage() for r in caplog.records] == [
            "the kernels refuse, and the torch reference steps in: no device"
        ]

    def test_encoding(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        record(monkeypatch, Recorder(refusal="no such codes"))
        codec = CodecSpec.parse("trellis3").build(Geometry(16))
        pages = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
        fit = codec.fit(pages)
        counts: Counter[str] = Counter()
        with caplog.at_level(logging.WARNING):
            coded = [backends.encode(counts, codec, 0, pages, fit) for _ in range(2)][1]
        assert counts == {"refused: encoding: no such codes": 2}
        good = codec.encode(pages, fit)
        assert coded.keys() == good.keys()
        assert all(torch.equal(coded[name], part) for name, part in good.items())
        assert [r.getMessage() for r in caplog.records] == [
            "the kernels refuse, and the torch reference steps in: encoding: no such codes"
        ]

    def test_in_the_stats_of_a_cache(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Two layers and three passes; the tokens are those of the backend that stepped in."""
        pytest.importorskip("triton")
        model: Any = build("llama")
        ids = prompt(1, TOKENS)

        def generated() -> tuple[Tensor, dict[str, int]]:
            cache = CompressedCache(model.config, SPEC)
            out = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
            return out, cache.stats()

        plain, stats = generated()
        assert stats == {"fused": 6, "materialised": 0}
        monkeypatch.setenv(VARIABLE, "triton")
        with caplog.at_level(logging.WARNING, "kvcompress"):
            forced, stats = generated()
        assert stats == {"fused": 6, "materialised": 0, f"refused: {NO_INTERPRETER}": 6}
        assert torch.equal(forced, plain)
        assert sum(NO_INTERPRETER in r.getMessage() for r in caplog.records) == 1

    def test_what_triton_refuses_before_it_looks_at_codes(self) -> None:
        pytest.importorskip("triton")
        from kvcompress.fused import Triton

        query, _, _ = chunk()
        wide = torch.zeros(1, 4, 2, 288)
        scores = Scores(0.25)
        four = Mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), False)
        assert Triton().rejects(query, None, four, scores) == "a mask of four dimensions"
        assert Triton().rejects(query, None, Mask(None, False), scores) == "attention that is not causal"
        reason = "heads of 288 dimensions, at most 256 are taken"
        assert Triton().rejects(wide, None, Mask(None, True), scores) == reason
        assert Triton().rejects(query, None, Mask(None, True), scores) is None
        padded = Mask(torch.ones(1, 2, dtype=torch.bool), True)
        assert Triton().rejects(query, None, padded, scores) is None


def output_of(script: str, **environment: str) -> dict[str, object]:
    """The last line that a script prints, JSON, run in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


UNTOUCHED = """
import json, sys
import kvcompress, torch
from families import build, prompt
before = sorted(name for name in sys.modules if name.startswith(("kvcompress.kernels", "kvcompress.fused")))
model = kvcompress.wrap(build("llama"), "trellis3,window=16")
out = model.generate(prompt(1, 150), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
after = sorted(name for name in sys.modules if name.startswith(("kvcompress.kernels", "kvcompress.fused")))
print(json.dumps({"before": before, "after": after, "stats": out.past_key_values.stats()}))
"""


def test_a_cpu_imports_no_kernel() -> None:
    """torch may import Triton by itself; of ours nothing does, so that all works where Triton is missing."""
    found = output_of(UNTOUCHED, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert found == {"before": [], "after": [], "stats": {"fused": 6, "materialised": 0}}


GENERATE = """
import json
import kvcompress
from kvcompress.models import embedded
model, tokenizer = embedded()
kvcompress.wrap(model, "lloyd4,window=48,layer1.key=trellis3")
text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
ids = tokenizer(text * 9, return_tensors="pt").input_ids[:, :134]
out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
cache = out.past_key_values
print(json.dumps({
    "tokens": out.sequences[0, 134:].tolist(), "logits": [step[0].tolist() for step in out.logits],
    "coded": [layer.history.coded for layer in cache.layers], "stats": cache.stats(),
}))
"""


@pytest.mark.slow
def test_the_embedded_model_generates_the_same_tokens() -> None:
    """A page in each layer, coded and attended by interpreted kernels.

    One side of one layer is coded by the trellis, whose search takes the interpreter 8 s for a page of a head.
    """
    pytest.importorskip("triton")
    plain = output_of(GENERATE)
    found = output_of(GENERATE, **{VARIABLE: "triton", "TRITON_INTERPRET": "1"})
    assert plain["coded"] == found["coded"] == [[64]] * 5
    assert plain["stats"] == found["stats"] == {"fused": 15, "materialised": 0}
    assert plain["tokens"] == found["tokens"]
    logits, good = torch.tensor(found["logits"]), torch.tensor(plain["logits"])
    # weights and queries of 11 bits, five layers; and a token whose codes tie may be coded otherwise
    assert (logits - good).abs().max() < 0.01 * good.abs().max()
