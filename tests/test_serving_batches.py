"""`kvcompress serve --continuous-batching`: a real server process, asked by OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from transformers import GenerationConfig

from benchmarks.soak_server import TEMPLATE, Server, save_embedded
from kvcompress import CacheSpec, batching, models
from kvcompress.serving import budget, sampling
from kvcompress.serving.refusal import RefusalError
from kvcompress.serving.settings import Settings
from kvcompress.units import parse_size
from tests.served import change, chat, check_clients_at_once, check_other_ways, read

SPEC, BUDGET = "key=lloyd4,value=lloyd3", "2MiB"  # quicker to encode than trellis codes
BLOCK = 5 * 2 * 2 * 64 * 64 * 30 // 64  # bytes of 64 tokens: 5 layers, keys and values of 2 heads of 64, 3.75 bits each
SECTORS = parse_size(BUDGET) // BLOCK - 2  # of one block, but for the two that transformers keeps
LONG = "def parse(line):\n    return line.split()\n" * 20  # some 250 tokens: several chunks and pages


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, with a chat template."""
    return save_embedded(tmp_path_factory.mktemp("batched") / "model")


@pytest.fixture(scope="module")
def server(name: str) -> Iterator[Server]:
    options = ("--continuous-batching", "--spec", SPEC, "--cache-budget", BUDGET, "--prefill-chunk", "128")
    started = Server(Path(name).parent, name, *options)
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def endless(server: Server, name: str, text: str) -> Any:
    """A stream that no end-of-text token ends."""
    settings = {"max_new_tokens": 1000, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return chat(server, name, text, 1000, stream=True, extra_body={"generation_config": json.dumps(settings)})


def pieces(stream: Any, count: int) -> int:
    return sum(1 for _ in zip(range(count), stream, strict=False))


def test_chat_is_generate_batch(server: Server, name: str) -> None:
    """The tokens of the model's own generate_batch with the same pages and chunks; streamed or not, alone or not."""
    before = server.numbers()
    answer = chat(server, name, LONG, 12)
    after = server.numbers()
    model, tokenizer = models.embedded()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": LONG}], add_generation_prompt=True)["input_ids"]
    batching.enable(model, SPEC)
    pool = budget.pool(model, CacheSpec.parse(SPEC), parse_size(BUDGET), 128)
    end = model.generation_config.eos_token_id
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
    (done,) = model.generate_batch([ids], generation_config=settings, continuous_batching_config=pool).values()
    assert answer.choices[0].message.content == tokenizer.decode(done.generated_tokens, skip_special_tokens=True)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(done.generated_tokens))
    text, _ = read(chat(server, name, LONG, 12, stream=True))
    assert text == answer.choices[0].message.content
    assert change(after, before, "prompt_tokens_total", "200") == len(ids)
    assert change(after, before, "time_to_first_token_seconds_count") == 1


def test_completions_and_responses(server: Server, name: str) -> None:
    check_other_ways(server, name)


def test_requests_are_interleaved(server: Server, name: str) -> None:
    """While one answer goes on without end, another begins and ends, and the first has gone on in between.

    In turns, the second would wait for the first one's thousand tokens.
    """
    first = endless(server, name, "count = 0\n")
    assert pieces(first, 3) == 3
    second = chat(server, name, "import os\n", 16)
    assert second.usage.completion_tokens == 16
    both = server.numbers()
    assert both["requests_running",] == 1
    assert pieces(first, 3) == 3
    third = endless(server, name, "class Store:\n")
    assert pieces(third, 3) == 3
    held = server.numbers()
    assert (held["requests_running",], held["requests_waiting",]) == (2, 0)
    for stream in (first, third):
        assert pieces(stream, 3) == 3
        stream.close()
    server.until_idle(5)


def test_several_clients_at_once(server: Server, name: str) -> None:
    check_clients_at_once(server, name, [f"value_{number} = " for number in range(5)] + [LONG])
    server.until_idle(5)
    assert server.numbers()["cache_bytes",] == 0


