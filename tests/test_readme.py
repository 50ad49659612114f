"""README.md says what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks.readme import BLOCK, BLOCKS, ROOT, rewritten


def test_blocks_are_as_results_have_them() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert {match[2] for match in BLOCK.finditer(text)} == set(BLOCKS)
    assert rewritten(text) == text, "run python -m benchmarks.readme"


def test_unknown_block() -> None:
    with pytest.raises(ValueError, match="block 'nothing'; known: quality"):
        rewritten("<!-- nothing: python -m benchmarks.readme -->\n<!-- end -->")
