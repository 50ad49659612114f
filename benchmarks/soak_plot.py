"""memory.png of `python -m benchmarks soak`: what the server held, over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Sample(Protocol):
    """Seconds, and bytes of the process and of caches."""

    @property
    def seconds(self) -> float: ...

    @property
    def rss(self) -> int: ...

    @property
    def cache(self) -> float: ...


def plot(path: Path, samples: Sequence[Sample], settling: float, title: str) -> None:
    """Write the PNG. settling: the share of the time whose samples do not count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [sample.seconds / 60 for sample in samples]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    upper.plot(minutes, [sample.rss / 2**20 for sample in samples], color="tab:blue")
    upper.set_ylabel("memory of the process, MiB")
    lower.plot(minutes, [sample.cache / 2**20 for sample in samples], ".", markersize=3, color="tab:orange")
    lower.set_ylabel("caches of running requests, MiB")
    lower.set_xlabel("minutes of mixed requests (grey: not counted)")
    for axes in (upper, lower):
        axes.axvspan(0, settling * max(minutes), color="0.9")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
