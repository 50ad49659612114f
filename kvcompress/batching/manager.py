"""transformers' manager of continuous batching for one model whose full-attention layers hold codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from kvcompress.batching.allocator import RecordsAllocator, allocating, dense_bytes, sector_bytes
from kvcompress.batching.attention import NAME
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE

#: Of a ContinuousBatchingConfig: what needs shapes or kernels that attention on codes does not have, and how it is off.
OFF: dict[str, Any] = {
    "use_cuda_graph": False,
    "use_async_batching": False,
    "max_blocks_per_request": 0,
    "q_padding_interval_size": 0,
    "kv_padding_interval_size": 0,
    "default_compile_level": 0,
    "varlen_compile_config": None,
    "decode_compile_config": None,
}


class RecordsManager(ContinuousBatchingManager):
    """See the module; until it is stopped, or its thread has ended, the model's config names our attention.

    spec: of the layers' codes. Raises ValueError for a config that asks for what attention on codes cannot do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: WorkloadHints | None = None,
        *,
        spec: CacheSpec,
    ):
        self.spec = spec
        self._attention_before: str | None = None
        checked = check(continuous_batching_config)
        self.model = model  # type: ignore[assignment]  # for `_switch_back`
        with self._undoing():
            super().__init__(
                model=model,  # type: ignore[arg-type]
                generation_config=generation_config,
                continuous_batching_config=checked,
                workload_hints=workload_hints,
            )

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Name our attention, past the checks that transformers has for flash kernels."""
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            self._attention_before = config._attn_implementation
            config._attn_implementation = NAME

    def warmup(self) -> None:
        """Make the cache; where that fails, the model has its attention back."""
        with self._undoing():
            super().warmup()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        super().stop(block, timeout, keep_for_next_session, hard_stop)
        if not self.is_running():  # else requests are still being answered, and the thread switches back at its end
            self._switch_back()

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._switch_back()

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._switch_back()
            raise

    def _switch_back(self) -> None:
        if self._attention_before is not None:
            self.model.config.get_text_config(decoder=True)._attn_implementation = self._attention_before
            self._attention_before = None

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        self.switch_to_cb_friendly_attn(self.model)  # back since it was stopped, if it is started again
        if self.batch_processor is not None:  # only reset
            return super()._create_batch_processor()
        with allocating(partial(RecordsAllocator, spec=self.spec)):
            return super()._create_batch_processor()


def probe(model: Any, spec: CacheSpec) -> None:
    """Generate two tokens; raises ValueError unless all full-attention layers work on codes as they do so."""
    name, training = type(model).__name__, model.training
    text = model.config.get_text_config(decoder=True)
    room = -(-2 * sector_bytes(text, spec, model.dtype, PAGE) // dense_bytes(text, model.dtype))  # of either kind
    manager = RecordsManager(
        model,
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(page_size=PAGE, num_blocks=room, max_batch_tokens=PAGE),
        spec=spec,
    )
    try:
        manager.warmup()
        processor: Any = manager.batch_processor
        manager.current_batch = 0
        manager.add_request([1, 2, 3], max_new_tokens=2)
        for _ in range(2):  # the prompt, then one token after it
            manager._generation_loop_body(processor, bootstrapping=False)
            allocator = processor.cache.cache_allocators[FULL_ATTENTION]
            if idle := sorted(set(allocator.layer_indices) - allocator.attended):
                raise ValueError(f"its layers {idle} did not attend to the paged cache")
    except Exception as error:
        raise ValueError(f"the attention of {name} cannot work on codes: {error}") from error
    finally:
        manager._switch_back()
        manager.destroy()
        model.train(training)


def check(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """A copy that leaves nothing of `OFF` to be chosen; raises ValueError for a setting that cannot be had on codes."""
    for name, off in OFF.items():
        given = getattr(config, name)
        if any(given) if isinstance(given, tuple) else given:
            raise ValueError(f"continuous batching on codes has no {name}: leave it out, or at {off}, got {given}")
    if config.page_size % PAGE:
        raise ValueError(
            f"codes lie in pages of {PAGE} tokens: page_size must be a multiple of it, got {config.page_size}"
        )
    return replace(config, **OFF)


def init_continuous_batching(
    model: Any,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: WorkloadHints | None = None,
    *,
    spec: CacheSpec,
) -> ContinuousBatchingManager:
    """As transformers' own method of models, whose place it takes."""
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if isinstance(kept, ContinuousBatchingManager):
        kept.switch_to_cb_friendly_attn(model)
        return kept
    config = generation_config or model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = -1  # as transformers says that no token ends an answer
    given = continuous_batching_config or getattr(config, "continuous_batching_config", None)
    return RecordsManager(model, config, given or ContinuousBatchingConfig(), workload_hints, spec=spec)
