"""`kvcompress serve`: a real server process, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import transformers

import kvcompress
from benchmarks.soak_clients import Asker, Tally
from benchmarks.soak_rows import COUNTS, judged
from benchmarks.soak_server import TEMPLATE, Server, save_embedded
from benchmarks.soak_slope import Slope
from kvcompress import CacheSpec, cli, models
from kvcompress.serving import budget, requirements
from kvcompress.serving.refusal import quoted
from kvcompress.serving.settings import Settings
from tests.families import build
from tests.served import change, chat, check_clients_at_once, check_other_ways, read

SPEC = "trellis3"  # learns from 128 tokens, so that short prompts are coded
LIMIT, MIN_TOKENS = 2400, 256  # tokens: of prompt and answer, and of a prefix that is stored
LONG = "def parse(line):\n    return line.split()\n" * 40  # some 600 tokens: several coded pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, with a chat template."""
    path = tmp_path_factory.mktemp("served")
    save_embedded(path / "model")
    return path


@pytest.fixture(scope="module")
def name(folder: Path) -> str:
    return str(folder / "model")


@pytest.fixture(scope="module")
def server(folder: Path, name: str) -> Iterator[Server]:
    store = str(folder / "prefixes")
    limits = ("--max-context", str(LIMIT), "--min-tokens", str(MIN_TOKENS))
    started = Server(folder, name, "--spec", SPEC, "--prefix-store", store, *limits)
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def test_chat_is_generate_with_the_compressed_cache(server: Server, name: str, folder: Path) -> None:
    before = server.numbers()
    answer = chat(server, name, LONG, 12)
    after = server.numbers()
    model, tokenizer = models.embedded()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": LONG}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    kvcompress.wrap(model, SPEC)
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    new = done.sequences[0, ids.shape[1] :]
    # The same greedy search with the same codes in the same dtype on the same machine: no tolerance is needed.
    assert answer.choices[0].message.content == tokenizer.decode(new, skip_special_tokens=True)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ids.shape[1], len(new))
    stats = done.past_key_values.stats()
    assert change(after, before, "attention_calls_total", "fused") == stats["fused"] > 0
    assert change(after, before, "attention_calls_total", "materialised") == stats["materialised"]
    # Measured after the first token, when no page more can have been closed than at the end.
    coded = done.past_key_values.memory().bits_per_element
    assert after["cache_bits_per_element", "coded"] == pytest.approx(coded, rel=0.1)


def test_streaming_says_the_same(server: Server, name: str) -> None:
    whole = chat(server, name, "import os\n", 16)
    text, usage = read(chat(server, name, "import os\n", 16, stream=True))
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens


def test_completions_and_responses(server: Server, name: str) -> None:
    check_other_ways(server, name)
    assert [model.id for model in server.client.models.list()] == [name]


def test_several_clients_at_once(server: Server, name: str) -> None:
    after = check_clients_at_once(server, name, [f"value_{number} = " for number in range(6)])
    assert after["requests_running",] == after["requests_waiting",] == after["cache_bytes",] == 0


def test_cancel_in_the_middle_of_a_stream(server: Server, name: str) -> None:
    before = server.numbers()
    stream = chat(server, name, "count = 0\n", 1000, stream=True, extra_body=endless())
    for _ in zip(range(4), stream, strict=False):
        pass
    during = server.numbers()
    assert during["requests_running",] == 1
    assert during["cache_bytes",] > 0
    stream.close()
    # One decode step of this model takes milliseconds: a second and more is for a machine that does other things too.
    server.until_idle(5)
    assert chat(server, name, "count = 0\n").usage.completion_tokens == 8
    after = server.numbers()
    assert after["cache_bytes",] == 0
    assert change(after, before, "requests_total", "499") == 1
    assert 4 <= change(after, before, "generated_tokens_total", "499") < 900


def test_a_client_that_goes_before_its_answer(server: Server, name: str) -> None:
    """Without streaming nothing is sent until the end; that the client went is seen all the same."""
    before = server.numbers()
    body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, **endless()}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    server.until_idle(5)
    after = server.numbers()
    assert change(after, before, "requests_total", "499") == 1
    assert change(after, before, "generated_tokens_total", "499") < 900


def endless() -> dict[str, str]:
    """A generation config that no end-of-text token stops."""
    return {
        "generation_config": json.dumps(
            {"max_new_tokens": 1000, "min_new_tokens": 1000, "do_sample": False, "pad_token_id": 0}
        )
    }


