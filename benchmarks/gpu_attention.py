"""Attention on codes against attention on bf16, timed: decode, its kernel's launch parameters, and prefill.

A row for each method gives what one call takes on the device, `device_us`, and what its heaviest kernel takes,
`kernel_us`; `bytes` is what must be read at least, keys and values of all tokens as they are stored. Histories take
turns, so many of them that the L2 holds none. Ratios are to the fastest bf16 method of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.device import release
from benchmarks.gpu_histories import coded, lengthened
from benchmarks.gpu_rows import Known, RefusedError, Row, Setup, SkippedError, attempt, ratio
from benchmarks.gpu_timer import Launch, Timing, asking_time, device_time, launches
from kvcompress import backends
from kvcompress.history import History
from kvcompress.reference import Mask, Scores
from kvcompress.store import PAGE

MOST_SETS = 80
ROOM = 0.9  # of the free memory that inputs may take

Method = Callable[[Tensor, Tensor, Tensor], object]


def sets_of(size: int, setup: Setup, most: int = MOST_SETS) -> int:
    """How many inputs of `size` bytes take turns: four times what the L2 holds. Raises SkippedError where none fits."""
    if setup.dry:
        return 1
    free, _ = torch.cuda.mem_get_info(setup.device)
    if size > ROOM * free:
        raise SkippedError(f"needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    l2 = getattr(torch.cuda.get_device_properties(setup.device), "L2_cache_size", 64 << 20)
    return max(1, min(most, math.ceil(4 * l2 / size), int(ROOM * free / size)))


def label(rows: int, tokens: int) -> str:
    return f"{rows} x {tokens}"


def decode(setup: Setup, rows: int, tokens: int, specs: Sequence[str], known: Known) -> Iterator[Row]:
    """One query token of each row over `tokens` cached ones: bf16 methods, unless they are known, then codes."""
    about = {"section": "decode", "rows": rows, "tokens": tokens}
    key = f"bf16 {label(rows, tokens)}"
    if key not in known:
        yield from _baselines(setup, about, known, key)
    for spec in specs:
        yield attempt({**about, "name": spec}, partial(_decode, setup, spec, rows, tokens, known, known.get(key, {})))


def _baselines(setup: Setup, about: Row, known: Known, key: str) -> Iterator[Row]:
    rows, tokens = about["rows"], about["tokens"]
    size = 2 * rows * setup.heads * tokens * setup.head_dim * setup.dtype.itemsize
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def made() -> list[tuple[Tensor, Tensor, Tensor]]:
        release(setup.device)
        if not inputs:
            inputs.extend(dense_inputs(setup, rows, 1, tokens) for _ in range(sets_of(size, setup)))
        return inputs

    for name, method in decode_methods(setup).items():
        row = attempt({**about, "name": name, "bytes": size}, partial(_dense, setup, made, method))
        if row["status"] == "ok":
            _rate(row, known)
            _keep_best(known, key, row)
        yield row


def dense_inputs(setup: Setup, rows: int, queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [rows, H*G, queries, D], key and value [rows, H, tokens, D] of normal deviates."""
    heads = setup.heads
    shapes = ((heads * setup.groups, queries), (heads, tokens), (heads, tokens))
    made = [torch.empty(rows, h, n, setup.head_dim, dtype=setup.dtype, device=setup.device) for h, n in shapes]
    query, key, value = (x.normal_() for x in made)
    return query, key, value


def decode_methods(setup: Setup) -> dict[str, Method]:
    """Attention of one token on bf16; "grouped": the query heads of a KV head as that many tokens."""
    from kvcompress.kernels.dense import attend_dense
    from kvcompress.kernels.merge import merge

    def split(query: Tensor, key: Tensor, value: Tensor) -> object:
        return merge([attend_dense(query, key, value, setup.scaling)], dtype=query.dtype)

    def grouped(query: Tensor, key: Tensor, value: Tensor) -> object:
        return scaled_dot_product_attention(query.view(len(query), key.shape[1], -1, query.shape[3]), key, value)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> object:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    if setup.dry:
        return {"split-KV": split, "math": _by(SDPBackend.MATH, repeated)}
    return {
        "flash": _by(SDPBackend.FLASH_ATTENTION, repeated),
        "flash grouped": _by(SDPBackend.FLASH_ATTENTION, grouped),
        "split-KV": split,
        "cudnn grouped": _by(SDPBackend.CUDNN_ATTENTION, grouped),
    }


