"""What holds for every test: workers that run at once share the machine's cores."""

from __future__ import annotations

import os

if (workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT")) is not None:
    # Before torch is imported, and for the processes that tests start too: two workers of as many threads as there are
    # cores each wait for one another, and take five times as long.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))
