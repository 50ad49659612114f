"""The ranks of tests/test_parallel.py: `python -m tests.parallel_ranks FOLDER` forks four, which make all checks.

What is checked is held against the result of one process, which rank 0 works out alone, while the others wait for it in
the next collective. Every rank writes FOLDER/RANK.json: the checks that it made, with what went wrong.

Bounds. The ranks' partial results are added in another order than one process adds them, which float32 shows as 1e-7 of
a number of size 1; where it tips a code over to its neighbour, a number of a key or value changes by a step, which
logits show as less than 1e-3 of their size. A page too many or too few, or in the wrong place, shows as 1e-1.
"""

from __future__ import annotations

import copy
import datetime
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from kvcompress import CacheSpec, CompressedCache, Offload, wrap
from kvcompress.parallel import ContextGroup, Group
from kvcompress.store import PAGE
from tests.families import build, left_padded, prompt

WORLD = 4
TIMEOUT = datetime.timedelta(seconds=120)  # for rank 0 to work out what the others wait for, on a busy machine
CLOSE = 1e-3  # of the largest logit; see the module
SPEC = CacheSpec("trellis3", "trellis3", sinks=4, window=32)
LENGTH = 4 + 32 + 6 * PAGE + 40  # tokens of a prompt: six pages in each layer, two at ranks 0 and 1, one at 2 and 3

CHECKS: dict[str, Callable[[], None]] = {}
_pair: Group | None = None  # of ranks 0 and 1


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


@torch.no_grad()
def feed(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last token's logits [B, V] of one forward pass, with the positions that generate() would give."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    more = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    return model(ids, logits_to_keep=1, **more).logits[:, -1]


def read(
    model: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor | None = None, chunk: int = 150
) -> list[Tensor]:
    """Logits after a prefill in chunks and after three tokens more, which are the same whatever was predicted."""
    found = []
    for start in range(0, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        found.append(feed(model, cache, ids[:, start:stop], None if mask is None else mask[:, :stop]))
    for number in range(3):
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        found.append(feed(model, cache, torch.full((len(ids), 1), 5 + number), mask))
    return found


def same_everywhere(x: Tensor, group: ContextGroup) -> None:
    """All ranks hold the same bits."""
    found = [torch.empty_like(x) for _ in range(group.world)]
    dist.all_gather(found, x.contiguous(), group=group.process_group)
    for each in found:
        assert torch.equal(each, x)


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, one in zip(found, wanted, strict=True):
        assert mine.shape == one.shape
        assert float((mine - one).abs().max()) <= CLOSE * float(one.abs().max())


def as_one_process(run: Callable[[Group | None], list[Tensor]], *groups: Group) -> None:
    """What `run` gives with a context of two and of four ranks is what it gives without, and the same at all ranks."""
    for group in groups or (dist.group.WORLD, _pair):
        if not isinstance(group, dist.ProcessGroup | DeviceMesh):  # of others
            continue
        found = run(group)
        own = ContextGroup.of(group)
        assert own is not None
        for each in found:
            same_everywhere(each, own)
        if own.rank == 0:
            assert_close(found, run(None))


@check
def prefill_and_decode() -> None:
    """Grouped queries, chunks; every page is kept once, by the rank whose turn it is, as one process would code it."""
    model, ids = build("llama_rope"), prompt(2, LENGTH)
    as_one_process(lambda group: read(model, CompressedCache(model.config, SPEC, group), ids))
    cache, whole = CompressedCache(model.config, SPEC, dist.group.WORLD), CompressedCache(model.config, SPEC)
    read(model, cache, ids)
    read(model, whole, ids)
    mine, history = cache.layers[0].history, whole.layers[0].history
    assert history.coded == mine.coded == [6 * PAGE] * 2
    kept = mine.table.ids >= 0
    assert kept.tolist() == [[page % WORLD == rank() for page in range(6)]] * 2
    for name, part in mine.pool.read(mine.table.ids[kept]).items():
        assert torch.equal(part, history.pool.read(history.table.ids[kept])[name])
    size, all_of_it = cache.memory(), whole.memory()
    pages = 2 if rank() < 2 else 1
    assert size.codes * 6 == all_of_it.codes * pages
    assert size.scales * 6 == all_of_it.scales * pages
    assert size.exact == all_of_it.exact
    assert size.coded_elements * 6 == all_of_it.coded_elements * pages
    assert all_of_it.uncompressed - size.uncompressed == 4 * (all_of_it.coded_elements - size.coded_elements)
    assert abs(size.bits_per_element - all_of_it.bits_per_element) < 2  # means and tables, which all ranks have


@check
def traffic() -> None:
    """A pass takes one all-reduce a layer, of D + 1 float64 a query and head, and one small message beside."""
    model = build("llama_rope")
    cache = CompressedCache(model.config, SPEC, dist.group.WORLD)
    read(model, cache, prompt(1, LENGTH))
    before = cache.stats()
    feed(model, cache, prompt(1, 1))
    now = cache.stats()
    assert now["collectives"] - before["collectives"] == 1 + 2
    assert now["payload"] - before["payload"] == 5 * 8 + 2 * 4 * (16 + 1) * 8


@check
def left_padding() -> None:
    """Rows of other lengths, one of them without a page, in a model with sliding layers and sink logits."""
    model = build("gpt_oss")
    ids, mask = left_padded([prompt(1, n, seed=n)[0] for n in (330, 70, 200)])
    spec = CacheSpec("kivi2", "kivi2", sinks=4, window=32)
    as_one_process(lambda group: read(model, CompressedCache(model.config, spec, group), ids, mask))


@check
def keys_before_rope() -> None:
    """Bases learned from the prompt, by all ranks alike; the group is one dimension of a mesh."""
    model, ids = build("llama", head_dim=64), prompt(1, 4 + 512 + 3 * PAGE)
    spec = CacheSpec("prerope+spectral3", "spectral3", sinks=4, window=32)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "context"))

    def run(group: Group | None) -> list[Tensor]:
        return read(model, CompressedCache(model.config, spec, group), ids, chunk=300)

    as_one_process(run, mesh["context"])
    with pytest.raises(ValueError, match=r"of 2 dimensions \('other', 'context'\); give mesh\[NAME\]"):
        CompressedCache(model.config, spec, mesh)


