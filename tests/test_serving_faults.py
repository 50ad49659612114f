"""What goes wrong in a batch: hostile settings, failing steps, decoders that raise, clients that have left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from kvcompress import CacheSpec, batching
from kvcompress.serving import budget, sampling
from kvcompress.serving.batches import Batches
from kvcompress.serving.call import Call, current
from kvcompress.serving.loading import CompressedModels
from kvcompress.serving.metrics import Metrics
from kvcompress.serving.refusal import CLOSED, RefusalError
from kvcompress.serving.settings import Settings
from tests.families import build

SPEC = CacheSpec.parse("lloyd4")
IDS = [5, 6, 7, 8]


class Words:
    """In place of a tokenizer: token 5 is "5 "."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{i} " for i in ids)


def served(family: str = "llama", budget_: int = 200_000, **changes: Any) -> Batches:
    model = batching.enable(build(family, "sdpa", **changes), SPEC)
    return Batches.of(model, "model", SPEC, budget.pool(model, SPEC, budget_, 64), None, Metrics())


@pytest.fixture
def batches() -> Iterator[Batches]:
    found = served(head_dim=16)
    yield found
    found.stop()


def settings(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1} | changes)


async def ask(batches: Batches, ids: list[int] = IDS, call: Call | None = None, **changes: Any) -> list[int]:
    """The tokens of one answer, within 20 seconds."""
    current.set(call or Call())
    model: Any = batches.manager.model
    answer = batches.generate_non_streaming(model, Words(), {"input_ids": ids}, settings(**changes), "x")
    return (await asyncio.wait_for(answer, 20))[2]


