"""Bodies of requests: what clients may send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from .problems import Problem

Whole = Annotated[str, AfterValidator(lambda text: text.encode() and text)]  # no half of a character
NotEmpty = Annotated[str, StringConstraints(min_length=1)]
#: What may be one text or several; unlike a union it names what is wrong by its place.
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Text = str | list[dict[str, Any]]  # or the turns of a conversation


class Closed(BaseModel):
    """A field that might change the answer and is not known here is refused; null is as if it were left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}


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

    model: Whole
    input: Annotated[list[NotEmpty], OneOrMore]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Asked(Closed):
    """What completions and chats have."""

    model: Whole
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    temperature: float = Field(1.0, ge=0, le=2)
    stop: Annotated[list[NotEmpty], Field(max_length=4), OneOrMore] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # what many clients send though it changes nothing
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    store: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, sent: Any) -> Any:
        if isinstance(sent, dict) and sent.get("max_tokens", ...) == sent.get("max_completion_tokens"):
            return {name: value for name, value in sent.items() if name != "max_completion_tokens"}
        return sent


class Completion(Asked):
    """Texts that are to be continued."""

    prompt: Annotated[list[Whole], OneOrMore]
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    def prompts(self) -> Sequence[Text]:
        return self.prompt


class Part(Closed):
    """A piece of a message."""

    type: Literal["text"]
    text: Whole


class Turn(Closed):
    """A message of a conversation."""

    role: NotEmpty
    content: Annotated[
        list[Part], BeforeValidator(lambda c: [{"type": "text", "text": c}] if isinstance(c, str) else c)
    ]
    name: Whole | None = None

    def as_template_takes(self) -> dict[str, str]:
        own = {"role": self.role, "content": "".join(part.text for part in self.content)}
        return own if self.name is None else {**own, "name": self.name}


class Chat(Asked):
    """A conversation that is to be answered."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] = "none"
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    def prompts(self) -> Sequence[Text]:
        return [[turn.as_template_takes() for turn in self.messages]]
