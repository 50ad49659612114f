"""READMEs say what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks.readme import BLOCK, BLOCKS, FILES, rewritten


def test_blocks_are_as_results_have_them() -> None:
    texts = [path.read_text("utf-8") for path in FILES]
    assert {match[2] for text in texts for match in BLOCK.finditer(text)} == set(BLOCKS)
    for path, text in zip(FILES, texts, strict=True):
        assert rewritten(text) == text, f"{path}: run python -m benchmarks.readme"


def test_unknown_block() -> None:
    with pytest.raises(ValueError, match="block 'nothing'; known: quality"):
        rewritten("<!-- nothing: python -m benchmarks.readme -->\n<!-- end -->")
