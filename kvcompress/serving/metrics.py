"""The numbers of `/metrics`, for Prometheus; all but those of single parts are labelled by model.

Requests and their tokens are counted right before the last byte of an answer leaves, so that whoever has the answer
finds it counted. Caches are measured by the thread that generates, a few times a second.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from kvcompress.memory import MemoryReport
from kvcompress.serving.call import Call

PREFIX = "kvcompress"
MEASURED_EVERY = 0.25  # seconds between two looks at a cache's memory
Value = Callable[[list[MemoryReport]], float]
#: What the requests of a batch hold together at this moment, and the bytes of the pool that they hold it in.
Pool = Callable[[], tuple[MemoryReport, int]]
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What a server counts, and what it holds now. Any thread may use it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests for text by the HTTP status of the answer", "status")
        tokens = "of requests by the HTTP status of the answer"
        self.prompt_tokens = self._counter("prompt_tokens", f"Tokens of prompts, {tokens}", "status")
        self.generated_tokens = self._counter("generated_tokens", f"Tokens generated, {tokens}", "status")
        self.prefixes = self._counter("prefix_lookups", "Prompts looked up in the prefix store", "result")
        self.reused = self._counter("prefix_reused_tokens", "Tokens of prompts that came from the prefix store")
        self.attention = self._counter("attention_calls", "fused, materialised, or left to the reference: why", "way")
        self.first_token = Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "From a request's arrival to its first token, time in the queue included",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._lock = threading.Lock()
        self._running: set[Call] = set()
        self._waiting: set[Call] = set()
        self._last: dict[str, MemoryReport] = {}  # of each model, as last measured
        self.pools: dict[str, Pool] = {}  # of models whose requests share one
        self.registry.register(self)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", what, ["model", *labels], registry=self.registry)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def wait(self, call: Call) -> None:
        """A request was admitted."""
        with self._lock:
            self._waiting.add(call)

    def start(self, call: Call) -> None:
        """Its prompt is about to be read."""
        with self._lock:
            self._waiting.discard(call)
            self._running.add(call)

    def stop(self, call: Call) -> None:
        """Nothing more is generated for it."""
        with self._lock:
            self._waiting.discard(call)
            self._running.discard(call)
            if call.memory.elements:
                self._last[call.model] = call.memory

    def measured(self, model: str, report: MemoryReport) -> None:
        """What a batch holds; kept for when it holds nothing."""
        with self._lock:
            if report.elements:
                self._last[model] = report

    def count(self, call: Call, status: int) -> None:
        """A request is over."""
        labels = (call.model, str(status))
        self.requests.labels(*labels).inc()
        self.prompt_tokens.labels(*labels).inc(call.prompt_tokens)
        self.generated_tokens.labels(*labels).inc(call.generated_tokens)

    def count_prefix(self, model: str, result: str, tokens: int) -> None:
        """A prompt was looked up, and so many of its tokens were found. result: hit, miss, passed over."""
        self.prefixes.labels(model, result).inc()
        self.reused.labels(model).inc(tokens)

    def count_attention(self, model: str, stats: dict[str, int]) -> None:
        """stats: a cache's, of a request that is over."""
        for way, calls in stats.items():
            self.attention.labels(model, way).inc(calls)

    def collect(self) -> Iterator[Metric]:
        """What is held at this moment; prometheus-client asks."""
        with self._lock:
            running, waiting, last = list(self._running), list(self._waiting), dict(self._last)
        held: dict[str, list[MemoryReport]] = {model: [] for model in last}
        for call in running:
            held.setdefault(call.model, []).append(call.memory)
        pool = GaugeMetricFamily(f"{PREFIX}_cache_pool_bytes", "What all requests' caches share", labels=["model"])
        for model, ask in list(self.pools.items()):
            report, size = ask()
            held[model] = [report] if report.elements else []
            pool.add_metric([model], size)
        yield pool
        yield self._gauge("cache_bytes", "Caches of running requests", held, lambda x: sum(r.total for r in x))
        yield self._gauge(
            "cache_uncompressed_bytes",
            "What they would take in the model's dtype",
            held,
            lambda x: sum(r.uncompressed for r in x),
        )
        yield self._gauge("cache_tokens", "Tokens that they hold", held, lambda x: sum(r.tokens for r in x))
        bits = GaugeMetricFamily(
            f"{PREFIX}_cache_bits_per_element",
            "Bits for each number of a key or value, of running requests or else the last one, overheads included",
            labels=["model", "elements"],
        )
        for model, reports in held.items():
            whole = sum(reports, MemoryReport.nothing()) if reports else last.get(model, MemoryReport.nothing())
            for elements, value in (("coded", whole.bits_per_element), ("all", whole.effective_bits_per_element)):
                if not math.isnan(value):
                    bits.add_metric([model, elements], value)
        yield bits
        for name, calls in (("running", running), ("waiting", waiting)):
            gauge = GaugeMetricFamily(f"{PREFIX}_requests_{name}", f"Requests that are {name} now", labels=["model"])
            for model in sorted({*held, *(call.model for call in calls)}):
                gauge.add_metric([model], sum(call.model == model for call in calls))
            yield gauge

    def _gauge(self, name: str, what: str, held: dict[str, list[MemoryReport]], value: Value) -> Metric:
        gauge = GaugeMetricFamily(f"{PREFIX}_{name}", what, labels=["model"])
        for model, reports in held.items():
            gauge.add_metric([model], value(reports))
        return gauge
