"""The job `python -m benchmarks soak`: mixed requests against a real server for minutes, then what it lost or gained.

Clients that take turns at random ask for answers, streams, long prompts with stored beginnings, and nonsense; some
leave in the middle, some ask for more than fits. At the end the server's counts are held against the clients' own.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks import soak_plot, soak_rows
from benchmarks.log import open_log
from benchmarks.options import at_least
from benchmarks.soak_clients import Asker, Tally
from benchmarks.soak_rows import COUNTS, Row, judged
from benchmarks.soak_server import Numbers, Server, save_embedded
from benchmarks.soak_slope import Slope

DOCUMENT = "class Store{0}:\n    def get_{0}(self, key):\n        return self.items_{0}[key]\n"
DOCUMENTS = 4
POOL = "32MiB"  # of a server with continuous batching, for the caches of all clients
IDLE = 120  # seconds that the last requests may take to end


@dataclass(frozen=True)
class Settings:
    """minutes: of requests. clients: at once. lines: of a long prompt's beginning, three times; about ten tokens each.

    model: a folder or hub id, None for the embedded model. continuous_batching: in place of a prefix store. limit:
    tokens of the longest context. every: seconds between two samples of memory. settling: the share of the time whose
    samples say nothing of growth, since allocators fill up first (the prefix store is filled before, and a request of
    every kind made).
    """

    minutes: float = 10
    model: str | None = None
    spec: str = "trellis3"
    continuous_batching: bool = False
    clients: int = 3
    lines: int = 25
    limit: int = 2400
    every: float = 1
    settling: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.every <= 0:
            raise ValueError(f"minutes and every must be above 0, got {self.minutes} and {self.every}")
        if not 0 <= self.settling < 1:
            raise ValueError(f"settling must be a share from 0 to below 1, got {self.settling}")
        at_least(self, clients=1, lines=1, limit=1)


@dataclass(frozen=True)
class Sample:
    """Seconds since the first request, and bytes: of the server process, and of the caches of running requests."""

    seconds: float
    rss: int
    cache: float


def run(settings: Settings, folder: Path, console: Console) -> Row:
    """Soak a server of its own and write results.jsonl, memory.png and table.md; the row says how it went."""
    log = open_log(folder, "soak", Row, asdict(settings), fresh=True)
    with tempfile.TemporaryDirectory() as scratch, _serving(settings, Path(scratch)) as (server, model):
        console.print(f"soak: {settings.clients} clients for {settings.minutes:g} minutes")
        row, samples = _soak(settings, server, model)
    log.add(row)
    soak_plot.plot(folder / "memory.png", samples, settings.settling, f"kvcompress serve, {row.name}")
    text = soak_rows.document(row)
    (folder / "table.md").write_text(text)
    console.print(text, markup=False)
    return row


@contextmanager
def _serving(settings: Settings, scratch: Path) -> Iterator[tuple[Server, str]]:
    model = settings.model or save_embedded(scratch / "model")
    if settings.continuous_batching:
        options = ["--continuous-batching", "--cache-budget", POOL]
    else:
        options = ["--prefix-store", str(scratch / "prefixes"), "--min-tokens", "256"]
    server = Server(scratch, model, "--spec", settings.spec, "--max-context", str(settings.limit), *options)
    try:
        server.wait()
        yield server, model
    finally:
        server.stop()


def _soak(settings: Settings, server: Server, model: str) -> tuple[Row, list[Sample]]:
    tally, over = Tally(), threading.Event()
    documents = tuple(DOCUMENT.format(number) * settings.lines for number in range(DOCUMENTS))
    first = Asker(server.client, model, documents, settings.limit, settings.seed, tally)
    first.read_documents()
    for kind in first.kinds:  # what the first of its kind loads and allocates for good is no growth
        first.ask(kind)
    begun = time.monotonic()

    def client(number: int) -> None:
        asker = Asker(server.client, model, documents, settings.limit, settings.seed + number, tally)
        while not over.is_set():
            asker.ask()

    with ThreadPoolExecutor(settings.clients) as pool:
        clients = [pool.submit(client, number) for number in range(settings.clients)]
        try:
            samples = _sampled(settings, server, begun)
        finally:
            over.set()
    for ended in clients:
        ended.result()
    seconds = time.monotonic() - begun
    server.until_idle(IDLE)
    return _row(settings, tally, server.numbers(), samples, seconds), samples


def _sampled(settings: Settings, server: Server, begun: float) -> list[Sample]:
    """Samples of memory until the time is over."""
    process, samples = psutil.Process(server.process.pid), []
    while (now := time.monotonic() - begun) < settings.minutes * 60:
        samples.append(Sample(now, process.memory_info().rss, server.numbers().get(("cache_bytes",), 0)))
        time.sleep(settings.every)
    return samples


def _row(settings: Settings, tally: Tally, numbers: Numbers, samples: list[Sample], seconds: float) -> Row:
    requests = {name: tally.requests[status] for name, (what, status) in COUNTS.items() if what == "requests_total"}
    client = {
        **requests,
        "prompt tokens of answers": tally.prompt_tokens,
        "generated tokens of answers": tally.generated_tokens,
    }
    server = {name: int(numbers.get(key, 0)) for name, key in COUNTS.items()}
    status, reason = judged(client, server, tally.lost)
    settled = [sample for sample in samples if sample.seconds >= settings.settling * settings.minutes * 60]
    times = [sample.seconds for sample in settled]
    rss, cache = (Slope.of(times, [getattr(sample, name) for sample in settled]) for name in ("rss", "cache"))
    return Row(
        spec=settings.spec,
        continuous_batching=settings.continuous_batching,
        seconds=seconds,
        samples=len(samples),
        requests=dict(tally.kinds),
        client=client,
        server=server,
        lost=len(tally.lost),
        prefix_hits=int(numbers.get(("prefix_lookups_total", "hit"), 0)),
        rss_mean=sum(sample.rss for sample in settled) / len(settled),
        rss_slope=rss.value,
        rss_low=rss.low,
        rss_high=rss.high,
        cache_peak=max(sample.cache for sample in samples),
        cache_slope=cache.value,
        cache_low=cache.low,
        cache_high=cache.high,
        cache_at_end=numbers.get(("cache_bytes",), 0),
        status=status,
        reason=reason,
    )
