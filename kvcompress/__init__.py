"""kvcompress: hold a very long context on one GPU by compressing a model's KV cache to about three bits an element.

Its use::

    model = kvcompress.wrap(AutoModelForCausalLM.from_pretrained(...), "trellis3")
    model.generate(...)
"""

from kvcompress import models
from kvcompress.cache import CompressedCache
from kvcompress.generation import unwrap, wrap
from kvcompress.memory import MemoryReport
from kvcompress.planning import Plan, plan
from kvcompress.prefixes import PrefixStore
from kvcompress.spec import DEFAULT_SPEC, CacheSpec, CodecSpec, LayerSpec
from kvcompress.tiers import Offload

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SPEC",
    "CacheSpec",
    "CodecSpec",
    "CompressedCache",
    "LayerSpec",
    "MemoryReport",
    "Offload",
    "Plan",
    "PrefixStore",
    "models",
    "plan",
    "unwrap",
    "wrap",
]
