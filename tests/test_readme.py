"""READMEs say what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import BLOCK, BLOCKS, FILES, million, rewritten
from tests import report_rows


def test_blocks_are_as_results_have_them() -> None:
    texts = [path.read_text("utf-8") for path in FILES]
    assert {match[2] for text in texts for match in BLOCK.finditer(text)} == set(BLOCKS)
    for path, text in zip(FILES, texts, strict=True):
        assert rewritten(text) == text, f"{path}: run python -m benchmarks.readme"


def test_unknown_block() -> None:
    with pytest.raises(ValueError, match="block 'nothing'; known: quality"):
        rewritten("<!-- nothing: python -m benchmarks.readme -->\n<!-- end -->")


def test_million_while_rows_are_few(tmp_path: Path) -> None:
    assert million(tmp_path) == "*No rows of `million` are committed yet.*\n"
    file = report_rows.million(tmp_path)
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("")
    assert million(tmp_path) == "*No rows of `million` are committed yet.*\n"
    file.write_text(lines[0])
    assert million(tmp_path).splitlines()[-1] == "| uncompressed | - | 2,147.5 | 0.50 | 25.00 | - | 90.0% |"
    file.write_text("".join(lines))
    found = million(tmp_path)
    assert found.startswith("1,048,576 tokens:\n\n| cache |")
    assert "| trellis3 | 3.20 | 214.7 | 5.00 | 25.00 | +0.80% ± 0.02 | 90.0% |" in found  # 0.4% x (1 + 10 / 10)
    assert "| uncompressed, 16,384 tokens at a time | - | - | - | 25.00 | +2.00% ± 0.10 | - |" in found
    assert "lowrank32" not in found  # it failed
