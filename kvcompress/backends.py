"""Who computes attention over a compressed history: a backend, chosen for every call, with a reason where one refuses.

`torch` is the reference and takes everything. `triton` works on packed codes on GPUs (or, with TRITON_INTERPRET=1, in
Triton's interpreter, for tests). KVCOMPRESS_BACKEND forces one; what it refuses still goes to `torch`, is logged once
for each reason and counted in `cache.stats()`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from kvcompress import reference
from kvcompress.codecs import Codec, Coded, Fit
from kvcompress.history import History
from kvcompress.reference import Mask, Scores
from kvcompress.registry import Registry

logger = logging.getLogger(__name__)

VARIABLE = "KVCOMPRESS_BACKEND"


class Backend(Protocol):
    """A way to attend and to encode; whoever calls it has asked `unavailable` and `rejects` first."""

    @property
    def name(self) -> str: ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None where it can."""

    def rejects(self, query: Tensor, history: History | None, mask: Mask, scores: Scores) -> str | None:
        """Why it cannot attend queries [B, H*G, Q, D] over this history; None where it can."""

    def attend(
        self, query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores
    ) -> Tensor:
        """As `reference.attend`."""

    def encode(self, codec: Codec, side: int, pages: Tensor, fit: Fit) -> Coded | str:
        """As `codec.encode`, for pages [n, H, PAGE, D] of one side; or why it cannot."""


class Reference:
    """The torch reference."""

    name = "torch"

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def rejects(self, query: Tensor, history: History | None, mask: Mask, scores: Scores) -> str | None:
        return None

    def attend(
        self, query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores
    ) -> Tensor:
        return reference.attend(query, history, key, value, mask, scores)

    def encode(self, codec: Codec, side: int, pages: Tensor, fit: Fit) -> Coded | str:
        return codec.encode(pages, fit)


BACKENDS: Registry[Backend] = Registry("backend", "kvcompress.backends")
BACKENDS.register("torch")(Reference())


@lru_cache
def _import_triton() -> str | None:
    """Make the `triton` backend known; why it cannot be, where Triton is missing."""
    try:
        from kvcompress.fused import Triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    BACKENDS.register("triton")(Triton())
    return None


def choose(device: torch.device) -> tuple[Backend, str | None]:
    """The backend for tensors on a device, and why it is not the one that was asked for, or that a GPU would take.

    Raises ValueError where KVCOMPRESS_BACKEND names none.
    """
    asked = os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else "torch")
    if asked == "torch":
        return BACKENDS["torch"], None
    missing = _import_triton()  # before an unknown name is answered with the known ones
    if asked == "triton" and missing:
        return BACKENDS["torch"], missing
    backend = BACKENDS[asked]
    reason = backend.unavailable(device)
    return (backend, None) if reason is None else (BACKENDS["torch"], reason)


def attend(
    query: Tensor, history: History | None, key: Tensor, value: Tensor, mask: Mask, scores: Scores,
    counts: Counter[str],
) -> Tensor:  # fmt: skip
    """`reference.attend` by the backend that is due; refusals are counted."""
    backend, reason = choose(query.device)
    if reason is None:
        reason = backend.rejects(query, history, mask, scores)
    if reason is not None:
        refused(reason, counts)
        backend = BACKENDS["torch"]
    return backend.attend(query, history, key, value, mask, scores)


def encode(counts: Counter[str], codec: Codec, side: int, pages: Tensor, fit: Fit) -> Coded:
    """`codec.encode` of pages [n, H, PAGE, D] by the backend that is due; refusals are counted."""
    backend, _ = choose(pages.device)  # that it is not available, `attend` counts
    coded = backend.encode(codec, side, pages, fit)
    if isinstance(coded, str):
        refused(f"encoding: {coded}", counts)
        coded = codec.encode(pages, fit)
    return coded


_said: set[str] = set()


def refused(reason: str, counts: Counter[str]) -> None:
    """Count a refusal, and log the first one of its reason."""
    counts[f"refused: {reason}"] += 1
    if reason not in _said:
        _said.add(reason)
        logger.warning("the kernels refuse, and the torch reference steps in: %s", reason)