def test_cancel_in_the_middle_of_a_stream(server: Server, name: str) -> None:
    """Blocks are held while it runs, in the bytes of the pool, and given back when its client goes."""
    before = server.numbers()
    stream = endless(server, name, LONG)
    assert pieces(stream, 4) == 4
    during = server.numbers()
    assert during["requests_running",] == 1
    assert 240 < during["cache_tokens",] < 1300
    assert during["cache_bytes",] % BLOCK == 0  # pages are full but for the last
    assert 0 <= during["cache_bytes",] - during["cache_tokens",] * BLOCK / 64 < BLOCK
    assert during["cache_bits_per_element", "coded"] == pytest.approx(3.75, rel=64 / 240)
    assert during["cache_bytes",] < during["cache_pool_bytes",] <= parse_size(BUDGET)
    stream.close()
    server.until_idle(5)
    after = server.numbers()
    assert after["cache_bytes",] == 0
    assert after["cache_bits_per_element", "coded"] == pytest.approx(3.75, rel=64 / 240)  # as last measured
    assert change(after, before, "requests_total", "499") == 1
    assert 3 <= change(after, before, "generated_tokens_total", "499") < 900  # the first piece names the role
    assert chat(server, name, "count = 0\n").usage.completion_tokens == 8


def test_a_client_that_goes_before_its_answer(server: Server, name: str) -> None:
    before = server.numbers()
    settings = json.dumps({"max_new_tokens": 1000, "do_sample": False, "eos_token_id": -1})
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, "generation_config": settings}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    server.until_idle(5)
    after = server.numbers()
    assert change(after, before, "requests_total", "499") == 1
    assert change(after, before, "generated_tokens_total", "499") < 900


def test_a_prompt_longer_than_the_pool(server: Server, name: str) -> None:
    """It is refused at once, whatever the others do, and what would just fit is answered."""
    running = endless(server, name, "import os\n")
    assert pieces(running, 2) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, name, LONG * 20)
    assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")
    limit = int(re.search(r"length is (\d+) tokens", str(caught.value))[1])  # type: ignore[index]
    assert SECTORS * 64 - 9 * 64 < limit <= SECTORS * 64  # the pool is rounded down to whole blocks of numbers
    assert pieces(running, 2) == 2
    running.close()
    server.until_idle(5)
    used = chat(server, name, LONG, 1).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match=f"requested {limit + 1} tokens"):
        chat(server, name, LONG, limit - used + 1)


def test_more_requests_than_the_pool_holds(server: Server, name: str) -> None:
    """Four prompts that would fill the pool more than once wait for room, or are read again: all are answered."""
    texts = [f"# {number}\n" + LONG * 4 for number in range(4)]
    before = server.numbers()
    with ThreadPoolExecutor(len(texts)) as clients:
        answers = list(clients.map(lambda text: chat(server, name, text), texts))
    after = server.numbers()
    assert sum(answer.usage.total_tokens for answer in answers) > SECTORS * 64
    assert change(after, before, "requests_total", "200") == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stop": ["x"]}, "stop_strings"),
        ({"frequency_penalty": 0.5}, "repetition_penalty=1.5"),
        ({"extra_body": {"generation_config": '{"num_beams": 2, "max_new_tokens": 2}'}}, "num_beams=2"),
        (
            {
                "seed": 1,
                "extra_body": {"generation_config": '{"do_sample": true, "max_new_tokens": 2}'},
                "temperature": 1,
            },
            "seed",
        ),
    ],
)
def test_what_rows_of_a_batch_cannot_have(server: Server, name: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        chat(server, name, "x", **more)


def test_settings() -> None:
    with pytest.raises(ValueError, match="name it"):
        Settings(continuous_batching=True)
    with pytest.raises(ValueError, match="leave out --prefix-store"):
        Settings("model", prefix_store=Path("prefixes"), continuous_batching=True)
    model, _ = models.embedded()
    with pytest.raises(ValueError, match="--cache-budget"):
        budget.pool(model, CacheSpec.parse(SPEC), None, 128)
    with pytest.raises(ValueError, match="too small") as caught:
        budget.pool(model, CacheSpec.parse(SPEC), 1000, 128)
    least = int(re.search(r"(\d+) would hold", str(caught.value))[1])  # type: ignore[index]
    assert budget.pool(model, CacheSpec.parse(SPEC), least, 128).num_blocks == 1
    with pytest.raises(ValueError, match="too small"):
        budget.pool(model, CacheSpec.parse(SPEC), least - 1, 128)


def test_sampling_options() -> None:
    """Greedy search leaves the likeliest token alone; what is not said is off; a seed goes where nothing is drawn."""
    model, _ = models.embedded()
    greedy = sampling.options(GenerationConfig(do_sample=False, max_new_tokens=3), model, seeded=True)
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"]) == (1.0, 1, 0.0)
    drawn = sampling.options(GenerationConfig(do_sample=True, temperature=0.7, top_k=10**6), model, seeded=False)
    assert (drawn["temperature"], drawn["top_k"], drawn["top_p"]) == (0.7, model.config.vocab_size, 1.0)
    with pytest.raises(RefusalError, match="no seed"):
        sampling.options(GenerationConfig(do_sample=True), model, seeded=True)
