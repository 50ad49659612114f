"""Results of every benchmark as small made-up files, for tests of what is made of results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import (
    latency_rows,
    lmeval_rows,
    memory_rows,
    million_rows,
    offload_rows,
    parallel,
    parallel_estimate,
    parallel_rows,
    prefix_rows,
    retrieval_rows,
    rows,
    scaling_rows,
    soak_rows,
    static,
    vllm_check,
)
from benchmarks.caches import UNCOMPRESSED, compressed, quantized
from benchmarks.parallel_estimate import Estimate, Machine
from benchmarks.report.quick import QuickRow
from benchmarks.timing import Quartiles

SHARED = {
    "versions": {"python": "3.11.7", "kvcompress": "0.1.0", "torch": "2.13.0", "hqq": None},
    "platform": "Linux-x86_64",
    "device": "cpu",
    "cores": 2,
    "threads": 1,
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
}
CACHES = [UNCOMPRESSED, *map(compressed, ("spectral4", "spectral3", "spectral2", "trellis3", "turboquant3", "kivi2"))]
BITS = {"spectral4": 4.4, "spectral3": 3.4, "spectral2": 2.4, "trellis3": 3.2, "turboquant3": 3.2, "kivi2": 3.0}
LOSS = {
    "spectral4": 0.001,
    "spectral3": 0.002,
    "spectral2": 0.008,
    "trellis3": 0.004,
    "turboquant3": 0.01,
    "kivi2": 0.03,
}
FAILED = "RuntimeError: <b>broken</b> & gone"  # markup, which must not get through


def write(path: Path, benchmark: str, found: Iterable[Any], **more: Any) -> Path:
    """A file of JSON lines; more: what all lines say."""
    lines = [{**asdict(row), "benchmark": benchmark, **more, **SHARED} for row in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def quality(folder: Path) -> Path:
    found = []
    for context in (1024, 4096):
        for seed in (0, 1):
            for each in CACHES:
                row = rows.empty_row("embedded", context, seed, each)
                kl = LOSS.get(each.name, 0.0) * (1 + 0.1 * seed)
                found.append(replace(row, bits_per_element=BITS.get(each.name), kl_mean=kl, perplexity=60 + kl))
    found[-1] = replace(found[-1], status="failed", reason=FAILED, kl_mean=None)
    options = {"subjects": ["embedded"], "contexts": [1024, 4096], "specs": None, "baselines": True, "seeds": 2}
    return write(folder / "quality" / "results.jsonl", "quality", found, settings={"model": None}, options=options)


def million(folder: Path, tokens: int = 1 << 20) -> Path:
    ends = [1024 << power for power in range(tokens.bit_length() - 10)]
    base = {str(end): 30 - index for index, end in enumerate(ends)}
    found = []
    for each in CACHES:
        loss, bits = 100 * LOSS.get(each.name, 0), BITS.get(each.name)
        row = million_rows.MillionRow(each.name, each.content, tokens, 0, bits_per_element=bits, seconds=60.0)
        size = round(1024 * tokens * (bits or 32) / 16)
        row = replace(row, cache_bytes=size, bfloat16_bytes=1024 * tokens, peak_bytes=size, perplexity=25.0)
        row = replace(row, perplexity_by_bucket=base, recall=0.9, recall_by_depth=[0.8, 0.9, 1.0], questions=64)
        if each.spec is not None:
            row = replace(row, increase_by_bucket={name: (loss * (1 + i / 10), 0.02) for i, name in enumerate(base)})
        found.append(row)
    lost = dict.fromkeys(base, (2.0, 0.1))
    found.append(replace(found[0], restart=16384, recall=None, recall_by_depth=None, increase_by_bucket=lost))
    found.append(million_rows.MillionRow("lowrank32+trellis4", {}, tokens, 0, None, "failed", FAILED))
    settings = {"model": None, "text": "book.txt", "chunk": 4096, "facts": 64}
    return write(folder / "million" / "results.jsonl", "million", found, settings=settings)


def memory(folder: Path) -> Path:
    found = []
    for geometry, parameters, heads in (("Llama-3.1-8B", 8_030_261_248, 8 * 32), ("Qwen3-8B", 8_190_735_360, 8 * 36)):
        for each in (UNCOMPRESSED, *CACHES[2:4], quantized("quanto", 4)):
            for power in range(10, 21, 2):
                exact = 2 * 2 * 128 * heads << power
                size = round(exact * BITS.get(each.name, 16) / 16) + 1_000_000
                basis = "whole" if power < 13 else "layer by layer" if power < 19 else "slope"
                row = memory_rows.Row(geometry, each.name, each.library, 1 << power, each.content, parameters)
                row = replace(row, basis=basis, bits_per_element=BITS.get(each.name), cache_bytes=size, peak_bytes=size)
                found.append(replace(row, uncompressed_bytes=exact))
    found.append(replace(found[0], cache="kivi2", status="failed", reason=FAILED, cache_bytes=None))
    settings = {"chunk": 4096, "budget": 1 << 30, "seed": 0, "spectra": "kv_spectra.json"}
    return write(folder / "memory" / "results.jsonl", "memory", found, settings=settings)


def retrieval(folder: Path) -> Path:
    found = []
    for each in CACHES:
        for tokens in (1024, 4096):
            for depth in (0.0, 0.5, 1.0):
                row = retrieval_rows.empty_row("needle", tokens, depth, 0, each)
                share = 1.0 if each.spec is None else 1 - LOSS[each.name] * 20 * (1.2 - depth)
                found.append(replace(row, recall=share, questions=5, bits_per_element=BITS.get(each.name)))
            row = retrieval_rows.empty_row("multi-key", tokens, None, 0, each)
            found.append(replace(row, recall=0.75, questions=32, bits_per_element=BITS.get(each.name)))
    lost = replace(found[0], cache="QuantizedCache hqq4", side="peer", recall=None, questions=None)
    found.append(replace(lost, status="not installed", reason="hqq is not installed"))
    settings = {"model": None, "load_in_4bit": False, "text": "book.txt", "chunk": 512}
    return write(folder / "retrieval" / "results.jsonl", "retrieval", found, settings=settings)


def latency(folder: Path) -> Path:
    found = []
    base = Quartiles(0.9, 1.0, 1.2), Quartiles(0.009, 0.010, 0.012)
    for index, each in enumerate(CACHES[:5]):
        for context in (1024, 16384):
            for batch in (1, 4):
                row = latency_rows.empty_row(each, context, batch, 0)
                first, step = (Quartiles(*(value * (1 + index / 4) for value in asdict(q).values())) for q in base)
                found.append(replace(row.timed(first, step, base), cache_bytes=1000, peak_memory_bytes=2000))
    found.append(replace(found[0], cache="kivi2", status="out of memory", reason=FAILED))
    return write(folder / "latency" / "results.jsonl", "latency", found, settings={"model": None, "steps": 16})


def lmeval(folder: Path) -> Path:
    found = [
        replace(lmeval_rows.empty_row("toy", 0, each), metrics={"toy": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
        for each in CACHES[:3]
    ]
    return write(
        folder / "lmeval" / "results.jsonl",
        "lmeval",
        found,
        settings={"tasks": ["toy"], "model": "tiny", "load_in_4bit": False},
    )


def quick(folder: Path) -> Path:
    found = [
        QuickRow(
            each.name, each.library, each.content, bits_per_element=BITS.get(each.name), kl_mean=LOSS.get(each.name)
        )
        for each in CACHES
    ]
    found.append(replace(found[1], cache="prerope+spectral3", compression=4.6, step_ratio=12.3))
    return write(folder / "quick" / "results.jsonl", "quick", found, settings={"model": None, "step_context": 8192})


def scaling(folder: Path) -> Path:
    found = []
    for family, cache, base in (("spectral", "spectral3", 4.1), ("trellis", "trellis3", 3.2)):
        terms = {"constant": (-1.0, -1.1, -0.9), "bits": (-1.4, -1.5, -1.3)}
        row = scaling_rows.ScalingRow("bits", "embedded", family, caches=(cache,), coefficients=terms, x=(1.5, 4.0))
        row = replace(
            row, base=(base, base - 0.2, base + 0.2), four_inside=base > 4, reference=4096, contexts=(1024, 4096)
        )
        found.append(replace(row, r_squared=0.99, residual=1.1))
        found.append(
            replace(row, kind="perplexity", x=(0.001, 0.1), coefficients={"kl": (1.0, 0.9, 1.1)}, residual=0.01)
        )
    found.append(scaling_rows.ScalingRow("bits", "embedded", "exact", "not fitted", "too few"))
    row = scaling_rows.ScalingRow("position", "million", "spectral3", x=(1024, 1 << 20), points=11)
    found.append(replace(row, coefficients={"at_end": (0.2, 0.1, 0.3), "doublings": (0.01, 0.0, 0.02)}))
    options = {"quality": "benchmarks/results/quality/results.jsonl", "subjects": ["embedded"]}
    return write(folder / "scaling" / "results.jsonl", "scaling", found, settings={"model": None}, options=options)


def prefix(folder: Path) -> Path:
    found = []
    for each in (UNCOMPRESSED, compressed("trellis3"), compressed("prerope+spectral3")):
        for context in (1024, 4096):
            row = replace(prefix_rows.empty_row(each, context, 0), uncompressed_bytes=8000)
            seconds = {"without": [4.0], "memory": [0.5], "disk": [0.8]} if each.spec else {"without": [2.0]}
            if each.spec:
                row = replace(row, tokens_reused=836, disk_cold=True, same_first_token=1.0, memory_bytes=2000)
                row = replace(row, disk_bytes=2000)
            found.append(row.timed(seconds))
    found.append(replace(found[2], cache="kivi2", status="failed", reason=FAILED))
    return write(folder / "prefix" / "results.jsonl", "prefix", found, settings={"model": None, "question": 64})


def offload(folder: Path) -> Path:
    found = []
    for cache in ("trellis3", "prerope+spectral3"):
        for context in (4096, 16384):
            for budget, ratio, away in ((offload_rows.RESIDENT, 1.0, 0), ("50%", 1.25, 1 << 19), ("0%", 1.5, 1 << 20)):
                row = offload_rows.Row(cache, context, budget, 0, "kvcompress", {})
                row = row.timed([0.1 * ratio, 0.2 * ratio, 0.3 * ratio], [0.1, 0.2, 0.3])
                row = replace(row, device_bytes=(1 << 21) - away, host_bytes=0, disk_bytes=away)
                found.append(replace(row, same_logits=None if budget == offload_rows.RESIDENT else True))
    found.append(replace(found[0], cache="kivi2", status="out of memory", reason=FAILED, step_ratio=None))
    return write(folder / "offload" / "results.jsonl", "offload", found, settings={"model": None, "steps": 20})


def shared_out(folder: Path) -> Path:
    """Rows of `parallel`, and what it calculates."""
    found = []
    for ranks in (1, 2, 4):
        row = parallel_rows.empty_row(compressed("prerope+spectral3"), ranks)
        row = replace(row, backend="gloo", tokens=4100, page_bytes=[1200 // ranks] * ranks, held_bytes=[2000] * ranks)
        row = replace(row, prefill_payload=10_000, step_payload=10_440, step_collectives=6, difference=2e-7)
        found.append(row)
    found.append(replace(found[0], cache="kivi2", status="failed", reason=FAILED, page_bytes=None))
    written = write(folder / "parallel" / "results.jsonl", "parallel", found, options=parallel.Settings().options())
    ten, spec = 10_000_000, "prerope+spectral3"
    estimates = [
        Estimate(
            "Llama-3.1-8B", spec, ten, 4096, Machine(gpus), weights=1 << 34, pages=(1 << 37) // gpus, tables=1, exact=1,
            learned=1, activations=1 << 30, step_payload=10_440, step_sent=18_000, step_link_seconds=1e-3,
            step_read_seconds=2e-2, chunk_payload=1 << 25, chunk_sent=1 << 26, chunk_link_seconds=1e-2,
        )
        for gpus in (1, 8)
    ]  # fmt: skip
    parallel_estimate.write(written.with_name("estimate.json"), estimates)
    return written


def soak(folder: Path) -> Path:
    counts = dict.fromkeys(soak_rows.COUNTS, 40)
    row = soak_rows.Row(
        spec="trellis3", seconds=600.0, samples=600, requests={"chat": 30, "stream": 10}, client=counts, server=counts,
        lost=0, prefix_hits=12, rss_mean=2.0**30, rss_slope=1024.0, rss_low=-2048.0, rss_high=4096.0, cache_peak=1e6,
        cache_slope=0.0, cache_low=-1.0, cache_high=1.0, cache_at_end=0.0,
    )  # fmt: skip
    settings = {"minutes": 10, "model": None, "spec": "trellis3", "clients": 3, "lines": 25, "limit": 2400, "every": 1}
    return write(folder / "soak" / "results.jsonl", "soak", [row], settings={**settings, "settling": 0.2, "seed": 0})


def served(folder: Path) -> Path:
    """Rows of vllm_check."""
    plain = vllm_check.ServerRow(vllm_check.OWN, 13056, 1.0, 1.0, 1.0, 1.0, 2304, 0.0, 0.0)
    coded = replace(plain, cache="trellis3", capacity=130560, capacity_ratio=10.0, greedy_share=0.5, top_share=0.95)
    return write(folder / "vllm" / "results.jsonl", "vllm", [plain, coded], settings={"new": 24}, vllm="0.32.0")


def gpu(folder: Path) -> Path:
    def row(section: str, name: str, **more: Any) -> dict[str, Any]:
        return {
            "job": section,
            "section": section,
            "name": name,
            "status": "ok",
            **more,
            **SHARED,
            "device": "Some GPU",
        }

    lines = [row("check", "trellis3", error=0.001, allowed=0.01)]
    lines.append({**row("check", "kivi2"), "status": "refused", "reason": "affine codes"})
    for tokens in (4096, 131072):
        lines.append(row("decode", "flash", rows=1, tokens=tokens, device_us=tokens / 100))
        for name, factor in (("trellis3", 2.6), ("spectral3", 2.4)):
            more = {"device_us": tokens / 100 / factor, "ratio": factor}
            lines.append(row("decode", name, rows=1, tokens=tokens, **more))
    lines.append(row("model", "trellis3", rows=1, tokens=4096, step_us=9000.0, tokens_per_second=111.0))
    path = folder / "gpu" / "some-gpu.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compiled(folder: Path) -> Path:
    base = static.Row(
        "decode", "-", "sm_90", 128, num_warps=4, num_stages=3, elements=8192, constants={}, shared_limit=1
    )
    over: dict[str, Any] = {"spills": 4, "over_budget": ("spills is 4, at most 0 is allowed",)}
    found = [
        replace(base, codec="lloyd3", lane_instructions_per_element=2.2, registers=128, spills=0),
        replace(base, codec="trellis3", lane_instructions_per_element=3.1, registers=255, **over),
    ]
    return write(folder / "static" / "results.jsonl", "static", found, settings={})


def everything(folder: Path) -> Path:
    """All of them in a folder."""
    for make in (
        quality, million, memory, retrieval, latency, lmeval, quick, gpu, compiled, scaling, prefix, offload,
        shared_out, soak, served,
    ):  # fmt: skip
        make(folder)
    return folder
