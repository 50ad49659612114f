"""What a request's body must be, beyond the names of its fields, which transformers checks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcompress.serving.refusal import RefusalError

Tokens = Field(default=None, ge=1)


class Body(BaseModel):
    """What all kinds of requests have in common; other fields pass."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    generation_config: str | None = None
    max_tokens: int | None = Tokens
    max_completion_tokens: int | None = Tokens
    max_output_tokens: int | None = Tokens

    @property
    def bounded(self) -> bool:
        """Whether it says how many tokens are wanted at most."""
        said = (self.max_tokens, self.max_completion_tokens, self.max_output_tokens, self.generation_config)
        return any(x is not None for x in said)


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class Chat(Body):
    messages: list[Message] = Field(min_length=1)
    stop: str | list[str] | None = None


class Completion(Body):
    prompt: str = Field(min_length=1)
    stop: str | list[str] | None = None


class Response(Body):
    input: str | list[dict[str, Any]] = Field(min_length=1)


def check(kind: type[Body], body: dict[str, Any]) -> Body:
    """The body as read; raises RefusalError (400) that says what is wrong where."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong)
        raise RefusalError(400, said, param=str(wrong[0]["loc"][0])) from error
