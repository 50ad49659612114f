"""One context that several devices hold together, as short as it gets.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.parallel_example --model Qwen/Qwen3-8B --text long.txt

Every process runs the model on the same prompt, keeps its share of the cache's pages, and ends with the same text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import kvcompress
from benchmarks import subjects, texts


def main(
    model: Annotated[str | None, typer.Option(help="model folder or hub id  [default: the embedded model]")] = None,
    text: Annotated[Path | None, typer.Option(help="text file  [default: library modules]")] = None,
    spec: Annotated[str, typer.Option(help="how keys and values are held")] = str(kvcompress.DEFAULT_SPEC),
    tokens: Annotated[int, typer.Option(help="tokens of the prompt")] = 1024,
    new: Annotated[int, typer.Option(help="tokens to generate")] = 16,
) -> None:
    """Generate with a context that the processes of torchrun hold together."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    whole, tokenizer = subjects.load(model)
    loaded: Any = kvcompress.wrap(whole, spec, group=dist.group.WORLD)
    (ids,) = texts.load(tokenizer, text, seed=0).windows(1, tokens)
    torch.manual_seed(0)  # the same everywhere, so that all ranks draw the same tokens
    out = loaded.generate(ids.to(loaded.device), max_new_tokens=new, do_sample=True, return_dict_in_generate=True)
    size = out.past_key_values.memory()
    said = repr(tokenizer.decode(out.sequences[0, tokens:]))
    pages, own = size.codes + size.scales, dist.get_rank()
    print(f"rank {own}: {pages:,} bytes of pages, {size.total:,} in all; {said}\n", end="", flush=True)  # in one piece
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
