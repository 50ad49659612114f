"""What tests ask a served model, and how they count what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.soak_server import Numbers, Server


def change(after: Numbers, before: Numbers, *key: str) -> float:
    return after.get(key, 0) - before.get(key, 0)


def chat(server: Server, name: str, text: str, tokens: int | None = 8, **more: Any) -> Any:
    more = {"temperature": 0} | more | ({} if tokens is None else {"max_tokens": tokens})
    return server.client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}], **more)


def read(stream: Any) -> tuple[str, Any]:
    """A stream's text and usage."""
    text, usage = "", None
    for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    return text, usage


def check_other_ways(server: Server, name: str) -> None:
    """Completions and responses, of as many tokens as were asked for."""
    done = server.client.completions.create(model=name, prompt="import os\n", max_tokens=4, temperature=0)
    assert done.usage.completion_tokens == 4
    answer = server.client.responses.create(model=name, input="import os", max_output_tokens=4, temperature=0)
    assert answer.usage.output_tokens == 4


def check_clients_at_once(server: Server, name: str, texts: Sequence[str]) -> Numbers:
    """Each text has the answer that it has alone, and the server counts what the clients count; returns its numbers."""
    alone = [chat(server, name, text).choices[0].message.content for text in texts]
    before = server.numbers()
    with ThreadPoolExecutor(len(texts)) as clients:
        answers = list(clients.map(lambda text: chat(server, name, text), texts))
    after = server.numbers()
    assert [answer.choices[0].message.content for answer in answers] == alone
    assert change(after, before, "requests_total", "200") == len(texts)
    prompts, generated = (sum(getattr(x.usage, f"{what}_tokens") for x in answers) for what in ("prompt", "completion"))
    assert change(after, before, "prompt_tokens_total", "200") == prompts
    assert change(after, before, "generated_tokens_total", "200") == generated
    assert change(after, before, "time_to_first_token_seconds_count") == len(texts)
    return after