def _by(backend: SDPBackend, method: Method) -> Method:
    def run(query: Tensor, key: Tensor, value: Tensor) -> object:
        with sdpa_kernel([backend]):
            return method(query, key, value)

    return run


def _dense(setup: Setup, made: Callable[[], list[tuple[Tensor, Tensor, Tensor]]], method: Method) -> Row:
    inputs = made()
    calls = [partial(method, *own) for own in inputs]
    whole = device_time(calls, setup.device)
    row = {**whole.row("device"), "kernel_us": round(whole.median * 1e6, 2), "sets": len(inputs)}
    return {**row, **asking_time(calls, setup.device).row("host")}


def _keep_best(known: Known, key: str, row: Row) -> None:
    best = known.setdefault(key, {})
    if row["device_us"] < best.get("device_us", math.inf):
        best |= {"device_us": row["device_us"], "by": row["name"]}


def _rate(row: Row, known: Known) -> None:
    """Bytes read in a second by the heaviest kernel, and its share of what a copy moves."""
    rate = row["bytes"] / (row["kernel_us"] * 1e-6)
    row |= {"bytes_per_second": round(rate), "share_of_copy": ratio(rate, known.get("copy_bytes_per_second"))}


def codes(
    setup: Setup, spec: str, rows: int, tokens: int, queries: int, most: int = MOST_SETS
) -> list[Callable[[], Tensor]]:
    """Calls of the backend over made-up histories of `tokens` coded tokens; RefusedError with the kernels' reason."""
    release(setup.device)
    source = coded(setup, spec)
    assert source.pool.layout is not None
    pages = tokens // PAGE
    size = rows * pages * source.pool.layout.page_bytes
    mask, scores = Mask(None, True), Scores(setup.scaling)
    calls: list[Callable[[], Tensor]] = []
    for seed in range(sets_of(size, setup, most)):
        history = lengthened(source, rows, pages, seed)
        chunk = dense_inputs(setup, rows, queries, queries)
        backend, reason = backends.choose(setup.device)
        if reason := reason or backend.rejects(chunk[0], history, mask, scores):
            raise RefusedError(reason)
        calls.append(partial(_attend, backend, history, chunk, mask, scores))
    return calls


def _attend(
    backend: backends.Backend, history: History, chunk: tuple[Tensor, Tensor, Tensor], mask: Mask, scores: Scores
) -> Tensor:
    return backend.attend(chunk[0], history, *chunk[1:], mask, scores)


def stored_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the coded pages that a call of `codes` reads."""
    history: History = call.args[1]  # type: ignore[attr-defined]
    return sum(slab.numel() for slab in history.pool.slabs)


def _decode(setup: Setup, spec: str, rows: int, tokens: int, known: Known, best: Known) -> Row:
    calls = codes(setup, spec, rows, tokens, 1)
    out = calls[0]()
    if not bool(torch.isfinite(out).all()):
        raise ValueError("the output holds NaN or infinite numbers")
    row: Row = {"bytes": stored_bytes(calls[0]), "sets": len(calls)}
    row |= pieces(setup, calls)
    row |= device_time(calls, setup.device).row("device") | asking_time(calls, setup.device).row("host")
    _rate(row, known)
    row |= {"baseline": best.get("by"), "ratio": ratio(best.get("device_us"), row["device_us"])}
    return {**row, "kernel_ratio": ratio(best.get("device_us"), row["kernel_us"])}


def pieces(setup: Setup, calls: Sequence[Callable[[], object]]) -> Row:
    """Microseconds of every kernel that the calls launch, by name; the heaviest one's with what its compiler says."""
    calls[0]()
    turns = [launches(call) for call in calls]
    names: dict[str, int] = {}
    found: dict[str, tuple[Timing, Launch]] = {}
    for index, own in enumerate(turns[0]):
        number = names[own.name] = names.get(own.name, 0) + 1
        time = device_time([turn[index] for turn in turns], setup.device, seconds=0.1)
        found[own.name if number == 1 else f"{own.name} {number}"] = time, own
    heaviest = max(found, key=lambda name: found[name][0].median)
    time, own = found[heaviest]
    each = {name: round(t.median * 1e6, 2) for name, (t, _) in found.items()}
    return {"pieces_us": each, "kernel": heaviest, **time.row("kernel"), **own.row()}