@check
def rows_change() -> None:
    """Beams, copies, taking back, starting anew: tables are every rank's own and stay in step."""
    model, ids = build("llama"), prompt(2, LENGTH)

    def run(group: Group | None) -> list[Tensor]:
        cache = CompressedCache(model.config, SPEC, group)
        found = read(model, cache, ids)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        fork = copy.deepcopy(cache)
        found.append(feed(model, cache, prompt(4, 7)))
        for tokens in (120, 40):  # into pages, twice, so that two are cut short
            cache.crop(-tokens)
            found.append(feed(model, cache, prompt(4, 90)))
        cache.batch_select_indices(torch.tensor([3]))
        found.append(feed(model, cache, prompt(1, 100)))
        found.append(feed(model, fork, prompt(4, 7)))
        cache.reset()
        return found + read(model, cache, ids)

    as_one_process(run)


@check
def generation() -> None:
    """`generate` by `wrap`: greedy, beams, and sampling, which one seed keeps in step and two seeds do not."""
    ids = prompt(2, 300)

    def run(group: Group | None) -> list[Tensor]:
        model = wrap(build("llama"), SPEC, prefill_chunk=128, group=group)
        found = []
        for how in ({}, {"num_beams": 3}, {"do_sample": True}):
            torch.manual_seed(0)
            found.append(model.generate(ids, max_new_tokens=6, **how).float())
        return found

    as_one_process(run)
    model = wrap(build("llama"), SPEC, group=dist.group.WORLD)
    torch.manual_seed(rank())
    with pytest.raises(ValueError, match=r"tokens: rank .* give all ranks the same seed"):
        model.generate(ids, max_new_tokens=6, do_sample=True)


