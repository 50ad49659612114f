"""transformers' model manager, whose models are wrapped as they are loaded, or refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager

from kvcompress import batching
from kvcompress.cache import CompressedCache
from kvcompress.generation import wrap
from kvcompress.prefixes import PrefixStore
from kvcompress.serving.batches import Batches
from kvcompress.serving.budget import footprint, pool, positions, tokens_within
from kvcompress.serving.call import current
from kvcompress.serving.metrics import Metrics
from kvcompress.serving.refusal import CLOSED, RefusalError
from kvcompress.serving.settings import Settings
from kvcompress.spec import CacheSpec
from kvcompress.units import parse_count, parse_size

logger = logging.getLogger(__name__)

MAIN = "@main"  # what transformers adds to a model's name


class CompressedModels(ModelManager):
    """limits: the most tokens of prompt and answer, by loaded model; None: any number."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self.settings, self.spec = settings, CacheSpec.parse(settings.spec)
        self.store = None
        if settings.prefix_store is not None:
            self.store = CountedStore(metrics, settings.prefix_store, settings.min_tokens)
        self.metrics = metrics
        self.batches: Batches | None = None  # of the one model of a server with continuous batching
        self.limits: WeakKeyDictionary[PreTrainedModel, int | None] = WeakKeyDictionary()
        super().__init__(device=settings.device, dtype=settings.dtype, force_model=settings.model)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """transformers' own, which raises RefusalError: 404 for what cannot be had, 400 for what cannot be served."""
        name = model_id_and_revision.removesuffix(MAIN)
        try:
            found: tuple[Any, Any] = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        except RefusalError:
            raise
        except OSError as error:
            message = f"the model {name!r} cannot be loaded: {_first_line(error)}"
            raise RefusalError(404, message, "model_not_found", "model") from error
        except (ValueError, TypeError) as error:
            message = f"the model {name!r} cannot be served: {_first_line(error)}"
            raise RefusalError(400, message, "model_not_supported", "model") from error
        return found

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = super()._load_model(*args, **kwargs)
        if self.settings.continuous_batching:
            self.batches = self._batches(model)
            logger.info("%s: up to %s tokens a request", type(model).__name__, self.batches.limit)
            return model
        wrap(model, self.spec, self.settings.prefill_chunk, prefix_store=self.store)
        probe(model)
        model.register_forward_pre_hook(watch, with_kwargs=True)
        self.limits[model] = self._limit(model)
        logger.info("%s: up to %s tokens", type(model).__name__, self.limits[model] or "any number of")
        return model

    def _batches(self, model: PreTrainedModel) -> Batches:
        """Raises ValueError for a model or spec that cannot be batched on codes, or a budget that is too small."""
        settings = self.settings
        batching.enable(model, self.spec)
        most = None if settings.max_context is None else parse_count(settings.max_context)
        budget = None if settings.cache_budget is None else parse_size(settings.cache_budget)
        config = pool(model, self.spec, budget, settings.prefill_chunk)
        return Batches.of(model, str(settings.model), self.spec, config, most, self.metrics)

    def shutdown(self) -> None:
        """Let go of all models, and of a batch that is running."""
        if self.batches is not None:
            self.batches.stop()
            self.batches = None
        super().shutdown()

    def _limit(self, model: PreTrainedModel) -> int | None:
        """The most tokens of a request; None where neither settings nor learned positions end it."""
        settings, table = self.settings, positions(model)
        limits = [] if table is None else [table]
        if settings.max_context is not None:
            limits.append(parse_count(settings.max_context))
        if settings.cache_budget is not None:
            budget = parse_size(settings.cache_budget)
            limits.append(tokens_within(footprint(model.config, self.spec, model.dtype), budget))
            if limits[-1] < 1:
                raise ValueError(f"a cache budget of {settings.cache_budget} does not hold one token of this model")
        return min(limits, default=None)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """The models that are loaded, for /v1/models (transformers lists what was ever downloaded)."""
        return [
            {"id": name.removesuffix(MAIN), "object": "model", "created": 0, "owned_by": "kvcompress"}
            for name in self.loaded_models
        ]


class CountedStore(PrefixStore):
    """A prefix store that counts for each model what it found for requests."""

    def __init__(self, metrics: Metrics, folder: Path, min_tokens: int):
        super().__init__(folder, min_tokens=min_tokens)
        self.metrics = metrics

    def lookup(
        self,
        fingerprint: str,
        spec: CacheSpec | str,
        ids: Tensor,
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
    ) -> tuple[CompressedCache | None, int]:
        cache, tokens = super().lookup(fingerprint, spec, ids, config, device)
        self._count("hit" if tokens else "miss", tokens)
        return cache, tokens

    def pass_over(self, reason: str) -> None:
        super().pass_over(reason)
        self._count("passed over")

    def _count(self, result: str, tokens: int = 0) -> None:
        call = current.get()
        if call is not None:  # none while a model is probed
            self.metrics.count_prefix(call.model, result, tokens)


def probe(model: PreTrainedModel) -> None:
    """Generate two tokens, and raise ValueError unless the attention worked on the cache that `wrap` makes."""
    ids = torch.ones(1, 8, dtype=torch.int64, device=model.device)
    generate: Any = model.generate
    done = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    cache = done.past_key_values
    if not isinstance(cache, CompressedCache):
        raise ValueError(f"{type(model).__name__} generates with a {type(cache).__name__}, not with a compressed cache")
    if not cache.stats()["fused"]:
        raise ValueError(f"the attention of {type(model).__name__} cannot be made to work on codes: {cache.stats()}")


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each forward pass: end it where the client has gone, and see which cache it works on."""
    call = current.get()
    if call is None:
        return
    if call.gone.is_set():
        raise RefusalError(CLOSED, "the client has closed the connection")
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        raise RuntimeError(f"{type(model).__name__} was about to work on {type(cache).__name__}, uncompressed")
    call.cache = cache


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
