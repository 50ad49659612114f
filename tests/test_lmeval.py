"""`python -m benchmarks lmeval`: lm-eval's HFLM reading through a cache, and a whole small run without a hub."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from benchmarks import lmeval, lmeval_tables
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.lmeval_rows import Row
from kvcompress import models

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: eval)")

FACT = "\nNote: the password of Rose is golden harbor.\n"
PROSE = " ".join(f"The {word} went over hill number {index} and came back." for index, word in enumerate("abcdef" * 4))
QUESTION = "\nRecall: the password of Rose is"

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["silver ring", "golden harbor"]
doc_to_target: 1
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "golden harbor"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true}]
filter_list: [{name: plain, filter: [{function: remove_whitespace}, {function: take_first}]}]
""",
}


@pytest.fixture(scope="module")
def subject() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return models.embedded()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks of two questions, about a fact that lies some 280 tokens back."""
    questions = [PROSE[:start] + FACT + PROSE + QUESTION for start in (100, 300)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in questions))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{task}")
    return tmp_path


@needs_lm_eval
def test_likelihoods_are_read_through_the_cache(subject: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    from benchmarks.lm_eval_model import CachedLM

    model, tokenizer = subject
    ids = torch.tensor([tokenizer(PROSE + FACT + PROSE).input_ids[:400]])
    with torch.inference_mode():
        whole = model(ids).logits
    plain, exact, coarse = (
        CachedLM(model, tokenizer, contender, chunk=64)
        for contender in (UNCOMPRESSED, compressed("exact"), compressed("lloyd1"))
    )
    for lm in (plain, exact):
        torch.testing.assert_close(lm._model_call(ids), whole, atol=1e-3, rtol=0)  # float32 sums in another order
    moved = (coarse._model_call(ids) - whole).abs().amax(dim=-1)[0]
    assert moved[:128].max() < 1e-3  # nothing is coded before a window and a page are full
    assert moved[-64:].min() > 0.05  # one bit an element shows
    assert (plain.bits_per_element, plain.coded, plain.longest) == (None, None, 400)
    assert coarse.bits_per_element is not None
    assert 1 < coarse.bits_per_element < 2.5  # a 16-bit gain for 64 elements; means and tables of few tokens
    assert coarse.coded == pytest.approx(256 / 400, abs=64 / 400)  # all but the sinks, the window and an open page
    assert model.config._attn_implementation != "kvcompress"  # as it was


@needs_lm_eval
def test_company_in_a_batch_changes_nothing(subject: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    from benchmarks.lm_eval_model import CachedLM

    model, tokenizer = subject
    ids = tokenizer(PROSE + FACT + PROSE).input_ids
    requests = [(("", ""), ids[:length], ids[length : length + 9]) for length in (390, 300, 230)]
    alone, together = (
        CachedLM(model, tokenizer, compressed("lloyd2"), 64, size)._loglikelihood_tokens(requests, disable_tqdm=True)
        for size in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)  # float32 sums in another order


def out_of_memory(config: object) -> None:
    raise RuntimeError("out of memory\nand more")


@needs_lm_eval
def test_a_whole_small_run_is_written_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    command = ["lmeval", "--folder", str(folder), "--batch", "2", "--chunk", "64", "--output", str(out), "--specs"]
    done = CliRunner().invoke(app, [*command, "exact", "--tasks", "local_answer"])
    assert done.exit_code == 0, done.output

    real = lmeval.compressed
    broken = Contender("broken", "kvcompress", out_of_memory)
    monkeypatch.setattr(lmeval, "compressed", lambda text: broken if text == "lloyd2" else real(text))
    done = CliRunner().invoke(app, [*command, "exact lloyd2", "--tasks", "local_answer local_choice"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rows = {(row["task"], row["cache"]): row for row in lines}
    assert len(lines) == len(rows) == 6
    for (task, cache), row in rows.items():
        assert {"benchmark", "versions", "lm_eval", "commit", "settings", "seed", "spec"} <= row.keys()
        if cache == "broken":
            assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of memory")
            continue
        assert row["status"] == "ok", row["reason"]
        assert row["questions"] == {task: 2}
        assert row["tokens"] > 300
        assert row["metrics"] == rows[task, "uncompressed"]["metrics"]  # exact codes change nothing
    metrics = {task: rows[task, "exact"]["metrics"][task] for task in TASKS}
    # Such a fact is recalled 99 times of 100 (benchmarks/results/embedded.json).
    assert metrics["local_choice"]["acc,none"] == 1.0
    assert metrics["local_answer"]["exact_match,plain"] == 1.0
    said = (out / "table.md").read_text()
    assert "## local_choice" in said
    assert "broken: failed (local_answer): RuntimeError: out of memory" in said


def test_the_table_has_values_with_their_errors() -> None:
    metrics = {"a": {"acc,none": 0.5, "acc_stderr,none": 0.125}, "b": {"acc,none": 1.0}}
    row = Row("group", 0, "lloyd3", "ours", "lloyd", "kvcompress", None, metrics=metrics, questions={"a": 4})
    failed = Row("group", 0, "x", "ours", "x", "kvcompress", None, status="failed", reason="it broke")
    said = lmeval_tables.document([row, failed], "a model", ["a remark"])
    assert "## group: a" in said
    assert "| cache | bits/elem | coded | questions | acc,none |" in said
    assert "| lloyd3 | - | - | 4 | 0.5 ± 0.12 |" in said
    assert "| lloyd3 | - | - | - | 1 |" in said
    assert "x: failed (group): it broke" in said
    assert said.endswith("a remark\n")


def test_metrics_are_numbers_only() -> None:
    found = {"alias": "a", "acc,none": 1, "acc_stderr,none": "N/A", "sample_len": 3}
    assert lmeval.numbers(found) == {"acc,none": 1.0}


def test_without_lm_eval_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmeval, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["lmeval", "--tasks", "arc_easy", "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert "pip install -c constraints.txt -e '.[eval]'" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", ""], "no task is named"),
        (["--tasks", "a", "--specs", "trelis3"], "trellis"),
        (["--tasks", "a", "--limit", "0"], "limit must be at least 1"),
        pytest.param(["--tasks", "arc_easy", "--folder", "/nowhere"], "/nowhere is no folder", marks=needs_lm_eval),
    ],
)
def test_bad_options_are_told_without_a_traceback(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["lmeval", "--output", str(tmp_path), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@needs_lm_eval
def test_an_unknown_task_is_told_with_those_near_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    def without_defaults(include_path: str, include_defaults: bool = False) -> TaskManager:
        """lm-eval's own tasks are 14,000, and take many seconds to read."""
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    command = ["lmeval", "--tasks", "local_choise", "--folder", str(folder), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "lm-eval knows no task 'local_choise'; near: local_choice" in done.output
