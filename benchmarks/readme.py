"""The tables and figures of the READMEs, made from committed results: ``python -m benchmarks.readme`` rewrites them.

A block stands between ``<!-- NAME: python -m benchmarks.readme -->`` and ``<!-- end -->``; tests/test_readme.py fails
where one says anything else than the results do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import code_error, memory_rows, million_tables, static, vllm_check
from benchmarks.caches import OUR_SIDE, PEER_SIDE
from benchmarks.log import read, readable
from benchmarks.million_rows import MillionRow
from benchmarks.pareto import Spread, Summary, best_at, panels, ratio, summarise
from benchmarks.prefill_memory import PrefillRow
from benchmarks.report.quick import QuickRow
from benchmarks.rows import Row
from benchmarks.scaling_rows import ScalingRow
from benchmarks.scaling_tables import spread
from benchmarks.tables import markdown
from kvcompress.presets import PRESETS
from kvcompress.spec import DEFAULT_SPEC

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
FILES = (ROOT / "README.md", ROOT / "kvcompress" / "vllm" / "README.md")
BLOCK = re.compile(r"(<!-- (\w+): python -m benchmarks\.readme -->\n).*?( *<!-- end -->)", re.DOTALL)

#: What the table of quality shows, of all that was measured.
SHOWN = (
    "fp8", "bnb8", "kivi4", "QuantizedCache quanto4", "nf4", "QuantizedCache hqq4", "kvarn4", "prerope+spectral4",
    "spectral4", "trellis4", "turboquant4", "prerope+spectral3.5", "kvarn3", "kvquant3", "prerope+spectral3",
    "spectral3", "trellis:auto3", "trellis:k4v2", "trellis3", "turboquant3", "prerope+spectral2.5", "kivi2",
    "QuantizedCache quanto2", "prerope+spectral2", "spectral2", "trellis2", "turboquant2", "prerope+spectral1.5",
)  # fmt: skip
PLAIN, HARD = ("embedded", 4096), ("embedded-hard", 4096)
RATES = (2.0, 3.0, 4.0)
#: Codecs whose kernel's cost is told.
COMPILED = ("trellis3", "spectral3", "lloyd3", "lloyd4", "kivi2", "kivi4")
#: Families whose fitted base is told.
FITTED = ("trellis", "spectral", "prerope+spectral")


def quality(results: Path) -> str:
    """The table of quality against measured bits."""
    found = panels(read(results / "quality" / "results.jsonl", Row))
    plain, hard = ({each.cache: each for each in summarise(found[panel])} for panel in (PLAIN, HARD))
    headings = [
        "cache", "", "bits/elem", "all held", "KL", "KL, outlier channels", "top-1", "perplexity", "multi-key recall"
    ]  # fmt: skip
    base = plain["uncompressed"]
    first = ["uncompressed", "", "32", "32", "0", "0", "100%", *_percent(base)]
    return markdown(headings, 7, [first, *(_line(plain[name], hard[name]) for name in SHOWN)])


def _line(own: Summary, hard: Summary) -> list[str]:
    preset = next((name for name, known in PRESETS.items() if known.source == own.cache), None)
    ours = own.side == OUR_SIDE
    name = f"**{own.cache}**" if ours else own.cache
    bits, held = (f"{own.values[field].mean:.2f}" for field in ("bits_per_element", "effective_bits_per_element"))
    losses = [_spread(each.values["kl_mean"]) for each in (own, hard)]
    top = f"{own.values['top1_agreement'].mean:.1%}"
    named = [f"`{preset}`"] * bool(preset) + ["default"] * (own.cache == DEFAULT_SPEC)
    return [name + f" ({', '.join(named)})" * bool(named), "ours" * ours, bits, held, *losses, top, *_percent(own)]


def _percent(own: Summary) -> list[str]:
    return [f"{own.values['perplexity'].mean:.2f}", f"{own.values['key_recall'].mean:.1%}"]


def _spread(value: Spread) -> str:
    return f"{value.mean:.2e}" + (f" ± {value.deviation:.0e}" if value.deviation is not None else "")


def rates(results: Path) -> str:
    """How the best of ours compares with the best peer at equal bits, and low rank with quantisation."""
    rows = panels(read(results / "quality" / "results.jsonl", Row))[PLAIN]
    over = []
    for bits in RATES:
        ours, peer = best_at(rows, OUR_SIDE, bits), best_at(rows, PEER_SIDE, bits)
        found = ratio(ours, peer) if ours is not None and peer is not None else None
        over.append("-" if found is None else f"{found.mean:.2f}")
    summaries = summarise(rows)
    loss = {each.cache: each.loss or 0.0 for each in summaries}
    bits_of = {each.cache: each.bits or 0.0 for each in summaries}
    mixed, best, after, plain = "prerope+lowrank48+trellis4", "prerope+spectral3", "lowrank48+trellis4", "trellis4"
    return (
        f"* At equal bits the best of ours has {', '.join(over[:-1])} and {over[-1]} of the best peer's KL at "
        f"{', '.join(f'{bits:g}' for bits in RATES[:-1])} and {RATES[-1]:g} bits, and outlier\n  channels make no "
        "difference to spectral and low-rank codecs, while every rotation breaks on them.\n"
        f"* **Low rank or quantisation?** Quantise. 32 of 64 directions in float16, {bits_of['lowrank32']:.1f} bits, "
        f"lose {loss['lowrank32']:.1e}\n  ({loss['prerope+lowrank32']:.1e} before RoPE); `fp8` loses {loss['fp8']:.1e} "
        f"at {bits_of['fp8']:.1f} bits and `spectral1.5` {loss['spectral1.5']:.1e} at {bits_of['spectral1.5']:.1f}.\n"
        f"  Low rank pays as a transform before codes, and on keys before RoPE: `{mixed}`\n  has {loss[mixed]:.1e} at "
        f"{bits_of[mixed]:.1f} bits, beside {loss[best]:.1e} at {bits_of[best]:.1f} of `{best}`. After RoPE: "
        f"`{after}`\n  {loss[after]:.1e} at {bits_of[after]:.1f} bits, `{plain}` {loss[plain]:.1e} at "
        f"{bits_of[plain]:.1f}.\n"
    )


def embedded(results: Path) -> str:
    """The embedded model's bits per byte and recall by length of context."""
    found = json.loads((results / "embedded.json").read_text())
    contexts = sorted({*found["bits_per_byte"], *found["recall"]}, key=int)
    lines = [
        [name, *(form.format(found[field][tokens]) if tokens in found[field] else "-" for tokens in contexts)]
        for name, field, form in (
            ("bits per byte", "bits_per_byte", "{:.3f}"), ("recall of stated facts", "recall", "{:.1%}")
        )
    ]  # fmt: skip
    return markdown(["tokens of context", *contexts], len(contexts), lines)


