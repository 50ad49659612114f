"""How long greedy decoding from a filled cache stays on the uncompressed model's path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedModel

from benchmarks.caches import Contender


@torch.inference_mode()
def trajectory(
    model: PreTrainedModel,
    contender: Contender,
    cache: Cache,
    first: int,
    tokens: int,
    expected: Sequence[int] | None = None,
) -> list[int]:
    """At most `tokens` token ids: `first`, then the model's own choices, each fed back into the cache, which grows.

    expected: stop after the first id that differs from it (which is the last of the result then).
    """
    path = [first][:tokens]
    with contender.attending(model):
        while len(path) < tokens and (expected is None or path[-1] == expected[len(path) - 1]):
            ids = torch.tensor([path[-1:]], device=model.device)
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            path.append(int(logits[0, -1].argmax()))
    return path


def agreed(path: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens of `path` before the first that differs from `expected`."""
    same = [a == b for a, b in zip(path, expected, strict=False)]
    return same.index(False) if False in same else len(same)
