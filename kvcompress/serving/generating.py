"""transformers' generation on its own thread, one request of a model at a time: admitted, watched and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerateManager,
    GenerationState,
    Modality,
    _GenerationCancelled,
)

from kvcompress.serving.budget import admit, asked
from kvcompress.serving.call import Call, current
from kvcompress.serving.loading import MAIN, CompressedModels
from kvcompress.serving.metrics import MEASURED_EVERY, Metrics
from kvcompress.serving.refusal import CLOSED, RefusalError, quoted


class State(GenerationState):
    """Hands every model a manager that counts."""

    def __init__(self, models: CompressedModels, metrics: Metrics):
        super().__init__(continuous_batching=models.settings.continuous_batching)
        self.models, self.metrics = models, metrics
        self._counted: dict[str, CountedGeneration] = {}

    def use_continuous_batching(self, model: PreTrainedModel, modality: Modality) -> bool:
        """Whether it was asked for: a model that cannot have it has not been loaded."""
        return self._continuous_batching

    def is_cb_alive(self) -> bool:
        return self.models.batches is None or self.models.batches.is_alive()

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        if use_cb:
            if self.models.batches is None:
                raise RefusalError(503, "the server is stopping")
            return self.models.batches
        if model_id not in self._counted:
            self._counted[model_id] = CountedGeneration(model_id.removesuffix(MAIN), self.models, self.metrics)
        return self._counted[model_id]


class CountedGeneration(GenerateManager):
    """name: the model's, in the metrics. Every request is admitted on arrival; its turn comes later."""

    def __init__(self, name: str, models: CompressedModels, metrics: Metrics):
        super().__init__()
        self.name, self.models, self.metrics = name, models, metrics

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        counted: Any = self._admitted(model, inputs, gen_config)
        return super().generate_streaming(counted, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, Any]:
        counted: Any = self._admitted(model, inputs, gen_config)
        return await super().generate_non_streaming(counted, processor, inputs, gen_config, request_id)

    def _admitted(self, model: PreTrainedModel, inputs: dict[str, Any], gen_config: GenerationConfig) -> Counted:
        """Raises RefusalError for a request that does not fit the budget, or whose cache would not be compressed."""
        prompt = inputs["input_ids"].shape[-1]
        call = asked(self.name, prompt)
        if gen_config.use_cache is False or gen_config.cache_implementation not in (None, "dynamic"):
            raise RefusalError(
                400,
                f"use_cache={gen_config.use_cache}, cache_implementation={gen_config.cache_implementation!r}: "
                "this server generates with its own compressed cache",
                param="generation_config",
            )
        admit(call, gen_config, prompt, self.models.limits[model], self.metrics)
        return Counted(model, call, prompt, self.metrics)


class Counted:
    """A model as one call of its `generate` sees it: it reports to the request that it is for."""

    def __init__(self, model: PreTrainedModel, call: Call, prompt: int, metrics: Metrics):
        self._model, self._call, self._prompt, self._metrics = model, call, prompt, metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Any:
        """On the thread that generates; raises what a stream of transformers' takes for its end, or RefusalError."""
        watch = StoppingCriteriaList([Watch(self._call, self._prompt, self._metrics)])
        generate: Any = self._model.generate
        streams = "streamer" in arguments
        try:
            with self._running():
                return generate(**arguments, stopping_criteria=watch)
        except RefusalError as error:
            if not streams:
                raise
            if error.status == CLOSED:
                raise _GenerationCancelled from error
            raise RuntimeError(quoted(error)) from error
        except _GenerationCancelled:
            raise
        except Exception as error:
            self._call.failed = True
            if streams:
                raise RuntimeError(quoted(error)) from error
            if isinstance(error, ValueError):  # settings that generate() does not take
                raise RefusalError(400, str(error)) from error
            raise

    @contextmanager
    def _running(self) -> Iterator[None]:
        call = self._call
        token = current.set(call)
        try:
            if call.gone.is_set():
                raise RefusalError(CLOSED, "the client has closed the connection")
            call.prompt_tokens = self._prompt
            self._metrics.start(call)
            yield
        finally:
            current.reset(token)
            if call.cache is not None:
                self._metrics.count_attention(call.model, call.cache.stats())
            self._metrics.stop(call)
            call.cache = None


class Watch(StoppingCriteria):
    """Asked after each token: counts it, and measures the cache now and then; ends nothing by itself."""

    def __init__(self, call: Call, prompt: int, metrics: Metrics):
        self._call, self._prompt, self._metrics = call, prompt, metrics
        self._measured = -MEASURED_EVERY

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        call, now = self._call, time.monotonic()
        if not call.generated_tokens:
            self._metrics.first_token.labels(call.model).observe(now - call.arrived)
        call.generated_tokens = input_ids.shape[1] - self._prompt
        if call.cache is not None and now - self._measured >= MEASURED_EVERY:
            call.memory, self._measured = call.cache.memory(), now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
