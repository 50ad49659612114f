"""What one request of a batch may say about how its tokens are drawn, and how that is said to transformers' batches."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from kvcompress.serving.refusal import RefusalError

logger = logging.getLogger(__name__)

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


#: Temperatures below it are greedy search: logits divided by 1e-38 are infinite in float32, and nothing can be drawn.
COLDEST = 1e-5


def defaults(config: GenerationConfig) -> GenerationConfig:
    """Of a batch whose every request says its own: values that let transformers make the three processors at all.

    What else a model brings along, such as a repetition penalty, is left out, which is logged.
    """
    found, empty = copy.deepcopy(config), GenerationConfig().to_dict()
    others = {
        name: value
        for name, value in config.to_dict().items()
        if name not in OWN and value not in (None, False, empty.get(name))
    }
    if others:
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(others.items()))
        logger.warning("the model's generation config has %s, which continuous batching goes without", said)
    for name in others:
        setattr(found, name, empty.get(name))
    found.do_sample, found.temperature, found.top_k, found.top_p = True, 0.5, 1, 0.5
    found.eos_token_id = -1 if config.eos_token_id is None else config.eos_token_id
    return found


def options(config: GenerationConfig, model: PreTrainedModel, seeded: bool) -> dict[str, Any]:
    """Of `add_request`, for a request's config; seeded: whether it names a seed.

    Greedy search is the likeliest token left alone (top_p of 0). Raises RefusalError (400) for a setting that the rows
    of a batch cannot differ in, and for one that is no number or none of its range: a row whose tokens cannot be drawn
    would fail those of all others.
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
    found: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "top_p": 0.0, "eos_token_id": _ends(config.eos_token_id)}
    if not config.do_sample:
        return found
    temperature = _number(config, "temperature", 1.0)
    top_k = _number(config, "top_k", 0)
    top_p = _number(config, "top_p", 1.0)
    if top_p > 1 or top_k != int(top_k):
        raise RefusalError(
            400, f"top_p is at most 1 and top_k whole, got {top_p} and {top_k}", param="generation_config"
        )
    if temperature >= COLDEST:
        found |= {"temperature": temperature, "top_k": min(int(top_k) or words, words), "top_p": top_p}
    return found


def _number(config: GenerationConfig, name: str, unsaid: float) -> float:
    """A setting as a float; raises RefusalError (400) for what is no finite number from zero on."""
    given = getattr(config, name)
    if given is None:
        return unsaid
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
        message = f"{name} is a finite number, zero or more, got {given!r}"
        raise RefusalError(400, message, param="generation_config")
    return float(given)


def _ends(given: Any) -> list[int] | None:
    """The tokens that end an answer, None for the model's own; raises RefusalError (400) for what are no tokens."""
    if given is None:
        return None
    ends = given if isinstance(given, list) else [given]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ends):
        message = f"eos_token_id is a token or a list of tokens, got {given!r}"
        raise RefusalError(400, message, param="generation_config")
    return ends
