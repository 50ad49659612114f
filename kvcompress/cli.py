"""The `kvcompress` command: generate and serve text with a compressed cache, plan memory, calibrate and list specs.

What a user can get wrong ends in one line on stderr and exit code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

    from kvcompress import CompressedCache, PrefixStore

app = typer.Typer(
    help="Hold long contexts in less memory: a model's KV cache as codes of about three bits.",
    epilog="Each command has its own help: kvcompress generate --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SpecOption = Annotated[
    str | None,
    typer.Option("--spec", help="How to compress the cache, such as trellis3 or trellis:k4v2; see: kvcompress specs"),
]
PrefixStoreOption = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps what was read of prompts: later ones that begin alike go on from there."),
]
MinTokensOption = Annotated[
    int, typer.Option(min=1, help="With --prefix-store: the fewest tokens that are worth keeping, or going on from.")
]


@dataclass
class Settings:
    """The options that stand before a command."""

    debug: bool = False


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (None: the process's own) and exit the process."""
    settings = Settings()
    try:
        code = app(arguments, prog_name="kvcompress", standalone_mode=False, obj=settings)
    except typer.Abort:
        code = 130
    except Exception as error:
        message = user_message(error)
        if message is None or settings.debug:
            raise
        if message:
            _complain(message)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def user_message(error: Exception) -> str | None:
    """One line for an error that input or circumstances cause (empty where help was shown instead); None for a bug."""
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong kind
        text = error.format_message()
    elif isinstance(error, ValueError | OSError | ImportError) or type(error).__name__ == "OutOfMemoryError":
        text = str(error) or type(error).__name__
    else:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.ensure_object(Settings).debug = debug


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, as it stands; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id; without it, the small model in this package.")
    ] = None,
    spec: SpecOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy, the likeliest token each time.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="The model's and the exact tokens'; auto: as the model is stored.")
    ] = "auto",
    seed: Annotated[int | None, typer.Option(help="Makes sampling (a temperature above 0) repeatable.")] = None,
    prefix_store: PrefixStoreOption = None,
    min_tokens: MinTokensOption = 1024,
    offload: Annotated[
        str | None,
        typer.Option(help="Bytes of the cache's pages on the device at most, such as 4GiB; the rest waits elsewhere."),
    ] = None,
    offload_host: Annotated[
        str | None,
        typer.Option(help="With --offload: bytes of pages in the host's memory, the rest goes to a file; no limit."),
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="With --offload: where the file is; the system's folder for temporary files.")
    ] = None,
) -> None:
    """Continue a prompt with a compressed KV cache: streams the text, then says what the cache took.

    \b
    Examples:
      kvcompress generate "It was a bright cold day in April"
      kvcompress generate - --model Qwen/Qwen3-0.6B --spec trellis:k4v2 < book.txt
      kvcompress generate "Once" --temperature 0.8 --seed 1 --max-new-tokens 300
      kvcompress generate - --prefix-store ~/.cache/kvcompress < manual-and-question.txt
      kvcompress generate - --offload 4GiB --offload-folder /mnt/nvme < library.txt
    """
    import torch

    import kvcompress

    chosen = kvcompress.CacheSpec.parse(spec or kvcompress.DEFAULT_SPEC)
    if offload is None and (offload_host is not None or offload_folder is not None):
        raise ValueError("--offload-host and --offload-folder say where pages go that --offload BYTES takes off")
    tiers = None if offload is None else kvcompress.Offload(offload, offload_host, offload_folder)
    text, place = _read_prompt(prompt), _device(device)
    network, tokenizer = _load(model, dtype)
    store = None if prefix_store is None else kvcompress.PrefixStore(prefix_store, min_tokens=min_tokens)
    kvcompress.wrap(network.to(place), chosen, prefix_store=store, offload=tiers)
    if seed is not None:
        torch.manual_seed(seed)
    cache = _stream(network, tokenizer, text, max_new_tokens, temperature)
    print(f"\n{cache.memory()}")
    if store is not None:
        store.flush()
        print(_said_of(store))


