"""Continuous batching of one model: requests join a running batch, share a pool of blocks, and leave when they end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import CBGenerateManager, CBStreamer, _StreamError
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from kvcompress.batching.allocator import RecordsAllocator
from kvcompress.batching.manager import RecordsManager
from kvcompress.batching.usage import held, pool_bytes
from kvcompress.memory import MemoryReport
from kvcompress.serving import sampling
from kvcompress.serving.budget import admit, asked, positions
from kvcompress.serving.call import Call
from kvcompress.serving.metrics import MEASURED_EVERY, Metrics
from kvcompress.serving.refusal import CLOSED, RefusalError, quoted
from kvcompress.spec import CacheSpec

logger = logging.getLogger(__name__)

Output = Any  # transformers' GenerationOutput

#: After it nothing can be computed in this process. Before torch 2.8 such errors were not told apart.
LOST: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


@dataclass(eq=False)
class Live:
    """A request in the batch, or on its way into it. told: hears every output on the event loop; None: it is over,
    since its client has gone.
    """

    name: str
    call: Call
    prompt: int
    metrics: Metrics
    loop: asyncio.AbstractEventLoop
    told: Callable[[Output | None], None]
    cancelled: bool = False
    _state: str = "waiting"
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Its prompt is being read. Any thread may say so, more than once."""
        with self._lock:
            if self._state == "waiting":
                self._state, self.call.prompt_tokens = "running", self.prompt
                self.metrics.start(self.call)

    def stop(self) -> None:
        """Nothing more is generated for it."""
        with self._lock:
            self._state = "over"
            self.metrics.stop(self.call)

    def hear(self, output: Output) -> None:
        """Count an output, on the event loop, and pass it on."""
        self.start()
        call = self.call
        if not call.generated_tokens and output.generated_tokens:
            self.metrics.first_token.labels(call.model).observe(time.monotonic() - call.arrived)
        call.generated_tokens = len(output.generated_tokens)
        if output.error is not None:
            call.failed = True
        if output.is_finished():
            self.stop()
        self.told(output)


class WatchedManager(RecordsManager):
    """Lets go of requests whose clients have gone, between two steps, and says what it holds.

    A step that fails, as for want of memory, fails the requests that are there, and the next ones are answered.
    name: the model's, in the metrics. live: requests by name.
    """

    def __init__(self, name: str, metrics: Metrics, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.name, self.metrics = name, metrics
        self.live: dict[str, Live] = {}
        self._measured, self._counted = -MEASURED_EVERY, Counter[str]()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        for request in list(self.live.values()):
            if request.call.gone.is_set() and not request.cancelled:
                request.cancelled = True
                self.cancel_request(request.name)
        scheduler = batch_processor.scheduler
        try:
            going = super()._generation_loop_body(batch_processor, bootstrapping)
        except LOST:
            raise
        except Exception as error:
            logger.exception("a step of %s has failed, and with it its requests", self.name)
            batch_processor.fail_all_requests(error)
            scheduler.reset()
            going = True
        for request in list(self.live.values()):
            if request.name in scheduler.active_requests:
                request.start()
            elif request.cancelled and request.name not in scheduler.waiting_requests:
                self.forget(request)
                request.loop.call_soon_threadsafe(request.told, None)
        self._measure()
        return going

    def add(self, request: Live, ids: list[int], tokens: int, **options: Any) -> None:
        """Raises RefusalError (503) where the thread that generates has ended."""
        self.live[request.name] = request

        def hear(output: Output) -> None:
            if request.name in self.live:
                if output.is_finished():
                    self.live.pop(request.name)
                request.hear(output)

        self.register_result_handler(request.name, hear)
        added = self.add_request(ids, request.name, max_new_tokens=tokens, streaming=True, **options)
        status = self.background_thread_status
        if added is None or status.can_accept_new_requests() is not None:  # it may have ended in between
            self.forget(request)
            reason = status.fatal_error
            raise RefusalError(503, f"the thread that generates has ended: {reason or 'the server is stopping'}")

    def forget(self, request: Live) -> None:
        """It is in the batch no more."""
        self.live.pop(request.name, None)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request.name, None)
        request.stop()

    def held(self) -> tuple[MemoryReport, int]:
        """What requests hold now (tokens: of all of them), and the bytes of the pool."""
        return held(self, together=True), pool_bytes(self)

    def _measure(self) -> None:
        """Now and then, for what is said of bits when nothing runs, and for counts of attention."""
        if time.monotonic() - self._measured < MEASURED_EVERY or self.batch_processor is None:
            return
        self._measured = time.monotonic()
        self.metrics.measured(self.name, held(self, together=True))
        counts = Counter[str]()
        for allocator in self.batch_processor.cache.cache_allocators.values():
            if isinstance(allocator, RecordsAllocator):
                counts["fused"] += self.current_batch * allocator.pages_per_block
                for attention in allocator.attention.values():
                    counts.update(attention.counts)
        self.metrics.count_attention(self.name, dict(counts - self._counted))
        self._counted = counts


