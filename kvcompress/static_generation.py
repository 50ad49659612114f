"""`wrap(model, static=True)`: how `generate` comes to decode statically.

transformers' own loop runs, with its processors, criteria and streamers: only the call of the model in it is another.
Where a model is to be compiled for decoding, `generate` asks `_valid_auto_compile_criteria` whether and
`get_compiled_call` for what to call instead; a `Session` answers there. (A callable given as `custom_generate` would be
told of neither streamer nor synced_gpus.)

As long as codecs wait to be fitted, or no page is closed, steps are ordinary ones. What static decoding does not take
goes on in the ordinary way, is logged once and counted in `cache.stats()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvcompress.cache import CompressedCache

if TYPE_CHECKING:
    from kvcompress.static_model import StaticModel

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ATTRIBUTE = "_kvcompress_session"  # of the copy of a generation config that one call of generate works with
#: What a decode step of generate is given; anything else is more than static decoding knows of.
INPUTS = frozenset(
    {"input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}
)

_current: ContextVar[Session | None] = ContextVar("kvcompress_session", default=None)


class Session:
    """One call of `generate`: what it calls instead of the model, ordinary until `begin` and until pages are closed.

    cache: may be exchanged until then, where a prefill goes on from a stored prefix.
    """

    def __init__(self, model: Any, cache: CompressedCache):
        self._model, self.cache = model, cache
        self._columns: int | None = None  # that the cache may come to have; None before the prefill is done
        self._static: StaticModel | None = None

    def begin(self, tokens: int) -> None:
        """From here on every call is a decode step, of which `tokens` may come."""
        self._columns = self.cache.get_seq_length() + tokens

    def close(self) -> None:
        """Give the cache back as it would be after ordinary decoding."""
        self._columns = None
        if self._static is not None:
            self._static.close()
            self._static = None

    def __call__(self, **inputs: Any) -> Any:
        logits = None if self._columns is None else self._logits(inputs)
        if logits is None:
            return self._model(**inputs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    def _logits(self, inputs: dict[str, Any]) -> Tensor | None:
        """Of a static step; None where an ordinary one is due."""
        from kvcompress.static_model import StaticModel, StaticRefusalError, refuses, waits

        try:
            if self._static is None:
                reason = _unknown(inputs) or refuses(self._model, self.cache)
                if reason is not None:
                    raise StaticRefusalError(reason)
                if waits(self.cache) is not None:
                    return None
                self._static = self._taken_over(StaticModel, inputs)
            return self._static.step(inputs["input_ids"])
        except StaticRefusalError as error:
            self.cache.refuse_static(str(error))
            self.close()
            return None

    def _taken_over(self, kind: type[StaticModel], inputs: dict[str, Any]) -> StaticModel:
        from kvcompress.static_model import StaticRefusalError, compressed_layers

        history = compressed_layers(self.cache)[0].history
        assert history is not None
        assert self._columns is not None
        pads = history.pads
        mask = inputs.get("attention_mask")
        if mask is not None:
            hidden = [int((mask[row, pad:] == 0).sum()) for row, pad in enumerate(pads)]
            if any(hidden):
                raise StaticRefusalError("static decoding takes no mask but that of left padding")
        return kind(self._model, self.cache, self._columns - min(pads), inputs["position_ids"])


def _unknown(inputs: dict[str, Any]) -> str | None:
    more = sorted(name for name, x in inputs.items() if name not in INPUTS and x is not None and x is not False)
    if more:
        return f"a model that is also given {', '.join(more)}"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        return "a mask that is not of two dimensions"
    return "no position_ids" if inputs.get("position_ids") is None else None


def prepare(model: Any, generation_config: Any, mode: GenerationMode, cache: CompressedCache) -> None:
    """Let a call of generate decode statically, or count why it does not."""
    reason = None
    if mode not in MODES or generation_config.is_assistant:
        reason = f"generation by {'an assistant' if generation_config.is_assistant else mode.value}"
    elif generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        reason = "attentions or hidden states to be returned"
    else:
        reason = _missing()
    if reason is None:
        setattr(generation_config, _ATTRIBUTE, Session(model, cache))
    else:
        cache.refuse_static(reason)


def _missing() -> str | None:
    try:
        import kvcompress.static_model  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def session_of(generation_config: Any) -> Session | None:
    """The session of the call of generate that works with this config."""
    session: Session | None = getattr(generation_config, _ATTRIBUTE, None)
    return session


def valid_auto_compile_criteria(model: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """In the place of a model's: True where `get_compiled_call` is to give the session."""
    session = session_of(generation_config)
    _current.set(session)
    if session is not None:
        return True
    return bool(type(model)._valid_auto_compile_criteria(model, model_kwargs, generation_config))


def get_compiled_call(model: Any, compile_config: Any) -> Callable[..., Any]:
    """In the place of a model's: the session, where there is one."""
    session = _current.get()
    call: Callable[..., Any] = session or type(model).get_compiled_call(model, compile_config)
    return call


@contextmanager
def optimize_model_for_decode(model: Any) -> Iterator[None]:
    """In the place of a model's, which the loop of decode steps runs in: when that ends the cache is given back."""
    session = _current.get()
    try:
        with type(model)._optimize_model_for_decode(model):
            yield
    finally:
        _current.set(None)
        if session is not None:
            session.close()
