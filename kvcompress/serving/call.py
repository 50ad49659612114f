"""`Call`: one request for text, from its arrival to the end of its answer.

The middleware makes it, the handlers admit it, the thread that generates reports to it; each finds it in `current`.
"""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from kvcompress.cache import CompressedCache
from kvcompress.memory import MemoryReport


@dataclass(eq=False)
class Call:
    """bounded: whether the client said how many tokens it wants at most. seeded: whether it named a seed. admitted:
    whether it fits the budget. model: its name, "" where there is none yet. prompt_tokens, generated_tokens: so far.
    failed: an error ended the answer after it had begun. gone: the client is, so that nothing more needs to be
    generated. memory: of its cache, as last measured.
    """

    arrived: float = field(default_factory=time.monotonic)
    bounded: bool = True
    seeded: bool = False
    admitted: bool = False
    model: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    cache: CompressedCache | None = None
    memory: MemoryReport = field(default_factory=MemoryReport.nothing)


current: ContextVar[Call | None] = ContextVar("kvcompress_call", default=None)
