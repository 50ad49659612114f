"""Where the rows come from: files, machines, commits, versions, and the commands that make such rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurements import state
from benchmarks.report.parts import Part, Section, Table
from benchmarks.report.sources import Source
from benchmarks.tables import markdown

ABOUT = """Every row says which code, versions and machine it comes from. A time holds for the machine that it names;
bytes, bits and losses should come out alike elsewhere."""

#: Options that can be switched on and not off.
SWITCHES = {"load_in_4bit"}
#: What rows depend on that is no option, by benchmark.
NO_OPTIONS = {"memory": {"spectra"}, "soak": {"lines", "limit", "settling"}}
#: What makes rows that do not say their settings.
BARE = {
    "gpu": "python -m benchmarks gpu",
    "static": "python -m benchmarks static",
    "vllm": "python -m benchmarks.vllm_check",
    "code_error": "python -m benchmarks.code_error",
    "embedded": "python -m benchmarks.embedded.report BOOK --output FILE",
}


def section(sources: Sequence[Source], remarks: Sequence[str]) -> Section:
    """The last section of the page; remarks: on files that were left out."""
    headings = ["file", "benchmark", "rows", "without a result", "device", "cores", "threads", "commit"]
    files = markdown(headings, 0, [cells for source in sources for cells in _files(source)])
    commands = dict.fromkeys(
        command for source in sources for line in source.lines for command in command_of(source, line)
    )
    tables = (
        Table("Files of results; +: the code had changes that were not committed", files),
        Table("Versions and platforms", _versions(sources)),
        Table(
            "Commands that make such rows, as their settings say",
            markdown(["command"], 0, [[f"`{c}`"] for c in commands]),
        ),
    )
    return Section("Environment", ABOUT, (Part("", (), (), tables, tuple(remarks)),))


def _files(source: Source) -> list[list[str]]:
    """A line for every machine and commit of a file."""
    groups: dict[tuple[str, ...], list[bool]] = {}
    for line in source.lines:
        commit = str(line.get("commit") or "-")
        short = commit[:10] + ("+" if commit.endswith("-dirty") else "")
        kind = (*(str(line.get(name, "-")) for name in ("device", "cores", "threads")), short)
        groups.setdefault(kind, []).append(state(line)[0] == "ok")
    name = f"{source.path.parent.name}/{source.path.name}"
    return [
        [name, source.benchmark, f"{len(done):,}", f"{done.count(False):,}", *kind] for kind, done in groups.items()
    ]


def _versions(sources: Sequence[Source]) -> str:
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for source in sources:
        for line in source.lines:
            versions = {name: str(value) for name, value in (line.get("versions") or {}).items() if value is not None}
            if versions:
                key = (*versions.items(), ("platform", str(line.get("platform"))))
                own = found.setdefault(key, [])
                own += [source.benchmark] if source.benchmark not in own else []
    names = list(dict.fromkeys(name for key in found for name, _ in key))
    lines = [[", ".join(own), *(dict(key).get(name, "-") for name in names)] for key, own in found.items()]
    return markdown(["benchmark", *names], 0, lines)


def command_of(source: Source, line: Mapping[str, Any]) -> list[str]:
    """The command whose options say what the line's settings say; none where nothing tells."""
    if source.benchmark in BARE:
        return [BARE[source.benchmark]]
    if source.benchmark == "prefill_memory":
        words = ["python", "-m", "benchmarks.prefill_memory", "--spec", line["cache"], "--tokens", str(line["tokens"])]
        return [shlex.join([*words, "--chunk", str(line["chunk"])])]
    options = line.get("options") or line.get("settings") or {}
    words = ["python", "-m", "benchmarks", source.benchmark]
    for name, value in options.items():
        if name not in NO_OPTIONS.get(source.benchmark, ()):
            words += _option(name, value)
    return [shlex.join(words)]


def _option(name: str, value: Any) -> list[str]:
    """The words of an option; none where its value is what it is without."""
    flag = name.replace("_", "-")
    if value is None or (value is False and name in SWITCHES):
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", " ".join(map(str, value))]
    return [f"--{flag}", Path(value).name if name in ("text", "model") else str(value)]
