"""Around the whole app: a `Call` for every request for text, ended early where its client goes, counted at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kvcompress.serving.call import Call, current
from kvcompress.serving.loading import CompressedModels
from kvcompress.serving.metrics import Metrics
from kvcompress.serving.refusal import CLOSED

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class Watching:
    """An ASGI app around another one, which serves `models`."""

    def __init__(self, app: App, models: CompressedModels, metrics: Metrics):
        self.app, self.models, self.metrics = app, models, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        exchange = Exchange(Call(), receive, send, self.metrics)
        token = current.set(exchange.call)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            current.reset(token)
            exchange.close()


class Exchange:
    """What passes between a client and the app for one call.

    Once the body is read, all that a client still says is that it went; that is listened for from then on, whether the
    app asks or not.
    """

    def __init__(self, call: Call, receive: Receive, send: Send, metrics: Metrics):
        self.call, self._receive, self._send, self._metrics = call, receive, send, metrics
        self._status: int | None = None
        self._counted = False
        self._listener: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        if self._listener is not None:
            return await asyncio.shield(self._listener)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.call.gone.set()
        elif not message.get("more_body"):
            self._listener = asyncio.create_task(self._listen())
        return message

    async def _listen(self) -> Message:
        message = await self._receive()
        self.call.gone.set()
        self._count()  # before generation stops: whoever sees the server idle sees it counted
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not message.get("more_body"):
            self._count()
        await self._send(message)

    def close(self) -> None:
        """The app is done with it."""
        self._count()
        self.call.gone.set()
        if self._listener is not None:
            self._listener.cancel()

    def _count(self) -> None:
        if self._counted:
            return
        self._counted = True
        if self.call.gone.is_set() or self._status is None:
            status = CLOSED if self.call.gone.is_set() else 500
        else:
            status = 500 if self.call.failed and self._status < 400 else self._status
        self._metrics.count(self.call, status)