@check
def pages_beyond_the_device() -> None:
    """A rank's own pages lie partly in its own file, or are none; one process keeps them all at hand."""
    ids, size = prompt(2, LENGTH), 2 * 2 * 64 * (8 * 3 // 8 + 2)  # bytes of a page: two sides, two heads of 8

    def run(group: Group | None) -> list[Tensor]:
        model, offload = build("llama"), None if group is None else Offload(size)
        short, cache = (CompressedCache(model.config, SPEC, group, offload) for _ in range(2))
        found = read(model, short, ids[:, : 4 + 2 * PAGE])  # one page of every row, at rank 0
        found += read(model, cache, ids)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-100)
        found.append(feed(model, cache, prompt(2, 80)))
        if offload is not None:
            held = sum(int((layer.history.table.ids >= 0).sum()) for layer in cache.layers)
            assert offload.bytes["device"] <= size
            assert cache.memory().disk >= (held - 1) * size > 0
            assert (short.memory().codes > 0) == (rank() == 0)
        wrapped = wrap(model, SPEC, prefill_chunk=128, group=group, offload=offload)
        return [*found, wrapped.generate(ids, max_new_tokens=4, num_beams=2).float()]

    as_one_process(run)


@check
def other_attention() -> None:
    """Layers are decoded as a whole: every rank's tokens are put together."""
    model, ids = build("llama", attention="eager"), prompt(2, LENGTH)
    as_one_process(lambda group: read(model, CompressedCache(model.config, SPEC, group), ids))


@check
def ranks_that_differ() -> None:
    """Every rank is told what differs, and where; caches are as they were and go on."""
    model, ids = build("llama"), prompt(2, LENGTH)
    odd = rank() == 2

    def told(cache: CompressedCache, tokens: Tensor, what: str) -> None:
        held = cache.get_seq_length()
        with pytest.raises(ValueError, match=rf"\({what}: rank 2[;)]"):
            feed(model, cache, tokens)
        assert cache.get_seq_length() == held

    spec = CacheSpec("trellis3", "trellis3", sinks=4, window=64) if odd else SPEC
    told(CompressedCache(model.config, spec, dist.group.WORLD), ids, "spec")
    cache = CompressedCache(model.config, SPEC, dist.group.WORLD)
    feed(model, cache, ids)
    told(cache, prompt(2, 5, seed=int(odd)), "tokens")
    told(cache, prompt(2, 6 if odd else 5), "rows and tokens of the chunk")
    cache.crop(-3 if odd else 0)
    told(cache, prompt(2, 5), "rows and tokens held")
    cache.crop(0 if odd else -3)
    same_everywhere(feed(model, cache, prompt(2, 5)), cache.group)


@check
def what_is_refused() -> None:
    model = build("llama")
    cache = CompressedCache(model.config, SPEC, dist.group.WORLD)
    feed(model, cache, prompt(1, LENGTH))
    with pytest.raises(ValueError, match="dealt out to 4 ranks cannot be saved"):
        cache.save("nowhere")
    with pytest.raises(TypeError, match=r"must be a torch\.distributed ProcessGroup that this process is in"):
        CompressedCache(model.config, SPEC, "nccl")
    static = wrap(build("llama"), SPEC, static=True, group=dist.group.WORLD)
    out = static.generate(prompt(1, LENGTH), max_new_tokens=3, return_dict_in_generate=True)
    reason = "refused: static decoding: a context that 4 ranks hold together"
    assert reason in out.past_key_values.stats()


