"""The job `python -m benchmarks report`: read, put together, written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import memory
from benchmarks.report import environment, page, sources, suite

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Settings:
    """paths: files and folders of results. gpu: bytes of the device that memory is held against."""

    paths: tuple[Path, ...] = (RESULTS,)
    gpu: int = memory.Settings.gpu

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("no results are named: give files or folders")
        if self.gpu < 1:
            raise ValueError(f"gpu must be at least 1 byte, got {self.gpu}")


def run(settings: Settings, output: Path, console: Console) -> list[Path]:
    """Write report.html and report.md into the folder `output`; returns their paths.

    Raises OSError for a path that is not there, ValueError where there are no results or rows of another form.
    """
    found, remarks = sources.gather(settings.paths)
    known, by_benchmark = suite.chapters(settings.gpu), sources.by_benchmark(found)
    shown = suite.sections(known, by_benchmark)
    summary = suite.summary(known, by_benchmark, shown)
    shown.append(environment.section(found, remarks))
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "report.html", output / "report.md"]
    for path, make in zip(written, (page.html, page.markdown), strict=True):
        path.write_text(make(shown, summary), "utf-8")
    for remark in remarks:
        console.print(remark, style="yellow", markup=False, soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return written