def test_an_error_in_the_middle_of_a_stream(server: Server, name: str) -> None:
    """The answer has begun, so the error comes in the stream, readable; the next request is served."""
    before = server.numbers()
    beams = json.dumps({"num_beams": 2, "max_new_tokens": 4})
    with pytest.raises(openai.APIError) as caught:
        read(chat(server, name, "x", stream=True, extra_body={"generation_config": beams}))
    assert "beam" in str(caught.value.body)
    assert json.loads(f'"{quoted(ValueError(MARKS))}"') == MARKS
    assert chat(server, name, "x", extra_body={"generation_config": beams}).usage.completion_tokens <= 8
    after = server.numbers()
    assert [change(after, before, "requests_total", status) for status in ("500", "200")] == [1, 1]


MARKS = 'a "quoted" name,\nand a \\ too'

MALFORMED = [
    (b"{", "no JSON object"),
    (b"[]", "no JSON object"),
    ({}, "messages: Field required"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "no prompt can be made"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, "temperature"),
    ({"messages": [{"role": "user", "content": "x"}], "no_such_field": 1}, "no_such_field"),
    ({"messages": [{"role": "user", "content": "x"}], "generation_config": "{"}, "no prompt can be made"),
    ({"messages": [{"role": "user", "content": "x"}], "generation_config": '{"use_cache": false}'}, "own compressed"),
    ({"messages": [{"role": "user", "content": "x"}], "model": "another"}, "pinned"),
]


@pytest.mark.parametrize(("body", "said"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests(server: Server, body: Any, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]


def test_every_request_of_the_soak(server: Server, name: str) -> None:
    """python -m benchmarks soak: its clients lose nothing and count what the server counts."""
    before, tally = server.numbers(), Tally()
    asker = Asker(server.client, name, (LONG,), LIMIT, 0, tally)
    for kind in asker.kinds:
        asker.ask(kind)
    server.until_idle(5)
    after = server.numbers()
    assert tally.lost == []
    assert tally.requests == {"200": 3, "400": 2, "499": 1}
    counts = {key: change(after, before, *key) for key in COUNTS.values()}
    assert all(counts["requests_total", status] == count for status, count in tally.requests.items())
    assert counts["prompt_tokens_total", "200"] == tally.prompt_tokens
    assert counts["generated_tokens_total", "200"] == tally.generated_tokens


def test_slope() -> None:
    """2 bytes a second are 120 a minute, and a line has no doubt about it; noise has, and its interval holds it."""
    seconds = [float(second) for second in range(100)]
    line = Slope.of(seconds, [5 + 2 * second for second in seconds])
    assert (line.value, line.low, line.high) == pytest.approx((120, 120, 120))
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    noisy = Slope.of(seconds, [2 * second + error for second, error in zip(seconds, noise, strict=True)])
    assert noisy.low < 120 < noisy.high
    assert noisy.high - noisy.low < 12  # a tenth: noise of 1 over 100 s cannot tilt the line further
    with pytest.raises(ValueError, match="10 samples or more, got 9"):
        Slope.of(seconds[:9], seconds[:9])


def test_what_a_soak_says() -> None:
    same = dict.fromkeys(COUNTS, 3)
    assert judged(same, same, []) == ("ok", None)
    assert judged(same, same, ["chat: gone"]) == ("lost", "1 requests, first chat: gone")
    status, reason = judged(same, same | {"requests cancelled (499)": 2}, [])
    assert (status, reason) == ("disagreement", "requests cancelled (499): 3 here, 2 there")


def test_a_prompt_longer_than_the_budget(server: Server, name: str) -> None:
    """It is refused at once, before anything is computed, while others are being answered, and they lose nothing."""
    alone, _ = read(chat(server, name, "import os\n", 60, stream=True))
    running = chat(server, name, "import os\n", 60, stream=True)
    first = next(iter(running))
    before = server.numbers()
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, name, LONG * 6, 8)
    after = server.numbers()
    error = caught.value
    assert (error.status_code, error.code, error.type) == (400, "context_length_exceeded", "invalid_request_error")
    given = int(re.search(r"requested (\d+) tokens", str(error))[1])  # type: ignore[index]
    assert f"maximum context length is {LIMIT} tokens" in str(error)
    assert given > LIMIT
    assert change(after, before, "requests_total", "400") == 1
    assert change(after, before, "prompt_tokens_total", "400") == 0
    text, _ = read(running)
    assert (first.choices[0].delta.content or "") + text == alone


def test_the_budget_covers_the_answer(server: Server, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"length is {LIMIT} tokens"):
        chat(server, name, "x", LIMIT)
    used = chat(server, name, "x", 1).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match=f"requested {LIMIT + 1} tokens"):
        chat(server, name, "x", LIMIT - used + 1)


