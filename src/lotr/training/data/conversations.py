"""Conversations: from the layouts that people have them in to token ids, with a loss on the answers only."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .tables import SURROGATE, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "messages"
#: The label of a token that takes no part in the loss, as in `torch.nn.CrossEntropyLoss`.
IGNORED = -100
LAYOUTS = (
    "OpenAI's messages, ShareGPT's conversations, Alpaca's instruction, input and output, or prompt "
    "and completion"
)

_TURNS = (CHAT, "conversations", "conversation")
_PAIRS = (
    {"question": "instruction", "context": "input", "answer": "output"},
    {"question": "instruction", "context": "context", "answer": "response"},
    {"question": "prompt", "answer": "completion"},
    {"question": "prompt", "answer": "response"},
)
_BESIDE = ("system", "history", "tools")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_columns(table: Table, text: str = "text", need_answer: bool = True) -> dict[str, str]:
    """Return which columns hold the turns of conversations, or else question and answer; nothing where none do.

    `text` is the column of turns that the user named, where it is not the usual one; to predict needs no answers.
    """
    columns: dict[str, str] = {}
    is_named = text != "text"
    for name in (text,) if is_named else (*_TURNS, text):
        column = table.find(name)
        if not columns and column and isinstance(table.sample(column), list):
            columns = {"turns": column}
    for parts in () if is_named or table.find(text) else _PAIRS:
        pair = {part: column for part, name in parts.items() if (column := table.find(name))}
        if not columns and "question" in pair and ("answer" in pair or not need_answer):
            columns = pair
    beside = {name: column for name in _BESIDE if (column := table.find(name))}
    return columns and {**columns, **beside}


def conversation(parts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the columns that `chat_columns` found as `messages` and `tools` of OpenAI's layout, if understood."""
    turns = parts["turns"] if "turns" in parts else _turns_of_pair(parts)
    if not isinstance(turns, list):
        return None
    if parts.get("system"):
        turns = [{"role": "system", "content": parts["system"]}, *turns]
    read = [_turn(turn) for turn in turns]
    if not read or None in read:
        return None
    return {"messages": read, "tools": _parsed(parts.get("tools"))}


def _turns_of_pair(parts: dict[str, Any]) -> list[Any] | None:
    question, context, answer = (parts.get(name) for name in ("question", "context", "answer"))
    if isinstance(question, list):  # both are turns
        return [*question, *(answer or [])] if isinstance(answer or [], list) else None
    text = "\n\n".join(str(part) for part in (question, context) if str(part or "").strip())
    history = parts.get("history") or []
    turns: list[Any] = []
    for before in history if isinstance(history, list) else [None]:
        if isinstance(before, list | tuple):  # a question and its answer
            roles = ("user", "assistant")
            turns += [{"role": role, "content": said} for role, said in zip(roles, before, strict=False)]
        else:
            turns.append(before)
    turns.append({"role": "user", "content": text or None})
    if "answer" in parts:
        turns.append({"role": "assistant", "content": "" if answer is None else answer})
    return turns


def _turn(turn: Any) -> dict[str, Any] | None:
    """Return a turn with a text as `content`, its parts joined; `None` if it is not understood."""
    if not isinstance(turn, dict):
        return None
    turn = _without_none(turn)
    role, content = turn.pop("from", None), turn.pop("value", None)
    role, content = turn.pop("role", role), turn.pop("content", content)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    calls = turn.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return None
        # templates want arguments as an object, OpenAI writes it as JSON
        function["arguments"] = _parsed(function.get("arguments"))
    content = "" if content is None and calls else content
    if not isinstance(role, str) or not role or content is None or SURROGATE.search(str(content)):
        return None
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": str(content or ""), **turn}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else _without_none(value)
    except json.JSONDecodeError:
        return value


