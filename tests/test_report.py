"""`python -m benchmarks report`: a page of any results, which loads nothing and says what is missing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import guard
from benchmarks.__main__ import app
from benchmarks.report import environment, job, page, sources, styles, suite, svg
from benchmarks.report.job import RESULTS, Settings
from tests import report_rows

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
CHAPTERS = suite.chapters(80 * 10**9)


def written(tmp_path: Path, *paths: Path) -> tuple[str, str]:
    """The page and its summary, as text."""
    html, text = job.run(Settings(paths), tmp_path / "report", Console(quiet=True))
    return html.read_text("utf-8"), text.read_text("utf-8")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A page of all made-up rows."""
    folder = tmp_path_factory.mktemp("report")
    return folder / "report" / "report.html", *written(folder, report_rows.everything(folder / "results"))


def test_every_benchmark_has_its_section(everything: tuple[Path, str, str]) -> None:
    _, html, text = everything
    made = {chapter.benchmark for chapter in CHAPTERS} - {"prefill_memory", "code_error", "embedded"}
    titles = {chapter.title.lower().replace(" ", "-") for chapter in CHAPTERS if chapter.benchmark in made}
    assert set(re.findall(r'<section id="([\w-]+)"', html)) == {"environment", *titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= titles  # as hosts of Markdown name headings
    for chapter in CHAPTERS:
        assert (f"\n## {chapter.title}\n" in text) == (chapter.benchmark in made)
    assert "Not among these results:** how far a prefill rises (`prefill_memory`)" in text


def test_says_what_rows_say(everything: tuple[Path, str, str]) -> None:
    _, _, text = everything
    # spectral runs from (2.4 bits, 0.008) to (3.4, 0.002): at 3 bits 0.008^0.4 x 0.002^0.6 = 0.00348, and 5% more, the
    # mean of seeds of 1 and 1.1; KIVI has 0.03 at 3 bits in its only seed that was measured at 4096 tokens
    assert "training never saw) at 4096 tokens and 3 bits the best of ours is spectral with 3.66e-03 nats" in text
    # trellis3's increase grows from 0.4% to 0.8%, spectral2's to 1.6%: the smallest that stays within 1% is trellis3
    assert "the smallest cache within 1% at every position, as 2 larger ones do: trellis3 takes 214.7 MB, 5.00" in text
    assert "at worst 0.80% above the uncompressed cache's (positions up to 1,048,576)" in text
    assert "Emptied after every 16,384 tokens" in text
    assert "in the last bucket (up to 1,048,576) is +2.00% ± 0.10 from that of the whole context" in text
    assert "| cache | 0 to 33% | 33 to 67% | 67 to 100% |" in text
    assert "| trellis3 | 80% | 90% | 100% |" in text
    assert "2 variants of kernels were compiled, 1 of them break a budget. Decoding takes 2.20 (lloyd3, sm_90)" in text
    assert "1 row of 16,384 tokens: the uncompressed cache decodes 100.0 tokens a second" in text  # 10 ms a step
    assert (
        "On Some GPU, one sequence of 131,072 tokens, decoding's speed over the fastest attention on bf16: trellis3"
        in text
    )
    assert (
        "answers 100% of 15 questions right; ours: spectral2 (2.40 bits) 89%" in text
    )  # 1 - 0.16 x (1.2 + 0.7 + 0.2) / 3


def test_says_what_servers_rows_say(everything: tuple[Path, str, str]) -> None:
    _, _, text = everything
    # 4 s anew, 0.5 s from memory, 0.8 s from disk; 2000 of 8000 bytes
    assert (
        "Of a prompt whose first 4,096 tokens were read before, prerope+spectral3 knows the first token 8.0 times "
        "sooner with the store's memory than without it, and 5.0 times sooner from disk; the stored "
        "prompt takes 25% of its uncompressed cache's bytes on disk"
    ) in text
    assert (
        "With 16,384 tokens of prerope+spectral3 and room for 0% of the pages, 1.00 MiB of 2.00 MiB lie outside the "
        "device, and a decode step takes 1.50 times as long"
    ) in text
    assert "bit for bit, in 8 of 8" in text  # two caches, contexts and budgets that offload
    assert "On 4 ranks prerope+spectral3 of 4,100 tokens leaves the fullest one 25% of the pages' bytes" in text
    assert "10,000,000 tokens of Llama-3.1-8B with prerope+spectral3 fit on 8 GPUs of" in text
    assert (
        "In 10.0 minutes with trellis3 0 of 40 requests were lost, the server's counts and the clients' agree" in text
    )
    assert "grew by +1.0 KiB (-2.0 to +4.0) a minute, an interval which holds 0" in text
    assert "trellis3 10.0 times as many (95.0%)" in text


def test_says_what_was_fitted(everything: tuple[Path, str, str]) -> None:
    _, _, text = everything
    assert "KL falls with every bit by spectral 4.10 (3.90 to 4.30), trellis 3.20 (3.00 to 3.40)" in text
    assert "one bit more divides KL by 3.20 to 4.10, depending on the codec; theory's 4 lies inside 1 of 2" in text
    assert "exact: not fitted: too few." in text


def test_device_limit(tmp_path: Path) -> None:
    file = report_rows.memory(tmp_path)
    html, text = job.run(Settings((file,), gpu=24 * 10**9), tmp_path, Console(quiet=True))
    # 24 GB less 8.03e9 parameters of 2 bytes and 2 GiB leave 5.39 GiB; the uncompressed cache takes 1 MB and 128 KiB a
    # token (2 sides x 2 bytes x 8 heads x 128 x 32 layers), so 44,181 tokens fit
    assert "limit: 5.4 GiB" in html.read_text("utf-8")
    assert "Llama-3.1-8B in 16-bit weights has room for 44,181" in text.read_text("utf-8")


def test_failures_are_told_and_markup_is_not_let_through(everything: tuple[Path, str, str]) -> None:
    _, html, text = everything
    assert text.count(report_rows.FAILED) >= 7  # quality, million, memory, latency, prefix, offload, parallel
    assert "<b>broken" not in html
    assert html.count("&lt;b&gt;broken&lt;/b&gt; &amp; gone") >= 7


def test_markdown_has_the_tables_of_the_page(everything: tuple[Path, str, str]) -> None:
    _, html, text = everything
    numbers = [int(each) for each in re.findall(r"<b>Table (\d+)\.</b>", html)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [int(each) for each in re.findall(r"\*\*Table (\d+)\.\*\*", text)] == numbers
    assert html.count("<table>") == len(numbers) == html.count('<div class="scroll"')


def test_nothing_is_loaded(everything: tuple[Path, str, str]) -> None:
    _, html, _ = everything
    assert "http" not in html  # addresses of any kind, in pictures too
    assert "<script" not in html
    addresses = re.findall(r'(?:href|src|srcset|data|action)="([^"]*)"', html)
    assert {each for each in addresses if not each.startswith("#")} == {"data:,"}  # the icon, so that none is asked for
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", html))


def test_every_name_in_pictures_is_of_one_thing(everything: tuple[Path, str, str]) -> None:
    """Pictures share names only for marks that are the same, such as a cache's in two legends."""
    _, html, _ = everything
    marks = re.findall(r'<path id="(m\w+)"([^>]*)>|<clipPath id="(p\w+)">\s*<rect([^>]*)>', html)
    assert len(marks) > 20
    meanings: dict[str, set[str]] = {}
    for mark, shape, clip, box in marks:
        meanings.setdefault(mark or clip, set()).add(shape or box)
    assert all(len(each) == 1 for each in meanings.values())
    sections = set(re.findall(r'<section id="([^"]*)"', html))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) <= {*meanings, *sections}


def test_committed_results(tmp_path: Path) -> None:
    html, text = written(tmp_path, RESULTS)
    assert "http" not in html
    best = (RESULTS / "quality" / "reading.md").read_text().split("On embedded at 4096 tokens and 3 bits ")[1]
    assert best.split(", 0.")[0] in text  # the same family and loss as the benchmark's own reading
    assert f"{guard.FOLDER.name}: left out" in text or not (guard.FOLDER / "results.jsonl").exists()


def test_commands_are_taken_by_the_suite(tmp_path: Path) -> None:
    known = get_command(app)
    found, _ = sources.gather([RESULTS, report_rows.everything(tmp_path)])
    seen = 0
    for command in {each for own in found for line in own.lines for each in environment.command_of(own, line)}:
        words = shlex.split(command)
        if words[2] == "benchmarks":
            sub = known.commands[words[3]]  # type: ignore[attr-defined]  # a group
            sub.make_context(words[3], words[4:])  # raises for an option that is not there
            seen += 1
    assert seen >= 7


def test_same_look_everywhere() -> None:
    looks = [styles.cache_styles(names) for names in (["spectral2", "spectral3"], ["trellis3", "spectral3"])]
    assert looks[0]["spectral3"] == looks[1]["spectral3"]
    assert looks[0]["spectral3"]["color"] == looks[0]["spectral2"]["color"] == styles.colour("spectral")
    assert looks[0]["spectral3"]["marker"] != looks[0]["spectral2"]["marker"]
    peer = styles.cache_styles(["turboquant3"])["turboquant3"]
    assert peer["markerfacecolor"] == svg.PAPER
    assert peer["ls"] != looks[0]["spectral3"]["ls"]


def test_colours_can_be_told_from_both_pages() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    # what WCAG 2.1 asks of graphics
    for name, colour in styles.COLOURS.items():
        for paper in ("#ffffff", "#14181d"):  # the template's
            high, low = sorted((luminance(colour), luminance(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, name


@pytest.mark.parametrize(("given", "shown"), [("2.18e-03", "2.18×10⁻³"), ("4e+00", "4"), ("1.5e+12 x", "1.5×10¹² x")])
def test_powers(given: str, shown: str) -> None:
    assert page.powers(given) == shown


def test_powers_leave_names_alone() -> None:
    assert page.powers("commit 3e12ab, 1e5f") == "commit 3e12ab, 1e5f"


def test_what_has_no_section_is_told(tmp_path: Path) -> None:
    file = report_rows.quick(tmp_path)
    with file.open("a") as more:
        more.write(json.dumps({"benchmark": "new", "status": "ok"}) + "\n" + json.dumps({"x": 1}) + "\n")
    _, text = written(tmp_path, file)
    assert "the page has no section for it:** rows of new." in text
    assert "1 lines are of no benchmark that is known here" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("", "no results of any benchmark"),
        ('{"benchmark": "quality"}', "no rows of quality"),
    ],
)
def test_wrong_input(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    if content is not None:
        file.write_text(content + "\n")
    result = CliRunner().invoke(app, ["report", str(file), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.stderr


def opened(file: Path, profile: Path) -> tuple[str, list[str], list[str]]:
    """What a browser makes of a page: its elements, what its console said, and the addresses that the page asked for.

    What the browser asks for by itself has no page as its initiator.
    """
    assert BROWSER is not None
    log = profile / "net.json"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--log-net-log={log}",
        f"--user-data-dir={profile}", "--disable-background-networking", "--no-first-run", "--window-size=1280,2000",
        "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [event.get("params") or {} for event in json.loads(log.read_text("utf-8"))["events"]]
    asked = [event["url"] for event in events if "url" in event and event.get("initiator", OWN) != OWN]
    return done.stdout, said, asked


#: How a browser's log calls what no page began.
OWN = "not an origin"


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_opens_in_a_browser(everything: tuple[Path, str, str], tmp_path: Path) -> None:
    file, html, _ = everything
    shown, said, asked = opened(file, tmp_path / "good")
    assert shown.count("<svg") == html.count("<svg")
    assert (said, asked) == ([], [])
    broken = tmp_path / "broken.html"  # what the test would see of a page that loads something and complains
    broken.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("oops")</script>')
    _, said, asked = opened(broken, tmp_path / "bad")
    assert any("oops" in line for line in said)
    assert "http://127.0.0.1:9/x.png" in asked