def run(made: Callable[[], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        return await made()

    return asyncio.run(go())


@pytest.mark.parametrize(
    "text",
    [
        '{"max_new_tokens": NaN}',  # no number of tokens is as many: it would go on until the pool is full
        '{"max_new_tokens": 2.5}',
        '{"max_new_tokens": true}',
        '{"max_length": Infinity}',
        '{"do_sample": true, "temperature": NaN}',  # probabilities of NaN, of which torch draws for no row of a batch
        '{"do_sample": true, "temperature": -1}',
        '{"do_sample": true, "temperature": Infinity}',
        '{"do_sample": true, "temperature": "warm"}',
        '{"do_sample": true, "top_p": NaN}',
        '{"do_sample": true, "top_p": -4}',
        '{"do_sample": true, "top_k": 2.5}',
        '{"do_sample": true, "top_k": -4}',
        '{"do_sample": true, "top_k": "a"}',
        '{"eos_token_id": "abc"}',
        '{"eos_token_id": [1.5, null]}',
        '{"eos_token_id": {"1": 1}}',
    ],
)
def test_settings_that_are_no_numbers(batches: Batches, text: str) -> None:
    """They are refused before anything is queued, and the next request is answered."""
    given = {"eos_token_id": -1, **json.loads(text)}
    given |= {} if "max_new_tokens" in given or "max_length" in given else {"max_new_tokens": 4}
    with pytest.raises(RefusalError) as caught:
        run(lambda: _given(batches, GenerationConfig(**given)))
    assert caught.value.status == 400
    assert len(run(lambda: ask(batches))) == 4


async def _given(batches: Batches, config: GenerationConfig) -> Any:
    current.set(Call())
    model: Any = batches.manager.model
    answer = batches.generate_non_streaming(model, Words(), {"input_ids": IDS}, config, "x")
    return await asyncio.wait_for(answer, 20)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
def test_sampling_at_no_temperature_is_greedy(batches: Batches, temperature: float) -> None:
    """A logit divided by 1e-45 is infinite in float32; what would be drawn is the likeliest token."""
    greedy = run(lambda: ask(batches))
    assert run(lambda: ask(batches, do_sample=True, temperature=temperature)) == greedy


def test_a_failing_step_costs_its_requests_only(batches: Batches) -> None:
    """As when memory runs out: who was in the batch hears of it, whoever comes later is answered as before."""
    wanted = run(lambda: ask(batches))
    model: Any = batches.manager.model

    def fail(*_: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(lambda: ask(batches))
    assert batches.is_alive()
    assert run(lambda: ask(batches)) == wanted
    assert not batches.manager.live
    assert not batches.manager.output_router.result_handlers


def test_a_lost_device_ends_the_thread(batches: Batches) -> None:
    """After a CUDA error nothing can be computed in the process: the server is not alive, and says 503."""
    model: Any = batches.manager.model

    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(lambda: ask(batches))
    hook.remove()
    thread = batches.manager._generation_thread
    assert thread is not None
    thread.join(10)  # it tells the requests before it records the error
    assert not batches.is_alive()
    with pytest.raises(RefusalError, match="has ended") as caught:
        run(lambda: ask(batches))
    assert caught.value.status == 503


def test_a_decoder_that_raises(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream ends with the error; a request whose outputs come with its own still gets them all."""
    from kvcompress.serving import batches as module

    class Raises:
        def __init__(self, *_: Any, **__: Any):
            pass

        def put(self, _: Any) -> None:
            raise ValueError('no "text" comes of these')

        end = put

    monkeypatch.setattr(module, "CBStreamer", Raises)

    class Tokenizer:
        _tokenizer = None

    async def both() -> tuple[Any, list[int], Call]:
        call = Call()
        current.set(call)
        model: Any = batches.manager.model
        streamed = settings(max_new_tokens=400)
        queue, _ = batches.generate_streaming(model, Tokenizer(), {"input_ids": IDS}, streamed, "x")
        tokens = await ask(batches, IDS[:2], max_new_tokens=12)
        found = await asyncio.wait_for(queue.get(), 5)
        call.gone.set()  # as when the answer's end has been sent
        while batches.manager.live:
            await asyncio.sleep(0.01)
        return found, tokens, call

    found, tokens, call = run(both)
    assert found.msg == 'no \\"text\\" comes of these'
    assert len(tokens) == 12
    assert call.failed


def test_a_client_that_left_before_its_request_was_queued(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never is: the thread could cancel it before it is in the queue, and then run it for nobody to its end."""
    call = Call()
    call.gone.set()
    monkeypatch.setattr(batches.manager, "add", lambda *_, **__: pytest.fail("it was queued"))
    with pytest.raises(RefusalError) as caught:
        run(lambda: ask(batches, call=call))
    assert caught.value.status == CLOSED


def test_a_request_queued_while_the_thread_ends(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put into the queue after it was emptied for the last time: it is refused, and does not wait for ever."""
    manager = batches.manager

    def too_late(*_: Any, **__: Any) -> str:
        manager.background_thread_status.record_fatal_error(RuntimeError("gone"))
        return "x"

    monkeypatch.setattr(manager, "add_request", too_late)
    with pytest.raises(RefusalError, match="has ended: gone"):
        run(lambda: ask(batches))
    assert not manager.live


def test_a_pool_without_room_for_both_kinds_of_layers() -> None:
    """Gemma 2's sliding layers need a sector beside the full ones': a pool of one holds no token, and is refused."""
    model = batching.enable(build("gemma2", "eager"), SPEC)
    pool = budget.pool(model, SPEC, 10_000_000, 64)
    pool.num_blocks = 1
    with pytest.raises(ValueError, match="does not hold one token"):
        Batches.of(model, "model", SPEC, pool, None, Metrics())
    assert model.config._attn_implementation == "eager"


def test_positions_that_were_never_learned() -> None:
    """GPT-2 has a table of positions, beyond whose end its lookup would fail the whole batch; RoPE has none."""
    batches = served("gpt2", 2_000_000, n_positions=32)
    try:
        assert batches.limit == 32
        with pytest.raises(RefusalError, match="length is 32 tokens"):
            run(lambda: ask(batches, [5] * 40))
        assert len(run(lambda: ask(batches, [5] * 28))) == 4
    finally:
        batches.stop()
    assert budget.positions(build("llama", "sdpa")) is None


@pytest.mark.parametrize(("family", "most", "limit"), [("gpt2", "48", 32), ("gpt2", "16", 16), ("llama", None, None)])
def test_positions_where_requests_take_turns(family: str, most: str | None, limit: int | None, tmp_path: Path) -> None:
    own = {"n_positions": 32} if family == "gpt2" else {}
    build(family, "sdpa", **own).save_pretrained(tmp_path)
    models = CompressedModels(Settings(max_context=most, device="cpu"), Metrics())
    try:
        model = models._load_model(f"{tmp_path}@main")
        assert models.limits[model] == limit
    finally:
        models.shutdown()


def test_options_of_a_batch() -> None:
    model = build("llama", "sdpa")
    drawn = sampling.options(settings(do_sample=True, temperature=0.5, top_k=None, top_p=None), model, seeded=False)
    assert (drawn["temperature"], drawn["top_k"], drawn["top_p"]) == (0.5, model.config.vocab_size, 1.0)
    off = sampling.options(settings(do_sample=True, top_k=0), model, seeded=False)
    assert off["top_k"] == model.config.vocab_size


def test_what_a_model_brings_along(caplog: pytest.LogCaptureFixture) -> None:
    """A penalty of the model's own generation config, as Qwen 2 has one, is said to be left out."""
    model = build("llama", "sdpa")
    assert model.generation_config is not None
    model.generation_config.repetition_penalty = 1.1
    found = sampling.defaults(model.generation_config)
    assert found.repetition_penalty is None
    assert "config has repetition_penalty=1.1, which continuous batching goes without" in caplog.text
    caplog.clear()
    model.generation_config.repetition_penalty = None
    sampling.defaults(model.generation_config)
    assert not caplog.text
