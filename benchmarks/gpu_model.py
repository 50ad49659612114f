"""Decoding end to end: steps of a randomly initialised model of 8 billion parameters over a made-up history.

`step_us` is a step as it is, `host_us` what the host takes to ask for it, and, of a profile, `busy_us` what the device
works on it: a CUDA graph takes little more. The slowest of the steps codes a page in every layer, due once in 64.
"SPEC static" is the same on fixed tensors (`kvcompress.static_model`), `graphed` where a CUDA graph replays the steps.
Against transformers' DynamicCache, which copies itself at every step, and one that does not, attended in place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from benchmarks.device import release, settle
from benchmarks.gpu_attention import ROOM
from benchmarks.gpu_histories import coded, fill, llama
from benchmarks.gpu_rows import Known, Row, Setup, SkippedError, attempt, ratio
from benchmarks.gpu_timer import Timing
from kvcompress import CompressedCache
from kvcompress.attention import NAME
from kvcompress.layer import CompressedLayer
from kvcompress.memory import storage_bytes
from kvcompress.static_model import StaticModel
from kvcompress.store import PAGE

STEPS = PAGE  # so that every layer codes a page once; as many before, which nobody times, so that this is compiled
SPARE = 4 * PAGE  # tokens that there must be room for: those steps, and some that are profiled
PROFILED = 3  # steps
TOP = 12  # kernels that a profile names
STATIC = " static"  # ends the names of rows of static decoding


class InPlace(DynamicLayer):
    """A layer with room for all tokens to come, which it shows as far as they have been written."""

    def __init__(self, key: Tensor, value: Tensor, spare: int):
        super().__init__()
        self.lazy_initialization(key, value)
        shape = (*key.shape[:2], key.shape[2] + spare, key.shape[3])
        self.room = [x.new_zeros(shape) for x in (key, value)]
        self.filled = 0
        self.update(key, value)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first, self.filled = self.filled, self.filled + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, first : self.filled] = new
        self.keys, self.values = (room[:, :, : self.filled] for room in self.room)
        return self.keys, self.values


@torch.inference_mode()
def model_of(setup: Setup) -> PreTrainedModel:
    """A model of the setup's geometry with random weights, made on its device."""
    config = llama(setup, 1, 64) if setup.dry else llama(setup)
    dtype = torch.float32 if setup.dry else setup.dtype
    with torch.device(setup.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def decode_model(setup: Setup, contexts: tuple[int, ...], specs: tuple[str, ...], known: Known) -> Iterator[Row]:
    """Steps of the model over every context with each cache; a row each."""
    held: list[PreTrainedModel] = []
    about = {"section": "model", "rows": 1}

    def make() -> Row:
        release(setup.device)
        held.append(model_of(setup))
        return {"bytes": storage_bytes(held[0].parameters())}

    row = attempt({**about, "name": "make the model"}, make)
    yield row
    if row["status"] != "ok":
        return
    model = held[0]
    for tokens in contexts:
        makers: dict[str, Callable[[], Cache]] = {
            spec: partial(_compressed, model, setup, spec, tokens) for spec in specs
        }
        makers |= {f"{spec}{STATIC}": makers[spec] for spec in specs}
        makers |= {"DynamicCache": partial(_dynamic, model, setup, tokens)}
        makers |= {"in place": partial(_in_place, model, setup, tokens)}
        times: dict[str, float] = {}
        for name, maker in makers.items():
            release(setup.device)
            row = attempt(
                {**about, "name": name, "tokens": tokens}, partial(_steps, model, setup, maker, name.endswith(STATIC))
            )
            if row["status"] == "ok":
                times[name] = row["step_us"]
                known[f"step {name} {tokens}"] = row["step_us"]
            yield row
        against = {
            f"{name} to {other}": ratio(times.get(other), times.get(name))
            for spec in specs for name in (spec, f"{spec}{STATIC}") for other in ("DynamicCache", "in place")
        }  # fmt: skip
        yield {**about, "name": "ratios", "tokens": tokens, "status": "ok", "seconds": 0.0, "ratios": against}


def _compressed(model: PreTrainedModel, setup: Setup, spec: str, tokens: int) -> Cache:
    model.set_attn_implementation(NAME)
    cache = CompressedCache(model.config, spec)
    setup = Setup(setup.device, model.dtype, setup.heads, setup.groups, setup.head_dim)
    source = coded(setup, spec)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, CompressedLayer)
        layer.lazy_initialization(*source.recent)
        assert layer.history is not None
        fill(layer.history, source, 1, tokens // PAGE, seed=index)
    return cache


def _random(model: PreTrainedModel, setup: Setup, seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    shape = (1, setup.heads, tokens, setup.head_dim)
    generator = torch.Generator(setup.device).manual_seed(seed)
    key, value = (torch.randn(shape, generator=generator, device=setup.device, dtype=model.dtype) for _ in range(2))
    return key, value


def _dynamic(model: PreTrainedModel, setup: Setup, tokens: int) -> Cache:
    model.set_attn_implementation("sdpa")
    _check_room(model, setup, tokens)
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        cache.update(*_random(model, setup, index, tokens), index)
    return cache


def _in_place(model: PreTrainedModel, setup: Setup, tokens: int) -> Cache:
    model.set_attn_implementation("sdpa")
    _check_room(model, setup, tokens)
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        cache.layers[index] = InPlace(*_random(model, setup, index, tokens), SPARE)
    return cache


def _check_room(model: PreTrainedModel, setup: Setup, tokens: int) -> None:
    if setup.dry:
        return
    layers = model.config.num_hidden_layers
    size = 2 * layers * setup.heads * tokens * setup.head_dim * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(setup.device)
    if size > ROOM * free:
        raise SkippedError(f"needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


@torch.inference_mode()
def _steps(model: PreTrainedModel, setup: Setup, maker: Callable[[], Cache], static: bool) -> Row:
    cache = maker()
    fixed = None
    if static:
        assert isinstance(cache, CompressedCache)
        fixed = StaticModel(model, cache, cache.get_seq_length() + SPARE)
    token = torch.zeros(1, 1, dtype=torch.int64, device=setup.device)

    def step() -> Tensor:
        if fixed is not None:
            return fixed.step(token)
        logits: Tensor = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    if not bool(torch.isfinite(step()).all()):
        raise ValueError("the logits hold NaN or infinite numbers")
    warm_up, steps = (0, 1) if setup.dry else (STEPS, STEPS)
    asked, whole = [], []
    for _ in range(warm_up + steps):
        settle(setup.device)
        begun = time.perf_counter()
        step()
        asked.append(time.perf_counter() - begun)
        settle(setup.device)
        whole.append(time.perf_counter() - begun)
    mean = statistics.fmean(whole[warm_up:])
    row = Timing.of(whole[warm_up:]).row("step") | Timing.of(asked[warm_up:]).row("host")
    row |= {"mean_us": round(mean * 1e6, 2), "slowest_us": round(max(whole[warm_up:]) * 1e6, 2)}
    row |= {"tokens_per_second": round(1 / mean, 2)}
    if isinstance(cache, CompressedCache):
        row |= {"stats": cache.stats(), "cache_bytes": cache.memory().total}
    if fixed is not None:
        row |= {"graphed": fixed.graphed}
    return row | {"profile": attempt({}, partial(_profile, step, setup.device))}


def _profile(step: Callable[[], object], device: torch.device) -> Row:
    """Of one step: what the device works, on how many kernels, and the heaviest of these."""
    kind, activity, steps = torch.autograd.DeviceType.CUDA, torch.profiler.ProfilerActivity.CUDA, PROFILED
    if device.type == "cpu":
        kind, activity, steps = torch.autograd.DeviceType.CPU, torch.profiler.ProfilerActivity.CPU, 1
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            step()
        settle(device)
    own = [event for event in profile.key_averages() if event.device_type == kind]
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key[:80]: getattr(event, name) / steps for event in own}
    heaviest = sorted(times, key=times.__getitem__, reverse=True)[:TOP]
    return {
        "busy_us": round(sum(times.values()), 1),
        "kernels": round(sum(event.count for event in own) / steps, 1),
        "heaviest_us": {key: round(times[key], 1) for key in heaviest},
    }
