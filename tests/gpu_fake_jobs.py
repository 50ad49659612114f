"""What tests/test_gpu_benchmark.py has processes do: they are spawned, so they import it, and it imports little."""

import os
import time
from collections.abc import Iterator
from typing import Any


def run(name: str, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"status": "ok", "name": name, "seen": dict(known), "process": os.getpid()}
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        time.sleep(60)
    if name == "loses the device":
        yield {"status": "failed", "name": name, "reason": "an illegal address"}
        yield {"status": "ok", "name": "what must not come"}
    known[name] = 1


def unhealthy() -> bool:
    return False


def healthy() -> bool:
    return True