def test_repeated_long_prompts_are_found(server: Server, name: str) -> None:
    text = "class Store:\n    def get(self, key):\n        return self.items[key]\n" * 30
    chat(server, name, text + "one")
    before = server.numbers()
    second = chat(server, name, text + "two")
    after = server.numbers()
    assert change(after, before, "prefix_lookups_total", "hit") == 1
    reused = change(after, before, "prefix_reused_tokens_total")
    assert MIN_TOKENS <= reused < second.usage.prompt_tokens


def test_models_on_demand(folder: Path, name: str) -> None:
    """A server without a model loads those that requests name; one that cannot be compressed is refused."""
    from kvcompress.serving import app

    sliding = build("mistral")
    sliding.config.sliding_window = 32
    sliding.save_pretrained(folder / "sliding")
    for file in (folder / "model").glob("tokenizer*"):
        (folder / "sliding" / file.name).write_bytes(file.read_bytes())
    served = app.build(Settings(spec=SPEC, cache_budget="1MiB"))

    async def ask(model: str | None, tokens: int) -> tuple[int, dict[str, Any]]:
        transport = httpx2.ASGITransport(served)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens}
            answer = await client.post("/v1/chat/completions", json=body)
        return answer.status_code, answer.json()

    try:
        status, answer = asyncio.run(ask(str(folder / "sliding"), 2))
        assert (status, answer["error"]["code"]) == (400, "model_not_supported")
        assert "no full-attention layer" in answer["error"]["message"]
        status, answer = asyncio.run(ask(str(folder / "nothing"), 2))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        status, answer = asyncio.run(ask(None, 2))
        assert (status, answer["error"]["param"]) == (400, "model")
        model, _ = models.embedded()
        most = budget.tokens_within(budget.footprint(model.config, CacheSpec.parse(SPEC), model.dtype), 2**20)
        status, answer = asyncio.run(ask(name, most))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert f"length is {most} tokens" in answer["error"]["message"]
        status, answer = asyncio.run(ask(name, 2))
        assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
    finally:
        served.models.shutdown()  # ends the timers of its models, which this process would wait for


def test_budget_in_bytes() -> None:
    """The number of tokens is the largest whose cache, as really held, stays within the bytes."""
    model, _ = models.embedded()
    spec = CacheSpec.parse(SPEC)
    footprint = budget.footprint(model.config, spec, model.dtype)
    most = budget.tokens_within(footprint, 2**20)
    assert footprint.compressed(most) <= 2**20 < footprint.compressed(most + 1)
    cache = kvcompress.CompressedCache(model.config, spec)
    with torch.no_grad():
        model(torch.zeros(1, most, dtype=torch.int64), past_key_values=cache)
    assert cache.memory().total <= 2**20


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.check()
    monkeypatch.setattr(requirements, "PACKAGES", ("no_such_package",))
    with pytest.raises(ImportError, match=r"no_such_package, .*pip install 'kvcompress\[serve\]'"):
        requirements.check()


def test_moved_names_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = f"{requirements.SERVING}.utils"
    names = {
        utils: {"BaseHandler._gone": (), "GenerationState.get_manager": ("model_id", "shard")},
        "transformers.no": {},
    }
    monkeypatch.setattr(requirements, "NAMES", names)
    with pytest.raises(ImportError, match=f"version {transformers.__version__}, the one here,") as caught:
        requirements.check()
    for said in ("utils.BaseHandler._gone", "get_manager(shard=)", "transformers.no", requirements.TRIED[-1]):
        assert said in str(caught.value)


def test_settings() -> None:
    with pytest.raises(ValueError, match="port"):
        Settings(port=0)
    with pytest.raises(ValueError, match="as a size"):
        Settings(cache_budget="much")
    with pytest.raises(ValueError, match="number of tokens"):
        Settings(max_context="long")


def test_a_model_that_is_not_there_ends_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(tmp_path / "nothing")])
    assert ended.value.code == 2
    assert "cannot be loaded" in capsys.readouterr().err
