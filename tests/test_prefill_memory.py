import json
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_a_long_prefill_peaks_below_the_uncompressed_cache():
    """16k tokens in chunks: the whole process grows by less than the uncompressed cache alone would take."""
    command = [sys.executable, "-m", "benchmarks.prefill_memory", "--spec", "lloyd3", "--chunk", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["uncompressed"] == 16384 * 8 * 2 * 4 * 64 * 4
    assert result["cache"] < 0.15 * result["uncompressed"]  # 3.25 of 32 bits, sinks and window
    assert result["peak"] < 0.75 * result["uncompressed"]
