"""Bodies of requests: what clients may send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from .problems import Problem

NotEmpty = Annotated[str, StringConstraints(min_length=1)]
#: What may be one text or several; unlike a union it names what is wrong by its place.
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Text = str | list[dict[str, Any]]  # or the turns of a conversation


class Closed(BaseModel):
    """A field that might change the answer and is not known here is refused."""

    model_config = ConfigDict(extra="forbid")


class Texts(Closed):
    """What is to be labelled: one text or several; a second one each where the task takes pairs."""

    text: NotEmpty | None = None
    text2: NotEmpty | None = None
    texts: list[NotEmpty] | None = None
    texts2: list[NotEmpty] | None = None
    truncate: bool = False

    def columns(self) -> tuple[list[str], list[str] | None]:
        """Return the texts, and the second of each."""
        firsts = self.texts if self.text is None else [self.text]
        seconds = self.texts2 if self.text2 is None else [self.text2]
        both = (self.text, self.texts), (self.text2, self.texts2)
        if not firsts or any(None not in pair for pair in both):
            raise Problem(422, "Send one of text and texts (and of text2 and texts2), not empty.", "text")
        if seconds is not None and len(seconds) != len(firsts):
            raise Problem(422, f"{len(firsts)} texts and {len(seconds)} second texts are no pairs.", "texts2")
        return firsts, seconds


class Embed(Closed):
    """Texts that are to become vectors."""

    model: str
    input: Annotated[list[NotEmpty], OneOrMore]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Asked(Closed):
    """What completions and chats have."""

    model: str
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    temperature: float = Field(1.0, ge=0, le=2)
    stop: Annotated[list[NotEmpty], Field(max_length=4), OneOrMore] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    user: str | None = None


class Completion(Asked):
    """Texts that are to be continued."""

    prompt: Annotated[list[str], OneOrMore]

    def prompts(self) -> Sequence[Text]:
        return self.prompt


class Part(Closed):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Turn(Closed):
    """A message of a conversation."""

    role: NotEmpty
    content: Annotated[
        list[Part], BeforeValidator(lambda c: [{"type": "text", "text": c}] if isinstance(c, str) else c)
    ]
    name: str | None = None


class Chat(Asked):
    """A conversation that is to be answered."""

    messages: Annotated[list[Turn], Field(min_length=1)]

    def prompts(self) -> Sequence[Text]:
        turns = ((turn.role, "".join(part.text for part in turn.content)) for turn in self.messages)
        return [[{"role": role, "content": content} for role, content in turns]]
