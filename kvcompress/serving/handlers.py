"""transformers' request handlers, that check what they are given and answer 4xx for what the client got wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from kvcompress.serving import bodies
from kvcompress.serving.call import current
from kvcompress.serving.refusal import RefusalError

if TYPE_CHECKING:
    from transformers.cli.serving.utils import BaseHandler

    Base = BaseHandler
else:
    Base = object


class Checked(Base):
    """Before a handler of transformers in the order of bases. kind: what the body must be."""

    kind: type[bodies.Body]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Raises RefusalError for what cannot be answered."""
        read = bodies.check(self.kind, body)
        body.setdefault("stream", False)  # as OpenAI has it; transformers streams responses where nothing is said
        if self.model_manager.force_model is None and not read.model:
            raise RefusalError(
                400, "the request names no model, and this server was started without one", param="model"
            )
        call = current.get()
        if call is not None:
            call.bounded, call.seeded = read.bounded, read.seed is not None
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except RefusalError:
            raise
        except (ValueError, KeyError, TypeError, TemplateError) as error:
            if call is not None and call.admitted:
                raise  # the prompt was made and fits: no fault of the request
            raise RefusalError(400, f"no prompt can be made of the request: {type(error).__name__}: {error}") from error


class Chat(Checked, ChatCompletionHandler):
    kind = bodies.Chat


class Completions(Checked, CompletionHandler):
    kind = bodies.Completion


class Responses(Checked, ResponseHandler):
    kind = bodies.Response
