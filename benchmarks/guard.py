"""The job `python -m benchmarks guard`: a small `quick` held against what it gave before, for every change of the code.

The text and the results that it is held against are files of the repository, so that only the code can differ. Each
spec stands for a way of its own through cache and codecs. Bounds of noise are wide, and nothing is timed: what fails
here is broken, however busy the machine.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import quick
from benchmarks.comparison import Comparison, compare
from benchmarks.measurements import read

#: Where text.txt, sentences drawn at random from the words of benchmarks/recall.py, and results.jsonl lie, seen from
#: the repository's root, as the paths of all results are.
FOLDER = Path("benchmarks/results/guard")

#: The small job.
SETTINGS = quick.Settings(
    text=FOLDER / "text.txt",
    specs=(
        "exact",
        "fp8",
        "lloyd3",
        "trellis3",
        "spectral3",
        "prerope+spectral3",
        "lowrank32+trellis4",
        "turboquant3",
        "kivi2",
        "kvquant3",
    ),
    baselines=False,
    context=1024,
    facts=8,
    chunk=256,
    step_context=0,
)


def run(tolerance: float, update: bool, console: Console, settings: quick.Settings = SETTINGS) -> Comparison | None:
    """Measure, and compare with results.jsonl beside the settings' text; or, to update, replace that (None then).

    tolerance: factor on the bounds of `compare`. Raises OSError where the files are not there, ValueError where they
    are not comparable.
    """
    if settings.text is None:
        raise ValueError("the guard needs a text that does not change: text is None, name a file")
    known = settings.text.parent / "results.jsonl"
    old = {} if update else read(known)  # before a minute is spent
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            quick.run(settings, Path(name), console)
            if update:
                shutil.copyfile(Path(name) / "results.jsonl", known)
                return None
            return compare(old, read(Path(name)), tolerance, times=False)
    finally:
        torch.set_num_threads(threads)
