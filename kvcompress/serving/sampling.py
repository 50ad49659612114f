"""What one request of a batch may say about how its tokens are drawn, and how that is said to transformers' batches."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from kvcompress.serving.refusal import RefusalError

#: Fields of a GenerationConfig that a request of a batch has for itself, or that change nothing of its tokens.
OWN = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "use_cache",
        "transformers_version",
        "_from_model_config",
    }
)


def defaults(config: GenerationConfig) -> GenerationConfig:
    """Of a batch whose every request says its own: values that let transformers make the three processors at all."""
    found = copy.deepcopy(config)
    found.do_sample, found.temperature, found.top_k, found.top_p = True, 0.5, 1, 0.5
    found.eos_token_id = -1 if config.eos_token_id is None else config.eos_token_id
    return found


def options(config: GenerationConfig, model: PreTrainedModel, seeded: bool) -> dict[str, Any]:
    """Of `add_request`, for a request's config; seeded: whether it names a seed.

    Greedy search is the likeliest token left alone (top_p of 0). Raises RefusalError (400) for a setting that the rows
    of a batch cannot differ in.
    """
    usual, empty = model.generation_config.to_dict(), GenerationConfig().to_dict()
    asked = {
        name: value
        for name, value in config.to_dict().items()
        if name not in OWN and value is not None and value not in (usual.get(name), empty.get(name))
    }
    if asked:
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(asked.items()))
        raise RefusalError(400, f"with continuous batching a request cannot have {said}", param="generation_config")
    if seeded and config.do_sample:
        message = "with continuous batching the tokens of all requests are drawn together, so no seed repeats one"
        raise RefusalError(400, message, param="seed")
    words = int(model.config.get_text_config(decoder=True).vocab_size)
    found: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
    if config.do_sample:
        found["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        found["top_k"] = min(config.top_k or words, words)
        found["top_p"] = 1.0 if config.top_p is None else float(config.top_p)
    return found | {"eos_token_id": config.eos_token_id}