def scaling(results: Path) -> str:
    """The fitted laws of `python -m benchmarks scaling`: KL against bits, context and rank."""
    rows = read(results / "scaling" / "results.jsonl", ScalingRow)
    own = [row for row in rows if row.subject == PLAIN[0] and row.status == "ok"]
    found = {row.family: row for row in own if row.base}
    bases = ", ".join(f"{spread(found[name].base, 1)} for `{name}`" for name in FITTED)
    four = ", ".join(f"`{row.family}`" for row in found.values() if row.four_inside) or "no family"
    moved = [
        row.family for row in own if row.kind == "perplexity" and row.coefficients and row.coefficients["kl"][1] > 0
    ]
    perplexity = ", ".join(f"`{name}`" for name in moved) or "no family"
    doubling = spread(found[FITTED[-1]].per_doubling, 2)
    return (
        "Fitted, with 95% intervals (`python -m benchmarks scaling`, [all families]"
        f"(benchmarks/results/scaling/table.md)): a bit divides KL by\n{bases}.\n"
        f"Theory's 4 lies inside the interval of {four}. A doubling of the context, up to {PLAIN[1]:,} tokens, "
        f"multiplies KL\nby {doubling} (`{FITTED[-1]}`); each direction that `lowrank` keeps divides it by\n"
        f"{spread(found['lowrank'].base, 3)}. Perplexity can be told to rise with KL for {perplexity}.\n"
        "`kvcompress plan` quotes these lines, and says where they do not reach.\n"
    )


def memory(results: Path) -> str:
    """The largest context of every geometry that was filled with the default spec."""
    rows = read(results / "memory" / "results.jsonl", memory_rows.Row)
    own = [row for row in rows if (row.cache, row.status) == (DEFAULT_SPEC, "ok") and row.basis != memory_rows.SLOPE]
    lines = []
    for geometry in dict.fromkeys(row.geometry for row in own):
        most = max((row for row in own if row.geometry == geometry), key=lambda row: row.tokens)
        assert most.cache_bytes is not None
        assert most.uncompressed_bytes is not None
        sizes = [f"{size / 2**30:.2f} GiB" for size in (most.uncompressed_bytes, most.cache_bytes)]
        times = f"{most.uncompressed_bytes / most.cache_bytes:.2f}x"
        lines.append([geometry, str(most.basis), f"{most.tokens:,}", *sizes, times, f"{most.bits_per_element:.2f}"])
    return markdown(["geometry", "filled", "tokens", "bfloat16", "compressed", "smaller", "bits/elem"], 5, lines)


