import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.log import read
from benchmarks.prefill_memory import PrefillRow


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_a_long_prefill_peaks_below_the_uncompressed_cache(tmp_path: Path):
    """16k tokens in chunks: the whole process grows by less than the uncompressed cache alone would take."""
    command = [sys.executable, "-m", "benchmarks.prefill_memory", "--spec", "lloyd3", "--chunk", "1024"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    (row,) = read(tmp_path / "results.jsonl", PrefillRow)
    assert row.uncompressed_bytes == 16384 * 8 * 2 * 4 * 64 * 4
    assert row.cache_bytes < 0.15 * row.uncompressed_bytes  # 3.25 of 32 bits, sinks and window
    assert row.peak_bytes < 0.75 * row.uncompressed_bytes
    assert f"raised the process's memory by {row.peak_bytes / 1e6:,.0f} MB at most" in done.stdout
