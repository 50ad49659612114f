"""Clients of a server that ask for all sorts of things, and keep count of what they asked and got."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import openai
from openai import OpenAI

ANSWER = 24  # tokens of an answer at most
CANCELLED_AFTER = 3  # pieces of a stream


class LostError(Exception):
    """A request did not go as it should."""


@dataclass
class Tally:
    """requests: by status. prompt_tokens, generated_tokens: of those answered with 200, as their usage says. kinds: by
    kind of request. lost: what went otherwise than it should. Any thread may add to it."""

    requests: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, status: int, usage: Any = None) -> None:
        with self.lock:
            self.kinds[kind] += 1
            self.requests[str(status)] += 1
            self.prompt_tokens += usage.prompt_tokens if usage else 0
            self.generated_tokens += usage.completion_tokens if usage else 0

    def lose(self, kind: str, reason: str) -> None:
        with self.lock:
            self.kinds[kind] += 1
            self.lost.append(f"{kind}: {reason}")


class Asker:
    """One client; kinds: what it can ask. documents: long prompts begin with these. limit: the server's, in tokens."""

    def __init__(self, client: OpenAI, model: str, documents: tuple[str, ...], limit: int, seed: int, tally: Tally):
        self._client, self._model, self._documents, self._limit = client, model, documents, limit
        self._random, self._tally = random.Random(seed), tally
        self.kinds: dict[str, Callable[[], tuple[int, Any]]] = {
            "chat": self._chat,
            "stream": self._stream,
            "long prompt": self._long,
            "cancelled": self._cancelled,
            "malformed": self._malformed,
            "too long": self._too_long,
        }

    def ask(self, kind: str | None = None) -> None:
        """Send one request, of a kind drawn at random or the one given, and count it."""
        kind = kind or self._random.choice(list(self.kinds))
        self._count(kind, self.kinds[kind])

    def read_documents(self) -> None:
        """Ask about each document once, so that the server has stored them all."""
        for document in self._documents:
            self._count("long prompt", partial(self._about, document))

    def _count(self, kind: str, request: Callable[[], tuple[int, Any]]) -> None:
        try:
            self._tally.add(kind, *request())
        except (openai.OpenAIError, LostError) as error:
            self._tally.lose(kind, f"{type(error).__name__}: {error}")

    def _create(self, text: str, tokens: int = ANSWER, **more: Any) -> Any:
        create: Any = self._client.chat.completions.create
        messages = [{"role": "user", "content": text}]
        return create(model=self._model, messages=messages, max_tokens=tokens, temperature=0, **more)

    def _short(self) -> str:
        return f"value_{self._random.randrange(10**6)} = "

    def _chat(self) -> tuple[int, Any]:
        return 200, self._create(self._short()).usage

    def _long(self) -> tuple[int, Any]:
        return self._about(self._random.choice(self._documents))

    def _about(self, document: str) -> tuple[int, Any]:
        return 200, self._create(document + self._short()).usage

    def _stream(self) -> tuple[int, Any]:
        usage = None
        for chunk in self._create(self._short(), stream=True):
            usage = chunk.usage or usage
        _must(usage is not None, "a stream ended without its usage")
        return 200, usage

    def _cancelled(self) -> tuple[int, Any]:
        endless = {"max_new_tokens": self._limit // 2, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        stream = self._create(
            self._short(), self._limit // 2, stream=True, extra_body={"generation_config": json.dumps(endless)}
        )
        pieces = sum(1 for _ in zip(range(CANCELLED_AFTER), stream, strict=False))
        stream.close()
        _must(pieces == CANCELLED_AFTER, f"a stream to be cancelled ended after {pieces} pieces")
        return 499, None

    def _malformed(self) -> tuple[int, Any]:
        return self._refused(lambda: self._create(self._short(), tokens=0), "max_tokens")

    def _too_long(self) -> tuple[int, Any]:
        return self._refused(lambda: self._create(self._short(), tokens=self._limit), "maximum context length")

    def _refused(self, request: Callable[[], Any], said: str) -> tuple[int, Any]:
        """The status of a request that must be refused, with a message that says so."""
        try:
            request()
        except openai.BadRequestError as error:
            _must(said in str(error), f"refused with {error}")
            return error.status_code, None
        raise LostError("answered, though it should have been refused")


def _must(held: bool, otherwise: str) -> None:
    if not held:
        raise LostError(otherwise)