def million(results: Path) -> str:
    """What each cache made of the longest document, as far as they were measured."""
    path = results / "million" / "results.jsonl"
    rows = [row for row in (read(path, MillionRow) if path.exists() else []) if row.status == "ok"]
    if not rows:
        return "*No rows of `million` are committed yet.*\n"
    longest = max(row.tokens for row in rows)
    own = million_tables.ordered(row for row in rows if row.tokens == longest)
    headings = ["cache", "bits/elem", "MB", "bfloat16 / cache", "perplexity", "largest rise", "recall"]
    lines = [
        [row.name, *million_tables.size(row), f"{row.perplexity:.2f}", million_tables.rise(row),
         million_tables.recalled(row)]
        for row in own
    ]  # fmt: skip
    said = million_tables.emptied(own)
    table = markdown(headings, len(headings) - 1, lines)
    return f"{longest:,} tokens:\n\n{table}" + (f"\n{said}\n" if said else "")


def prefill(results: Path) -> str:
    """How far memory rose during a chunked prefill."""
    rows = read(results / "prefill_memory" / "results.jsonl", PrefillRow)
    row = next(row for row in rows if row.cache == DEFAULT_SPEC)
    return (
        "A chunked prefill stays below what the uncompressed cache alone would take: "
        f"{row.tokens:,} tokens whose cache would be\n{row.uncompressed_bytes / 1e6:,.0f} MB made the process grow by "
        f"at most {row.peak_bytes / 1e6:,.0f} MB, the codes included (`python -m benchmarks.prefill_memory`).\n"
    )


def kernels(results: Path) -> str:
    """What decoding costs as compiled for the chip that budgets are kept on."""
    rows = read(results / "static" / "results.jsonl", static.Row)
    decode = [row for row in rows if (row.kernel, row.arch, row.head_dim) == ("decode", "sm_90", 128)]
    cost = {row.codec: row.lane_instructions_per_element or 0.0 for row in decode}
    told = ", ".join(f"{cost[name]:.1f} for `{name}`" for name in COMPILED)
    spills = sum(row.spills or 0 for row in decode)
    return (
        f"  Compiled for sm_90, decoding takes this many lane-instructions a cached element:\n  {told};\n"
        f"  {spills or 'no'} spills (`python -m benchmarks static`).\n"
    )


def steps(results: Path) -> str:
    """What a decode step takes in PyTorch."""
    path = results / "quick" / "results.jsonl"
    rows = {row.cache: row for row in read(path, QuickRow)}
    line = readable(path.read_text("utf-8").splitlines())[-1]
    tokens, threads = line["settings"]["step_context"], line["threads"]
    first, second = (f"{rows[name].step_ratio or 0.0:.0f} times" for name in (DEFAULT_SPEC, "trellis3"))
    return (
        f"* In PyTorch, block by block, memory is bounded, but a decode step at {tokens} tokens takes "
        f"{first} as long as an\n  uncompressed one with `{DEFAULT_SPEC}`, {second} with `trellis3` "
        f"(`python -m benchmarks quick`, threads: {threads}).\n"
    )


def errors(results: Path) -> str:
    """The codes' errors on unit Gaussians."""
    rows = sorted(read(results / "code_error" / "results.jsonl", code_error.ErrorRow), key=lambda row: row.bits)
    return "".join(f"  {line}\n" for line in code_error.table(rows).splitlines())


def vllm(results: Path) -> str:
    """What vLLM holds and says with the plugin."""
    return vllm_check.table(read(results / "vllm" / "results.jsonl", vllm_check.ServerRow))


#: What every block is made by.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "quality": quality,
    "rates": rates,
    "scaling": scaling,
    "embedded": embedded,
    "memory": memory,
    "million": million,
    "prefill": prefill,
    "kernels": kernels,
    "steps": steps,
    "errors": errors,
    "vllm": vllm,
}


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A README's text with all blocks made anew; raises ValueError for a block that nothing makes."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"there is a block {match[2]!r}; known: {', '.join(BLOCKS)}")
        return match[1] + BLOCKS[match[2]](results) + match[3]

    return BLOCK.sub(made, text)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(rewritten(path.read_text("utf-8")), "utf-8")
