"""The device's own limits, and encoding against them: tokens a second, and its share of a model's prefill.

A model of 8 billion parameters takes 16 GFLOP a token; its prefill time is what these take at the rate of a large bf16
matrix product on this device, an upper bound of what a model reaches, so the shares are upper bounds too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.device import release
from benchmarks.gpu_attention import pieces
from benchmarks.gpu_histories import empty, tokens_like
from benchmarks.gpu_rows import Known, RefusedError, Row, Setup, attempt, ratio
from benchmarks.gpu_timer import device_time
from kvcompress import backends
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE

LAYERS = 32  # of the model
TOKEN_OPERATIONS = 16e9
PAGES = (64, 512)  # at a time; a layer codes 64


def device(setup: Setup, known: Known) -> Iterator[Row]:
    """What a copy moves in a second, read and written, and what a matrix product computes; later jobs need both."""
    about = {"section": "device"}
    yield attempt({**about, "name": "copy"}, partial(_copy, setup, known))
    release(setup.device)
    yield attempt({**about, "name": "matrix product"}, partial(_product, setup, known))


def _copy(setup: Setup, known: Known) -> Row:
    size = (1 << 12) if setup.dry else (1 << 32)
    source = torch.ones(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    time = device_time([partial(target.copy_, source)], setup.device)
    known["copy_bytes_per_second"] = 2 * size / time.median
    return {**time.row("device"), "bytes": 2 * size, "bytes_per_second": round(2 * size / time.median)}


def _product(setup: Setup, known: Known) -> Row:
    size = 64 if setup.dry else 8192
    left, right = (torch.randn(size, size, device=setup.device).to(setup.dtype) for _ in range(2))
    time = device_time([partial(torch.matmul, left, right)], setup.device, seconds=0.5)
    known["matrix_flops"] = 2 * size**3 / time.median
    return {**time.row("device"), "tflops": round(known["matrix_flops"] / 1e12, 1)}


def encode(setup: Setup, spec: str, known: Known) -> Iterator[Row]:
    """Encoding keys and values of all heads of one layer."""
    for pages in (1,) if setup.dry else PAGES:
        release(setup.device)
        about = {"section": "encode", "name": f"{spec} {pages} pages", "spec": spec, "pages": pages}
        yield attempt(about, partial(_encode, setup, spec, pages, known))


def _encode(setup: Setup, spec: str, pages: int, known: Known) -> Row:
    calls = [_encoding(setup, spec, side, pages) for side in (0, 1)]
    row: Row = {}
    seconds, kernels = 0.0, 0.0
    for call, side in zip(calls, ("keys", "values"), strict=True):
        time = device_time([call], setup.device)
        seconds += time.median
        row |= time.row(side)
        row[side] = pieces(setup, [call])
        kernels += sum(row[side]["pieces_us"].values())
    rate = pages * PAGE / seconds
    row |= {"device_us": round(seconds * 1e6, 2), "layer_tokens_per_second": round(rate)}
    row |= {"tokens_per_second": round(rate / LAYERS)}
    flops = known.get("matrix_flops")
    prefill = flops and pages * PAGE * TOKEN_OPERATIONS / flops / LAYERS  # seconds of one layer of the model
    row |= {"kernel_us": round(kernels, 2), "share_of_prefill": ratio(seconds, prefill)}
    return {**row, "kernels_share_of_prefill": ratio(kernels / 1e6, prefill)}


def _encoding(setup: Setup, spec: str, side: int, pages: int) -> Callable[[], object]:
    codec = empty(setup, CacheSpec.parse(spec)).codecs[side]
    generator = torch.Generator(setup.device).manual_seed(side)
    x = tokens_like(setup, 1, max(pages * PAGE, codec.fit_tokens), generator)[side]
    fit = {name: part.contiguous() for name, part in codec.fit(x[:, :, : codec.fit_tokens]).items()}
    x = x[0, :, : pages * PAGE].unflatten(1, (pages, PAGE)).transpose(0, 1).contiguous()
    backend, reason = backends.choose(setup.device)
    call = partial(backend.encode, codec, side, x, fit)
    found = reason or call()
    if isinstance(found, str):
        raise RefusedError(found)
    return call
