"""The kernels on a GPU, from `python -m benchmarks gpu`: right or not, how fast, against attention on bf16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import gpu as job
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from benchmarks.tables import markdown

ABOUT = """The kernels that attend on codes and encode them, on a GPU: checked against the reference in PyTorch, then
timed against the fastest attention on uncompressed bf16 keys and values of the same shape. A speed-up of 2 is half
the time."""

#: What the tables show, by section: caption, fields with their headings.
TABLES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "decode": (
        "Decode: one token's attention over cached ones",
        (
            ("device_us", "device, µs"),
            ("kernel_us", "kernel, µs"),
            ("ratio", "speed-up over best bf16"),
            ("share_of_copy", "of a copy's bandwidth"),
        ),
    ),
    "prefill": (
        "Prefill: a chunk's attention over cached tokens",
        (("device_us", "device, µs"), ("tflops", "TFLOP/s"), ("speed_of_flash", "speed over flash on bf16")),
    ),
    "encode": (
        "Encoding, one layer",
        (
            ("device_us", "device, µs"),
            ("tokens_per_second", "tokens a second, whole model"),
            ("share_of_prefill", "share of a prefill"),
        ),
    ),
    "model": (
        "Decode steps of a whole model with random weights",
        (("step_us", "step, µs"), ("tokens_per_second", "tokens a second"), ("cache_bytes", "cache bytes")),
    ),
    "device": ("The device's own limits", (("bytes_per_second", "copied bytes a second"), ("tflops", "TFLOP/s"))),
}

Row = Mapping[str, Any]


def part(source: Source) -> Part:
    rows = list(source.lines)
    device = ", ".join(sorted({str(row.get("device")) for row in rows}))
    tables = [
        Table(f"{caption}, on {device}", _table(own, fields), folded=section in ("encode", "device"))
        for section, (caption, fields) in TABLES.items()
        if (
            own := [
                row
                for row in rows
                if row["section"] == section and any(row.get(name) is not None for name, _ in fields)
            ]
        )
    ]
    return Part(
        headline=_headline(rows, device),
        found=(_checks(rows),),
        figures=_figures(rows, device),
        tables=tuple(tables),
        remarks=_refused(rows),
        subject=device,
    )


def _headline(rows: Sequence[Row], device: str) -> str:
    """The largest speed-up of decoding at the longest context of a single sequence."""
    own = [row for row in rows if row["section"] == "decode" and row.get("rows") == 1 and row.get("ratio") is not None]
    if not own:
        return f"On {device} no decoding on codes was timed against bf16."
    longest = max(row["tokens"] for row in own)
    told = ", ".join(f"{row['name']} {row['ratio']:.2f}" for row in own if row["tokens"] == longest)
    return (
        f"On {device}, one sequence of {longest:,} tokens, decoding's speed over the fastest attention on bf16: {told}."
    )


def _checks(rows: Sequence[Row]) -> str:
    own = [row["status"] for row in rows if row["section"] == "check"]
    if not own:
        return "No checks of the kernels are among these rows."
    count = {status: own.count(status) for status in dict.fromkeys(own)}
    return (
        "Checks of the kernels against the reference: "
        + ", ".join(f"{n} {status}" for status, n in count.items())
        + "."
    )


def _figures(rows: Sequence[Row], device: str) -> tuple[Figure, ...]:
    own = [
        row for row in rows if row["section"] == "decode" and row["status"] == "ok" and row.get("device_us") is not None
    ]
    if not own:
        return ()
    # bf16 methods are no caches: they are drawn in ink, as the uncompressed cache is elsewhere
    base = [
        name for name in dict.fromkeys(row["name"] for row in own) if styles.place(name) == (styles.PEER_SIDE, name)
    ]
    styled = styles.cache_styles(row["name"] for row in own if row["name"] not in base)
    lines = ("-", "--", "-.", ":")
    styled |= {name: {"color": svg.INK, "lw": 1.2, "ls": lines[i % 4], "marker": ""} for i, name in enumerate(base)}
    panels = []
    for count in sorted({row["rows"] for row in own}):
        some = [row for row in own if row["rows"] == count]
        title = f"{count} sequence{'s' if count > 1 else ''}"
        panels.append(Panel(title, svg.panel(partial(_draw, some, styled), f"Time of decoding's attention, {title}")))
    legend = tuple((f"{name}, bf16" if name in base else name, svg.swatch(style)) for name, style in styled.items())
    caption = f"Time of one decode step's attention in one layer against cached tokens, on {device}: lower is better."
    return (Figure(caption, tuple(panels), legend),)


def _draw(rows: Sequence[Row], looks: dict[str, dict[str, Any]], axes: Any) -> None:
    for name, style in looks.items():
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["tokens"])
        axes.plot([row["tokens"] for row in own], [row["device_us"] for row in own], **style)
    axes.set(xlabel="cached tokens", ylabel="device time, µs")
    svg.token_axis(axes, [row["tokens"] for row in rows])
    svg.number_axis(axes)


def _table(rows: Sequence[Row], fields: Sequence[tuple[str, str]]) -> str:
    shown = [(name, heading) for name, heading in fields if any(row.get(name) is not None for row in rows)]
    lines = [
        [
            str(row["name"]),
            _number(row.get("rows")),
            _number(row.get("tokens")),
            *(_number(row.get(name)) for name, _ in shown),
        ]
        for row in rows
    ]
    return markdown(["name", "sequences", "tokens", *(heading for _, heading in shown)], 2 + len(shown), lines)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _refused(rows: Sequence[Row]) -> tuple[str, ...]:
    """What was not measured, by its reason; whether targets were met comes first."""
    verdicts = [text for text in job.verdicts(list(map(dict, rows))) if not text.startswith("rows:")]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(f"{row['status']}: {row.get('reason')}", []).append(f"{row['section']} {row['name']}")
    return (*verdicts, *(f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in reasons.items()))