#: Launch parameters of `pages_kernel` to try: programs a multiprocessor, and options.
PROGRAMS = (6, 8, 10, 12, 16, 24, 32)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_stages": 2},
    {"num_stages": 3},
    {"maxnreg": 168},
    {"maxnreg": 128},
    {"num_warps": 2},
    {"num_warps": 4},
)
DRY_PROGRAMS, DRY_OPTIONS = (1,), ({"num_stages": 2},)


def tune(setup: Setup, spec: str, tokens: int, known: Known) -> Iterator[Row]:
    """`pages_kernel` over other numbers of programs, and with other options than it is launched with."""
    from kvcompress.kernels import pages

    about = {"section": "tune", "tokens": tokens, "spec": spec}
    calls: list[Callable[[], Tensor]] = []

    def timed(programs: int, options: dict[str, Any]) -> Row:
        if not calls:
            calls.extend(codes(setup, spec, 1, tokens, 1))
            calls[0]()
        with mock.patch.object(pages, "PROGRAMS", programs):
            turns = [launches(call, {"pages_kernel": options}) for call in calls]
        index = next((i for i, own in enumerate(turns[0]) if own.name == "pages_kernel"), None)
        if index is None:
            raise SkippedError("pages_kernel is not what decodes here")
        time = device_time([turn[index] for turn in turns], setup.device, seconds=0.1)
        return {**time.row("kernel"), **turns[0][index].row()}

    tries: list[tuple[int, dict[str, Any]]] = [(n, {}) for n in (DRY_PROGRAMS if setup.dry else PROGRAMS)]
    tries += [(pages.PROGRAMS, own) for own in (DRY_OPTIONS if setup.dry else OPTIONS)]
    for programs, options in tries:
        said = " ".join([spec, f"programs={programs}", *(f"{k}={v}" for k, v in options.items())])
        row = {**about, "name": said, "programs": programs, "options": options}
        yield attempt(row, partial(timed, programs, options))


def prefill(setup: Setup, chunk: int, tokens: int, specs: Sequence[str]) -> Iterator[Row]:
    """`chunk` queries over `tokens` cached tokens and, in causal order, their own."""
    about = {"section": "prefill", "rows": 1, "tokens": tokens, "chunk": chunk}
    visible = chunk * tokens + chunk * (chunk + 1) // 2
    operations = 4 * visible * setup.heads * setup.groups * setup.head_dim
    times: dict[str, float] = {}
    for name, method in prefill_methods(setup, chunk, chunk + tokens).items():
        release(setup.device)

        def measure(method: Method = method) -> Row:
            calls = [partial(method, *dense_inputs(setup, 1, chunk, chunk + tokens))]
            return device_time(calls, setup.device).row("device")

        row = _flops(attempt({**about, "name": name}, measure), operations)
        if row["status"] == "ok":
            times[name] = row["device_us"]
        yield row
    flash = min((time for name, time in times.items() if name.startswith("flash")), default=None)
    best = min(times.values(), default=None)
    for spec in specs:

        def measure_codes(spec: str = spec) -> Row:
            calls = codes(setup, spec, 1, tokens, chunk, most=1)
            row = pieces(setup, calls) | device_time(calls, setup.device).row("device")
            own = row["device_us"]
            return row | {"speed_of_flash": ratio(flash, own), "speed_of_best": ratio(best, own)}

        yield _flops(attempt({**about, "name": spec}, measure_codes), operations)


def _flops(row: Row, operations: int) -> Row:
    if row["status"] == "ok":
        row["tflops"] = round(operations / row["device_us"] / 1e6, 1)
    return row


def prefill_methods(setup: Setup, chunk: int, tokens: int) -> dict[str, Method]:
    """Attention of a chunk at the end of `tokens` on bf16. "whole" sees the chunk's later tokens too, 6% more work."""

    def last(query: Tensor, key: Tensor, value: Tensor) -> object:
        bias = causal_lower_right(chunk, tokens)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)

    def whole(query: Tensor, key: Tensor, value: Tensor) -> object:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    if setup.dry:
        return {"math whole": _by(SDPBackend.MATH, whole)}
    return {
        "flash": _by(SDPBackend.FLASH_ATTENTION, last),
        "flash whole": _by(SDPBackend.FLASH_ATTENTION, whole),
        "cudnn whole": _by(SDPBackend.CUDNN_ATTENTION, whole),
    }
