"""Completions and chats as OpenAI's API has them: what is asked, and the form of the answers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints

from .decoder import Continuation

NotEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Asked(BaseModel):
    """What both have; a field that would change the answer and is not here is refused."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    temperature: float = Field(1.0, ge=0, le=2)
    stop: NotEmpty | Annotated[list[NotEmpty], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts to stop at."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with the numbers of tokens."""
        return (self.stream_options or {}).get("include_usage", False)


class Completion(_Asked):
    """Texts that are to be continued."""

    prompt: str | list[str]

    def prompts(self) -> Sequence[str | list[dict[str, Any]]]:
        """Return each."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: NotEmpty
    content: str | list[Part]
    name: str | None = None


class Chat(_Asked):
    """A conversation that is to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]

    def prompts(self) -> Sequence[str | list[dict[str, Any]]]:
        """Return the one conversation."""
        turns = [(m.role, m.content) for m in self.messages]
        joined = [(r, c if isinstance(c, str) else "".join(part.text for part in c)) for r, c in turns]
        return [[{"role": role, "content": content} for role, content in joined]]


class Form:
    """The answers to one request in OpenAI's form.

    Args:
        asked: The request.
    """

    def __init__(self, asked: Completion | Chat) -> None:
        self.chat = isinstance(asked, Chat)
        name, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.chunk_name = f"{name}.chunk" if self.chat else name
        self.head: dict[str, Any] = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": name}
        self.head |= {"created": int(time.time()), "model": asked.model}

    def whole(self, answers: Sequence[Continuation], prompt_tokens: int) -> dict[str, Any]:
        """Return everything at once."""
        choices = [self._choice(n, answer.text, answer.reason, "message") for n, answer in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": usage(answers, prompt_tokens)}

    def piece(self, index: int, text: str, reason: str | None = None) -> bytes:
        """Return one piece of a stream."""
        return event({**self._chunk(), "choices": [self._choice(index, text, reason, "delta")]})

    def total(self, answers: Sequence[Continuation], prompt_tokens: int) -> bytes:
        """Return the piece that tells how many tokens there were."""
        return event({**self._chunk(), "choices": [], "usage": usage(answers, prompt_tokens)})

    def _chunk(self) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_name}

    def _choice(self, index: int, text: str, reason: str | None, key: str) -> dict[str, Any]:
        own = {key: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **own, "finish_reason": reason, "logprobs": None}


def event(content: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    return f"data: {json.dumps(content)}\n\n".encode()


def usage(answers: Sequence[Continuation], prompt_tokens: int) -> dict[str, int]:
    """Return how many tokens were read and written."""
    written = sum(answer.tokens for answer in answers)
    total = prompt_tokens + written
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": total}
