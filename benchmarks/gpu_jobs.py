"""The jobs of `python -m benchmarks gpu` by name, most valuable first; what a process is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import gpu_attention, gpu_checks, gpu_encode, gpu_model
from benchmarks.gpu_rows import DRY, GPU, Known, Row, Setup, failure
from benchmarks.gpu_worker import Job
from kvcompress.spec import DEFAULT_SPEC

MAIN = ("trellis3", "spectral3", "lloyd4")
MORE = (DEFAULT_SPEC, "trellis2", "lloyd3", "trellis4", "spectral2")
KIB = 1024

Work = Callable[[Known], Iterator[Row]]


def table(dry: bool) -> dict[str, tuple[Job, Work]]:
    """All jobs in their order; those whose names begin with "check" may run side by side."""
    setup = DRY if dry else GPU
    return {name: (Job(name, 0.0 if dry else seconds), work) for name, seconds, work in _listed(setup)}


def _listed(setup: Setup) -> Iterator[tuple[str, float, Work]]:
    yield from _checks(setup)
    yield "device", 15, partial(gpu_encode.device, setup)
    if setup.dry:
        yield from _dry(setup)
        return
    for tokens in (128, 512, 1024, 32, 4):
        yield _decode(setup, 1, tokens * KIB, MAIN)
    for spec in ("trellis3", DEFAULT_SPEC, "spectral3"):
        yield f"encode {spec}", 25, partial(gpu_encode.encode, setup, spec)
    yield "prefill", 30, _ignoring(partial(gpu_attention.prefill, setup, 4 * KIB, 32 * KIB, (*MAIN, DEFAULT_SPEC)))
    model = partial(gpu_model.decode_model, setup, (128 * KIB, 4 * KIB), ("trellis3", DEFAULT_SPEC, "spectral3"))
    yield "model", 80, model
    yield "tune trellis3", 50, partial(gpu_attention.tune, setup, "trellis3", 128 * KIB)
    yield "tune spectral3", 50, partial(gpu_attention.tune, setup, "spectral3", 128 * KIB)
    yield _decode(setup, 1, 128 * KIB, MORE, "more ")
    for tokens in (128, 32, 4, 512, 1024):
        yield _decode(setup, 8, tokens * KIB, MAIN)
    for tokens in (512, 1024, 32, 4):
        yield _decode(setup, 1, tokens * KIB, MORE[:3], "more ")


def _decode(setup: Setup, rows: int, tokens: int, specs: tuple[str, ...], more: str = "") -> tuple[str, float, Work]:
    name = f"{more}decode {gpu_attention.label(rows, tokens)}"
    return name, 15, partial(gpu_attention.decode, setup, rows, tokens, specs)


def _checks(setup: Setup) -> Iterator[tuple[str, float, Work]]:
    for case in gpu_checks.DRY_CASES if setup.dry else gpu_checks.CASES:
        yield f"check {case.name}", 20, _ignoring(partial(gpu_checks.check, case, setup))
    for text in gpu_checks.DRY_ENCODED if setup.dry else gpu_checks.ENCODED:
        yield f"check encoding {text}", 20, _ignoring(partial(gpu_checks.check_encoding, text, setup))


def _dry(setup: Setup) -> Iterator[tuple[str, float, Work]]:
    yield "decode", 0, partial(gpu_attention.decode, setup, 1, 64, ("trellis3", "lloyd8"))
    yield "encode lloyd4", 0, partial(gpu_encode.encode, setup, "lloyd4")
    yield "prefill", 0, _ignoring(partial(gpu_attention.prefill, setup, 20, 64, ("lloyd4",)))
    yield "model", 0, partial(gpu_model.decode_model, setup, (64,), ("trellis2",))
    yield "tune", 0, partial(gpu_attention.tune, setup, "lloyd4", 64)


def _ignoring(work: Callable[[], Iterator[Row]]) -> Work:
    return lambda known: work()


def run(dry: bool, name: str, known: Known) -> Iterator[Row]:
    """The rows of one job; an exception where nobody expects one is a row too."""
    try:
        yield from table(dry)[name][1](known)
    except Exception as error:
        yield {"section": name.split()[0], "name": name, **failure(error)}


def healthy() -> bool:
    """Whether the device still answers; after some errors it never does again in the process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