def _said_of(store: PrefixStore) -> str:
    """What a store did for one prompt, and what it holds."""
    from kvcompress.memory import format_bytes

    stats = store.stats()
    passed = [name.removeprefix("passed over: ") for name in stats if name.startswith("passed over: ")]
    used = f"passed over: {passed[0]}" if passed else f"{stats['tokens reused']:,} tokens of the prompt reused"
    held = f"{stats['entries: disk']} entries, {format_bytes(stats['bytes: disk'])}"
    return f"prefix store: {used}; {held} on disk"


def _read_prompt(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty: there is nothing to continue")
    return text


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or not of this machine
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use the device {name!r}: {reason}; auto or cpu always works") from error
    return device


def _load(name: str | None, dtype: Dtype) -> tuple[Any, Any]:
    """The model in eval mode, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvcompress import models

    if name is None:
        return models.embedded() if dtype == "auto" else models.embedded(dtype=getattr(torch, dtype))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def _stream(network: Any, tokenizer: Any, text: str, max_new_tokens: int, temperature: float) -> CompressedCache:
    """Print the continuation of `text` token by token; returns the cache that was made for it."""
    from transformers import TextStreamer

    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    done = network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    cache: CompressedCache = done.past_key_values
    return cache


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json or Hugging Face id; no weights are loaded.")],
    context: Annotated[
        str, typer.Option(help="Tokens of each row: 131072, 128k, 1M (k is 1024, M is 1024 k).")
    ] = "128k",
    gpu: Annotated[str, typer.Option(help="Memory of the GPU: 80GB (10^9 bytes each) or 79GiB (2^30).")] = "80GB",
    spec: SpecOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of that context at once.")] = 1,
    weight_bits: Annotated[float, typer.Option(help="Bits for each of the model's parameters.")] = 16,
    reserve: Annotated[str, typer.Option(help="Memory set aside for the CUDA context, workspace and gaps.")] = "2GiB",
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of each row that pass through the model at once; counted as activations.")
    ] = 4096,
    fits: Annotated[
        Path | None,
        typer.Option(help="fits.json of python -m benchmarks scaling; without it, what was fitted on the small model."),
    ] = None,
) -> None:
    """Say which context lengths fit on a GPU, with and without compression, from a model's config alone.

    Weights, activations of a prefill chunk and the cache are counted. What quality the spec keeps is quoted from fits
    to measurements, with its interval, and where they do not reach the plan says so.

    \b
    Examples:
      kvcompress plan Qwen/Qwen3-8B --context 1M --gpu 80GB
      kvcompress plan ./my-model --gpu 24GB --spec trellis2 --weight-bits 4.5
    """
    import kvcompress
    from kvcompress.fits import SHIPPED

    chosen = kvcompress.CacheSpec.parse(spec or kvcompress.DEFAULT_SPEC)
    made = kvcompress.plan(
        model,
        context,
        chosen,
        gpu,
        batch=batch,
        weight_bits=weight_bits,
        reserve=reserve,
        prefill_chunk=prefill_chunk,
        fits=fits or SHIPPED,
    )
    print(made)


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hugging Face id; without it, the small model in this package.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text such as the model will read, UTF-8; needed.")] = None,
    bits: Annotated[float | None, typer.Option(help="Average to allot, over all elements; 3 where not said.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="What to allot, without its number: trellis, spectral, prerope+trellis.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Allot bits to each KV head by itself.")] = False,
    energy: Annotated[
        float | None, typer.Option(help="Instead of bits: the share that the ranks of --codec lowrank keep.")
    ] = None,
    spec: Annotated[
        str | None, typer.Option("--spec", help="Allot nothing, only learn this spec's bases; with --basis.")
    ] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Learn means and bases too, and write them to this .safetensors file.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The JSON file to write, for --spec of other commands.")] = Path(
        "calibrated.json"
    ),
    context: Annotated[int, typer.Option(min=1024, help="Tokens of each passage measured.")] = 4096,
    passages: Annotated[
        int, typer.Option(min=1, help="Passages to measure layers on, and as many others to compare specs on.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Draws the passages from the text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The model's; auto: as it is stored.")] = "auto",
) -> None:
    """Find how many bits each layer's keys and values need, from a text: writes a spec that other commands take.

    Every layer's keys and values are coded alone and the KL divergence of the model's predictions is measured; bits are
    allotted under the average, compared with plain specs on other passages, and the best is written.

    \b
    Examples:
      kvcompress calibrate Qwen/Qwen3-0.6B --text book.txt --bits 3 --output qwen.json
      kvcompress calibrate --text book.txt --codec lowrank --energy 0.95
      kvcompress calibrate --text book.txt --spec spectral3 --basis spectral3.safetensors
    """
    from kvcompress import calibrate_command
    from kvcompress.divergence import Text

    wanted = calibrate_command.Wanted(bits, energy, spec, codec, heads, basis, output, context, passages, seed)
    if text is None:
        raise ValueError("calibrate needs --text FILE: text such as the model will read, a book's worth or less")
    content, place = text.read_text("utf-8"), _device(device)
    network, tokenizer = _load(model, dtype)
    calibrate_command.run(network.to(place), Text.encode(tokenizer, content), wanted)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or Hugging Face id; without it, any model that a request names is loaded."),
    ] = None,
    spec: SpecOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    max_context: Annotated[
        str | None, typer.Option(help="Tokens that prompt and answer may have together: 131072, 128k, 1M.")
    ] = None,
    cache_budget: Annotated[
        str | None,
        typer.Option(help="Bytes that one request's cache may come to, such as 2GiB; of all, if batched."),
    ] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Generate for all requests at once, from one pool of blocks.")
    ] = False,
    prefix_store: PrefixStoreOption = None,
    min_tokens: MinTokensOption = 1024,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts that are read at a time.")] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: all GPUs where there are some.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The model's and the exact tokens'; auto: as it is stored.")] = "auto",
) -> None:
    """Serve a model with OpenAI's API and a compressed KV cache; /metrics has its numbers for Prometheus.

    The server is transformers' own (/v1/chat/completions, /v1/completions, /v1/responses). A request that would exceed
    --max-context or --cache-budget is answered with an error before anything is computed. It takes
    pip install 'kvcompress[serve]'.

    \b
    Examples:
      kvcompress serve Qwen/Qwen3-0.6B --spec spectral3
      kvcompress serve ./my-model --cache-budget 2GiB --prefix-store ~/.cache/kvcompress
      kvcompress serve Qwen/Qwen3-0.6B --continuous-batching --cache-budget 20GiB
    """
    from kvcompress import DEFAULT_SPEC, serving
    from kvcompress.paged.codecs import DEFAULT

    if device != "auto":
        _device(device)
    settings = serving.Settings(
        model,
        spec or (DEFAULT if continuous_batching else DEFAULT_SPEC),
        host,
        port,
        prefix_store,
        min_tokens,
        max_context,
        cache_budget,
        device,
        dtype,
        prefill_chunk,
        continuous_batching,
    )
    serving.run(settings)


@app.command()
def specs() -> None:
    """List the codecs with the bits that they take, the presets, and how a spec is written."""
    import kvcompress.spec
    from kvcompress import spec_tables

    spec_tables.print_codecs()
    spec_tables.print_presets()
    grammar = (kvcompress.spec.__doc__ or "").partition("::")[2].strip("\n")
    print(f"\nA spec names codecs and settings; the default is {kvcompress.DEFAULT_SPEC}.\n\n{grammar.rstrip()}")


if __name__ == "__main__":
    main()