@dataclass(frozen=True)
class Chat:
    """A conversation, and the tokenizer whose chat template it is rendered with."""

    tokenizer: PreTrainedTokenizerBase
    content: dict[str, Any]  # what `conversation` made of a row
    row: int  # its number, for messages

    def encoded(self, max_length: int) -> dict[str, list[Any]]:
        """Return the first `max_length` tokens, and `labels`.

        A template that marks answers with `{% generation %}` says itself what is learned. With any other, the
        tokens of an answer are those between the prompt for it and the end of its turn, which is checked. Answers
        that are empty, or have the weight 0, are not learned.

        Raises:
            DataError: The tokenizer has no chat template, the template refuses the conversation, or the answers
                cannot be told from the rest.
        """
        encoded = self._rendered()
        ids = encoded["input_ids"]
        # slow tokenizers do not know which token a character went to
        is_marked = self.tokenizer.is_fast and _GENERATION_TAG.search(self.tokenizer.get_chat_template())
        marked = self._marked() if is_marked else None
        mask = list(marked or [0] * len(ids))
        for number, turn in enumerate(self.content["messages"]):
            learned = turn.get("weight") != 0 and bool(turn["content"].strip() or turn.get("tool_calls"))
            # to be learned and not marked yet, or marked and not to be learned
            if turn["role"] == "assistant" and learned != bool(marked):
                span = self._span(number, ids)
                mask[span] = [int(learned)] * len(mask[span])
        encoded["labels"] = [token if taught else IGNORED for token, taught in zip(ids, mask, strict=True)]
        return {name: values[:max_length] for name, values in encoded.items()}

    def prompt(self) -> str:
        """Return the text that asks for an answer to the last question (DataError where there is none)."""
        questions = [n for n, turn in enumerate(self.content["messages"], 1) if turn["role"] != "assistant"]
        if not questions:
            raise DataError(f"Row {self.row} holds only answers; there is nothing to answer to. Drop it.")
        text: str = self._applied(questions[-1], tokenize=False, add_generation_prompt=True)
        return text

    def _applied(self, turns: int | None = None, **options: Any) -> Any:
        """Apply the template to the first turns; `None` takes all."""
        from jinja2 import TemplateError

        messages = [
            {key: value for key, value in turn.items() if key != "weight"}
            for turn in self.content["messages"][:turns]
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.content["tools"] or None, **options
            )
        except (TemplateError, ValueError) as error:  # ValueError: there is no template
            roles = ", ".join(turn["role"] for turn in messages)
            raise DataError(
                f"Row {self.row}: this conversation cannot be written ({error}). Its roles are: {roles}. Mend or drop "
                "the row; or use an instruction-tuned model, set tokenizer.chat_template, or give plain texts and name "
                "their column with --text."
            ) from error

    def _rendered(self, turns: int | None = None, **options: Any) -> dict[str, list[Any]]:
        options.setdefault("tokenizer_kwargs", {"return_attention_mask": True})
        return dict(self._applied(turns, tokenize=True, return_dict=True, **options))

    def _marked(self) -> list[int] | None:
        """Return 1 for the tokens that the template marks; None where the tokenizer's offsets have gaps.

        transformers finds the marked tokens by their characters. At a character without a token, such as a
        blank that the offsets leave out, it silently marks nothing, or all the rest.
        """
        options = {"return_offsets_mapping": True}
        encoded = self._rendered(return_assistant_tokens_mask=True, tokenizer_kwargs=options)
        offsets = [(0, 0), *encoded["offset_mapping"]]
        has_gaps = any(after[0] > before[1] for before, after in itertools.pairwise(offsets))
        return None if has_gaps else encoded["assistant_masks"]

    def _span(self, turn: int, ids: list[int]) -> slice:
        """Return where the tokens of an answer stand: between the prompt for it and the end of its turn."""
        if turn == 0:
            raise DataError(
                f"Row {self.row} starts with an answer, and the chat template does not mark answers with "
                "{% generation %}: there is no prompt to tell it from. Put a user turn before it."
            )
        prompt = self._rendered(turn, add_generation_prompt=True)["input_ids"]
        through = self._rendered(turn + 1)["input_ids"]
        if ids[: len(through)] != through or through[: len(prompt)] != prompt:
            raise DataError(
                f"Row {self.row}: with this chat template the tokens up to turn {turn + 1} change when the answer "
                "or later turns follow, so the answer's tokens cannot be told from the rest. Set a "
                "tokenizer.chat_template with {% generation %} around the answers, or give rows of one "
                "question and one answer."
            )
        return slice(len(prompt), len(through))
