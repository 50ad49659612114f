"""`python -m benchmarks retrieval`: its documents, table and heat maps, and a whole small run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from benchmarks import caches, haystack, needles, retrieval, retrieval_plot, retrieval_tables, texts
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.haystack import Shape
from benchmarks.needles import Asked, Document
from benchmarks.retrieval import Settings
from benchmarks.retrieval_rows import Row, empty_row
from benchmarks.texts import Text
from kvcompress import models

PROSE = " ".join(f"The {word} went over hill number {index} and came back." for index, word in enumerate("abcdef" * 80))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.embedded()[1]


@pytest.fixture(scope="module")
def text(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(PROSE)
    return texts.load(tokenizer, path, seed=0)


def answers(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[str]:
    ids = document.ids[0].tolist()
    return [tokenizer.decode(ids[answer.start : answer.stop]).strip() for answer in document.answers]


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_needle_stands_at_its_depth(tokenizer: PreTrainedTokenizerFast, text: Text, depth: float) -> None:
    document = haystack.document("needle", tokenizer, text, Shape(600, depth), 100, seed=1)
    assert document.ids.shape == (1, 600)
    said = tokenizer.decode(document.ids[0])
    (answer,) = answers(tokenizer, document)
    note = re.search(r"\nNote: the password of (\w+) is ([\w ]+)\.\n", said)
    assert note is not None
    assert note.group(2) == answer
    assert said.endswith(f"Recall: the password of {note.group(1)} is {answer}.\n")
    before = len(texts.encode(tokenizer, said[: note.start()].removeprefix(tokenizer.bos_token)))
    after = len(texts.encode(tokenizer, said[note.end() : said.index("\nRecall:")]))
    # Two tokens on each side: encoding a text again may join what was cut there.
    assert before == pytest.approx(depth * (before + after - 100), abs=2)
    assert after >= 100 - 2


def test_many_keys_are_all_asked_for_in_an_order_of_their_own(tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    document = haystack.document("multi-key", tokenizer, text, Shape(1024, keys=5), 100, seed=0)
    stated = re.findall(r"Note: the password of \w+ is ([\w ]+)\.", tokenizer.decode(document.ids[0]))
    assert len(stated) == 5
    assert answers(tokenizer, document) != stated
    assert sorted(answers(tokenizer, document)) == sorted(stated)
    few = haystack.document("multi-key", tokenizer, text, Shape(256), 60, seed=0)
    assert len(few.answers) == 2  # a fact for 128 tokens


def test_many_values_of_one_key_are_asked_for_in_their_order(tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    document = haystack.document("multi-value", tokenizer, text, Shape(800, values=6), 100, seed=0)
    said = tokenizer.decode(document.ids[0])
    stated = re.findall(r"Note: the password of (\w+) is ([\w ]+)\.", said)
    assert len({name for name, _ in stated}) == 1
    assert len({value for _, value in stated}) == 6
    assert answers(tokenizer, document) == [value for _, value in stated]
    assert said.endswith(f"are {', '.join(value for _, value in stated)}.\n")


def test_variables_are_those_that_the_assignments_lead_to(tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    document = haystack.document("variables", tokenizer, text, Shape(1024, hops=3), 100, seed=2)
    said = tokenizer.decode(document.ids[0])
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", said):
        values[name] = values.get(value, value)  # a variable is assigned before it is used
    asked = re.findall(r"assigned the value (\d+) in the text above\. Answer", said)
    assert len(asked) == 2  # the example's and the document's own
    assert len(values) == 2 + 4 + 4  # the example, the chain, and the one that distracts
    assert set(values.values()) >= set(asked)
    for number, said_names in zip(asked, re.findall(r"they are: ([A-Z ]+)\.", said), strict=True):
        assert said_names.split() == [name for name, value in values.items() if value == number]
    assert answers(tokenizer, document) == [name for name, value in values.items() if value == asked[1]]


def test_documents_differ_by_seed_and_task_and_are_drawn_again_alike(
    tokenizer: PreTrainedTokenizerFast, text: Text
) -> None:
    one, same, other = (haystack.document("needle", tokenizer, text, Shape(300), 50, seed) for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.ids, other.ids)


def test_a_document_without_room_is_refused(tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    with pytest.raises(ValueError, match="10 questions and a gap of 200 tokens leave no room for text in 300 tokens"):
        haystack.document("multi-value", tokenizer, text, Shape(300, values=10), 200, seed=0)


def test_what_closes_an_answer_is_not_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    filler = texts.encode(tokenizer, PROSE)[:200].unsqueeze(0)
    asked = [Asked("\nNames:", " Rose", ""), Asked(",", " Ruth", "!\n")]
    document = needles.assemble(tokenizer, filler, [(1.0, "\nRose, Ruth.\n")], asked, 20)
    assert answers(tokenizer, document) == ["Rose", "Ruth"]
    assert tokenizer.decode(document.ids[0]).endswith("\nNames: Rose, Ruth!\n")


def measured(cache: Contender, task: str, tokens: int, recall: float, bits: float | None, depth: float | None) -> Row:
    row = empty_row(task, tokens, depth, 0, cache)
    return replace(row, recall=recall, questions=4, bits_per_element=bits)


LLOYD = compressed("lloyd3")
FIELD = [
    *(measured(UNCOMPRESSED, "needle", 512, recall, None, depth) for depth, recall in ((0.0, 1.0), (1.0, 0.5))),
    *(measured(LLOYD, "needle", 512, recall, None, depth) for depth, recall in ((0.0, 0.75), (1.0, 0.0))),
    *(measured(UNCOMPRESSED, "needle", 1024, 1.0, None, depth) for depth in (0.0, 1.0)),
    *(measured(LLOYD, "needle", 1024, 1.0, 3.25, depth) for depth in (0.0, 1.0)),
    measured(UNCOMPRESSED, "variables", 1024, 0.25, None, None),
    measured(LLOYD, "variables", 1024, 0.5, 3.25, None),
    replace(empty_row("variables", 1024, None, 0, compressed("kivi2")), status="failed", reason="it broke"),
]


def test_the_table_says_where_the_model_itself_fails() -> None:
    said = retrieval_tables.document(FIELD, "a model", ["a remark"])
    assert "| cache | bits/elem | 512 tokens, 8 questions | 1024 tokens, 8 questions |" in said
    assert "| uncompressed | - | 75% | 100% |" in said
    assert "| lloyd3 | 3.25 | 38% † | 100% |" in said  # (0.75 + 0) / 2; nothing was coded at 512
    assert "†: nothing was coded" in said
    assert "| uncompressed | - | (25%) |" in said
    assert "| lloyd3 | 3.25 | (50%) |" in said
    assert "| kivi2 | - | - |" in said
    assert "In parentheses, at 1024 tokens: the uncompressed model itself finds less than 50%" in said
    assert said.count("In parentheses") == 1  # not of the needle
    assert "kivi2: failed (variables 1024): it broke" in said
    assert said.endswith("a remark\n")


def test_heat_maps_have_a_panel_a_cache_and_a_cell_a_depth_and_length(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    assert retrieval_plot.plot(tmp_path / "heat.png", FIELD, "a model")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert not retrieval_plot.plot(tmp_path / "none.png", [row for row in FIELD if row.task == "variables"], "a model")
    assert not (tmp_path / "none.png").exists()
    own = [row for row in FIELD if row.task == "needle" and row.cache == "lloyd3"][:3]
    axes = Figure().subplots()
    image = retrieval_plot.draw(axes, own, [512, 1024], [0.0, 1.0])
    assert image.get_array().filled(-1).tolist() == [[0.75, 1.0], [0.0, -1.0]]  # -1: not measured
    assert axes.get_title() == "lloyd3\n3.25 bits/elem"


def test_another_librarys_cache_is_counted_by_an_uncompressed_one_also_when_that_was_measured_before(
    tokenizer: PreTrainedTokenizerFast, text: Text
) -> None:
    """As in a run that goes on where it was killed."""
    other = Contender("other", "transformers", UNCOMPRESSED.make)
    document = haystack.document("needle", tokenizer, text, Shape(200), 50, seed=0)
    reader = retrieval.Reader(models.embedded()[0], lambda tokens: None)
    case = retrieval.Case(document, "needle", 200, 0.5, 0, 100)
    row = reader.row(case, other, empty_row("needle", 200, 0.5, 0, other))
    assert row.bytes == row.uncompressed_bytes == 200 * 5 * 2 * 2 * 64 * 4  # layers, K and V, heads, head size, float32


def test_the_grid_has_its_ends() -> None:
    assert Settings(depths=5).grid == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert Settings(depths=1).grid == (0.5,)


def test_a_whole_small_run_is_written_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise RuntimeError("out of memory\nand more")

    absent = Contender("absent", "transformers", UNCOMPRESSED.make, missing="it is not installed")
    monkeypatch.setattr(retrieval, "quantized_caches", lambda: [absent, Contender("broken", "transformers", broken)])
    (tmp_path / "text.txt").write_text(PROSE)
    out = tmp_path / "out"
    command = ["retrieval", "--text", str(tmp_path / "text.txt"), "--lengths", "512", "--depths", "2", "--seeds", "1"]
    command += ["--output", str(out), "--specs", "exact lloyd1"]
    done = CliRunner().invoke(app, [*command, "--tasks", "needle"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*command, "--tasks", "needle multi-key"])
    assert done.exit_code == 0, done.output
    lines = (out / "results.jsonl").read_text().splitlines()
    rows = {(row["task"], row["depth"], row["cache"]): row for row in map(json.loads, lines)}
    assert len(lines) == len(rows) == 15  # three documents, five caches, each once
    for (task, _, cache), row in rows.items():
        assert {"benchmark", "versions", "platform", "commit", "threads", "options", "seed", "spec"} <= row.keys()
        assert (row["benchmark"], row["tokens"], row["settings"]["text"]) == ("retrieval", 512, "text.txt")
        status = {"absent": "not installed", "broken": "failed"}.get(cache, "ok")
        assert row["status"] == status, row["reason"]
        if status == "ok":
            assert row["questions"] == (4 if task == "multi-key" else 1)
    assert rows["needle", 0.0, "broken"]["reason"] == "RuntimeError: out of memory"
    for task, depth in (("needle", 0.0), ("needle", 1.0), ("multi-key", None)):
        plain, exact, one_bit = (rows[task, depth, name] for name in ("uncompressed", "exact", "lloyd1"))
        assert plain["recall"] == exact["recall"] >= 0.5  # 99% of such questions are answered (embedded.json)
        assert plain["bits_per_element"] is None
        assert plain["bytes"] == plain["uncompressed_bytes"] == one_bit["uncompressed_bytes"]
        assert exact["bits_per_element"] == pytest.approx(32, rel=0.05)  # exact codes hold whole pages
        assert 1 < one_bit["bits_per_element"] < 2  # a 16-bit gain for 64 elements, means
        assert one_bit["spec"] == caches.compressed("lloyd1").content
    assert "## multi-key" in (out / "table.md").read_text()
    assert (out / "heatmaps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "nedle"], "known: needle, multi-key, multi-value, variables"),
        (["--specs", "trelis3"], "trellis"),
        (["--lengths", "10"], "lengths must be at least 64"),
        (["--hops", "0"], "hops must be at least 1"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--load-in-4bit"], "--load-in-4bit is for a --model"),
    ],
)
def test_bad_options_are_told_without_a_traceback(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["retrieval", "--output", str(tmp_path), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