class Batches(CBGenerateManager):
    """What handlers ask for text. limit: tokens of prompt and answer at most: what the pool holds, or fewer.

    Raises ValueError for a pool that does not hold one token.
    """

    def __init__(self, manager: WatchedManager, most: int | None):
        super().__init__()
        self.manager = self._cb = manager
        self._names = itertools.count()
        manager.warmup()  # makes the cache
        assert manager.batch_processor is not None
        room = infer_max_single_request_tokens(manager.batch_processor.cache)
        if not room:
            size = pool_bytes(manager)
            self.stop()
            raise ValueError(f"a pool of {size} bytes does not hold one token in all kinds of layers of this model")
        limits = (room, most, positions(manager.model))  # type: ignore[arg-type]
        self.limit = min(limit for limit in limits if limit is not None)
        manager.start()

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        name: str,
        spec: CacheSpec,
        config: ContinuousBatchingConfig,
        most: int | None,
        metrics: Metrics,
    ) -> Batches:
        """config: of the pool. most: tokens of a request, None: as the pool holds."""
        defaults = sampling.defaults(model.generation_config)
        manager = WatchedManager(name, metrics, model, defaults, config, spec=spec)
        metrics.pools[name] = manager.held
        return cls(manager, most)

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Nothing: the manager is there, and takes each request's own settings."""

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, CBStreamer]:
        queue: asyncio.Queue = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        name, loop = self._name(), asyncio.get_running_loop()
        streamer = CBStreamer(self.manager, name, tokenizer, loop, queue, response_parser=response_parser)
        call = asked(self.manager.name, len(inputs["input_ids"]))

        def told(output: Output | None) -> None:
            if output is None:
                queue.put_nowait(None)
                return
            try:
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(_StreamError(quoted(RuntimeError(output.error))))
                elif output.is_finished():
                    streamer.end()
            except Exception as error:  # of the decoder; other requests' outputs come in the same call
                call.failed = True
                queue.put_nowait(_StreamError(quoted(error)))

        self._submit(name, call, model, inputs["input_ids"], gen_config, told)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        done: asyncio.Future[Output | None] = asyncio.get_running_loop().create_future()

        def told(output: Output | None) -> None:
            if not done.done() and (output is None or output.is_finished()):
                done.set_result(output)

        call = asked(self.manager.name, len(inputs["input_ids"]))
        self._submit(self._name(), call, model, inputs["input_ids"], gen_config, told)
        output = await done
        if output is None:
            raise RefusalError(CLOSED, "the client has closed the connection")
        if output.error is not None:
            raise RuntimeError(output.error)
        text = processor.decode(output.generated_tokens, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), output.generated_tokens

    def _name(self) -> str:
        """The server's own: two clients may have given their requests the same."""
        return f"request {next(self._names)}"

    def _submit(
        self,
        name: str,
        call: Call,
        model: PreTrainedModel,
        ids: list[int],
        gen_config: GenerationConfig,
        told: Callable[[Output | None], None],
    ) -> None:
        """Raises RefusalError for a request that does not fit, or asks for what a batch cannot do for one row."""
        if call.gone.is_set():  # said on this thread only, so from here on `live` names it before it can be
            raise RefusalError(CLOSED, "the client has closed the connection")
        options = sampling.options(gen_config, model, call.seeded)
        tokens = admit(call, gen_config, len(ids), self.limit, self.manager.metrics)
        request = Live(name, call, len(ids), self.manager.metrics, asyncio.get_running_loop(), told)
        self.manager.add(request, ids, tokens, **options)

    def stop(self) -> None:
        """End the thread that generates; requests that are in the batch fail."""
        self.manager.stop(block=True, timeout=10, hard_stop=True)
        self.manager.metrics.pools.pop(self.manager.name, None)
