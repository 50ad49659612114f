"""What the page can show, in its order: a benchmark's title, what its section says of itself, and what makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.report import (
    gpu,
    latency,
    memory,
    million,
    offload,
    others,
    parallel,
    prefix,
    quality,
    quick,
    retrieval,
    scaling,
    soak,
    static,
    vllm,
)
from benchmarks.report.parts import Part, Section
from benchmarks.report.sources import Source


@dataclass(frozen=True)
class Chapter:
    """make: from one file's lines. asked: the question that it answers, for where nothing answers it."""

    benchmark: str
    title: str
    about: str
    make: Callable[[Source], Part]
    asked: str


def chapters(device: int) -> tuple[Chapter, ...]:
    """device: bytes of the device that memory is held against."""
    return (
        Chapter(
            "quality", "Quality against size", quality.ABOUT, quality.part, "what each codec loses at how many bits"
        ),
        Chapter(
            "million", "One long document", million.ABOUT, million.part, "perplexity by position up to a million tokens"
        ),
        Chapter(
            "memory", "Memory against context", memory.ABOUT, partial(memory.part, gpu=device), "how many tokens fit"
        ),
        Chapter("retrieval", "Finding facts", retrieval.ABOUT, retrieval.part, "what is found in a long text"),
        Chapter("scaling", "Scaling laws", scaling.ABOUT, scaling.part, "how loss goes with bits and context"),
        Chapter("lmeval", "Tasks of lm-eval", others.LMEVAL, others.lmeval, "what published tasks say"),
        Chapter("latency", "Speed", latency.ABOUT, latency.part, "time to first token and decode speed"),
        Chapter("prefix", "Prompts that begin alike", prefix.ABOUT, prefix.part, "what a store of prefixes saves"),
        Chapter("offload", "Offloaded pages", offload.ABOUT, offload.part, "what offloaded pages cost"),
        Chapter("parallel", "One context on several devices", parallel.ABOUT, parallel.part, "what each device holds"),
        Chapter("soak", "A server under load", soak.ABOUT, soak.part, "whether a server loses requests or grows"),
        Chapter("vllm", "Codes in vLLM", vllm.ABOUT, vllm.part, "how many tokens a vLLM server holds"),
        Chapter("gpu", "Kernels on a GPU", gpu.ABOUT, gpu.part, "whether the kernels are right and fast on a GPU"),
        Chapter("static", "Kernels as compiled", static.ABOUT, static.part, "what the kernels cost as compiled"),
        Chapter("quick", "A quick look", quick.ABOUT, quick.part, "size, quality and speed at a glance"),
        Chapter(
            "prefill_memory",
            "Memory during a prefill",
            others.PREFILL,
            others.prefill_memory,
            "how far a prefill rises",
        ),
        Chapter("code_error", "The codes alone", others.CODES, others.code_error, "how far the codes are from theory"),
        Chapter("embedded", "The embedded model", others.EMBEDDED, others.embedded, "what the small model can do"),
    )


def sections(known: Sequence[Chapter], found: Mapping[str, Sequence[Source]]) -> list[Section]:
    """A section for every benchmark that has lines."""
    return [
        Section(each.title, each.about, tuple(map(each.make, found[each.benchmark])))
        for each in known
        if each.benchmark in found
    ]


def summary(known: Sequence[Chapter], found: Mapping[str, Sequence[Source]], shown: Sequence[Section]) -> list[str]:
    """The top of the page: each section's headlines, then what is missing."""
    said = [
        f"[{section.title}](#{section.anchor}): {part.headline}"
        for section in shown
        for part in section.parts
        if part.headline
    ]
    missing = [f"{each.asked} (`{each.benchmark}`)" for each in known if each.benchmark not in found]
    if missing:
        said.append(f"**Not among these results:** {'; '.join(missing)}.")
    if not _gpus(found):
        said.append("**No row comes from a GPU:** all times are a CPU's.")
    strange = sorted(found.keys() - {each.benchmark for each in known})
    if strange:
        said.append(f"**Not shown, for the page has no section for it:** rows of {', '.join(strange)}.")
    return said


def _gpus(found: Mapping[str, Sequence[Source]]) -> set[str]:
    """The devices of all rows but CPUs."""
    devices = {str(line["device"]) for own in found.values() for each in own for line in each.lines if "device" in line}
    return devices - {"cpu", "dry"}