@check
def far_apart() -> None:
    """Log-sum-exps that float32's exponents, and float64's around the exact tokens' own, could not tell apart."""
    group = ContextGroup(dist.group.WORLD)
    inf = torch.inf
    #: (the exact tokens', each rank's, the result's, which ranks' means 0, 1, 2, 3 it is the mean of)
    cases = [
        (0.0, (1000.0, 999.0, -inf, 0.0), 1000.3132617, 1 / (1 + torch.e)),
        (-3e4, (-3e4, -inf, -inf, -3e4 - 50), -3e4, 0.0),
        (5.0, (-inf, -inf, -inf, -inf), -inf, 0.0),
        (-inf, (-inf, -inf, 300.0, 301.0), 301.3132617, 2 + 1 / (1 + 1 / torch.e)),
        (0.0, (-inf, -90.0, -inf, -inf), -90.0, 1.0),
        (0.0, (1e6, -inf, -inf, 900.0), 1200.0, 0.0),  # beyond: the one that is so far ahead is all there is
    ]
    mean, log = (torch.full((len(cases), 1), x) for x in (float(rank()), 0.0))
    log[:, 0] = torch.tensor([logs[rank()] for _, logs, _, _ in cases])
    mean[log == -inf] = torch.nan  # of nothing
    exact = torch.tensor([[own] for own, _, _, _ in cases])
    found, total = group.combine(mean, log, exact)
    torch.testing.assert_close(total, torch.tensor([[each] for _, _, each, _ in cases]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, torch.tensor([[each] for _, _, _, each in cases]), rtol=1e-6, atol=1e-6)


@check
def kernels() -> None:
    """A decode step in Triton's interpreter: with one page in all, so that one rank of the pair has none."""
    if not isinstance(_pair, dist.ProcessGroup):
        return
    model = build("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    spec, ids = CacheSpec("trellis3", "trellis3", window=64), prompt(1, 4 + 64 + PAGE + 1)

    def steps(group: Group | None, backend: str) -> list[Tensor]:
        cache = CompressedCache(model.config, spec, group)
        feed(model, cache, ids)
        os.environ["KVCOMPRESS_BACKEND"] = backend
        try:
            found = [feed(model, cache, ids[:, :1])]
        finally:
            del os.environ["KVCOMPRESS_BACKEND"]
        assert cache.layers[0].history.coded == [PAGE]
        assert not [name for name in cache.stats() if name.startswith("refused")]
        return found

    found = steps(_pair, "triton")
    for mine, one in zip(found, steps(None, "torch"), strict=True):
        same_everywhere(mine, ContextGroup(_pair))
        assert float((mine - one).abs().max()) <= 2**-8 * float(one.abs().max())  # float16, as in test_static_model.py


@check
def with_tensor_parallelism() -> None:
    """transformers shares out the heads in pairs of ranks, and every pair holds half of the pages."""
    mesh, folder = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "heads")), Path(sys.argv[1]) / "model"
    spec = CacheSpec("spectral3", "spectral3", sinks=4, window=32)  # its values' metric reads the output projection
    if rank() == 0:
        build("llama", head_dim=64).save_pretrained(folder)
    dist.barrier()
    ids = prompt(1, 4 + 512 + 3 * PAGE)
    how = DistributedConfig(tp_size=2, dp_replicate_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=how).eval()
    model.set_attn_implementation("kvcompress")
    cache = CompressedCache(model.config, spec, mesh["context"])
    found = read(model, cache, ids, chunk=300)
    assert cache.layers[0].history.recent[0].shape[1] == 1  # of two KV heads
    for each in found:
        same_everywhere(each, ContextGroup(dist.group.WORLD))
    if rank() == 0:
        whole = build("llama", head_dim=64)
        assert_close(found, read(whole, CompressedCache(whole.config, spec), ids, chunk=300))


@check
def a_rank_ends() -> None:
    """The last check: the others do not wait for it for ever, and say why they stop."""
    model, ids = build("llama"), prompt(1, LENGTH)
    cache = CompressedCache(model.config, SPEC, dist.group.WORLD)
    feed(model, cache, ids)
    if rank() == WORLD - 1:
        return
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank {rank()} of a context of 4 waited for the others in vain"):
        read(model, cache, ids)
    assert time.monotonic() - begun < TIMEOUT.total_seconds() / 2


def main(own: int, folder: Path) -> None:
    """Make all checks as rank `own`."""
    global _pair
    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=own, world_size=WORLD, timeout=TIMEOUT
    )
    _pair = dist.new_group([0, 1])
    results: dict[str, Any] = {}
    for name, function in CHECKS.items():
        begun = time.monotonic()
        try:
            function()
            results[name] = {"seconds": round(time.monotonic() - begun, 2)}
        except BaseException:
            results[name] = {"error": traceback.format_exc()}
        (folder / f"{own}.json").write_text(json.dumps(results))
        if "error" in results[name]:
            break  # the others are not in step any more
    os._exit(0)  # no farewell: that would wait for ranks that are gone


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    forking = multiprocessing.get_context("fork")  # once everything is imported
    ranks = [forking.Process(target=main, args=(own, Path(sys.argv[1]))) for own in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
