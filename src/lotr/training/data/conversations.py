"""Conversations in the layouts that people have them in: OpenAI's, ShareGPT's, Alpaca's, prompt and completion."""

from __future__ import annotations

import json
from typing import Any

from .tables import Table

CHAT = "messages"
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

Turns = list[dict[str, Any]]


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


def conversation(parts: dict[str, Any]) -> str | None:
    """Return the values of the columns that `chat_columns` found as JSON in OpenAI's layout; `None` if not understood.

    As JSON, since a column of Arrow gives every turn, and every tool, the keys of all.
    """
    turns = parts["turns"] if "turns" in parts else _turns_of_pair(parts)
    if parts.get("system"):
        turns = [{"role": "system", "content": parts["system"]}, *(turns or [])]
    read = [_turn(turn) for turn in turns or ()]
    if not read or None in read:
        return None
    return json.dumps({"messages": read, "tools": _parsed(parts.get("tools"))}, ensure_ascii=False)


def _turns_of_pair(parts: dict[str, Any]) -> Turns:
    question, context, answer = (parts.get(name) for name in ("question", "context", "answer"))
    if isinstance(question, list):  # both are turns
        return [*question, *(answer or ())]
    text = "\n\n".join(str(part) for part in (question, context) if str(part or "").strip())
    turns = [
        turn for pair in parts.get("history") or () for turn in zip(("user", "assistant"), pair, strict=False)
    ]
    turns.append(("user", text or None))
    if "answer" in parts:
        turns.append(("assistant", "" if answer is None else answer))
    return [{"role": role, "content": content} for role, content in turns]


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
    for call in calls:  # templates want arguments as an object, OpenAI writes it as JSON
        function = call.get("function", call)
        function["arguments"] = _parsed(function.get("arguments"))
    if not isinstance(role, str) or not role or (content is None and not calls):
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
