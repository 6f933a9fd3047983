"""Conversations in the layouts that people have them in, all read as OpenAI's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_files import write
from lotr.errors import DataError
from lotr.training.data import Columns, TaskRecord, load_task, rows_of_task
from lotr.training.data.tables import Table

ASKED = {"role": "user", "content": "a b"}
TALK = [ASKED, {"role": "assistant", "content": "c"}]
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}  # as OpenAI writes it


def read(rows: list[dict[str, Any]], need_label: bool = True, text: str = "text") -> list[dict[str, Any]]:
    """Return the conversations of some rows."""
    table = replace(Table.from_rows(rows), name="here")
    needed = rows_of_task(table, TaskRecord("causal-lm", columns=Columns(text=text)), need_label)
    return list(needed["messages"])


LAYOUTS = {
    "OpenAI": ({"messages": TALK}, TALK),
    "OpenAI, content in parts": (
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "a "}, {"text": "b"}]}]},
        TALK[:1],
    ),
    "OpenAI, tools": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALLED]}]},
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "ShareGPT, system apart": (
        {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}], "system": "s"},
        [SYSTEM, *TALK],
    ),
    "ShareGPT, tools": (
        {"conversations": [{"from": "function_call", "value": "f"}, {"from": "observation", "value": "1"}]},
        [{"role": "assistant", "content": "f"}, {"role": "tool", "content": "1"}],
    ),
    "Alpaca, capitals and no input": ({"Instruction": "a b", "Output": "c"}, TALK),
    "Alpaca, input, system and history": (
        {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["a b", "c"]]},
        [SYSTEM, *TALK, {"role": "user", "content": "a\n\nb"}, TALK[1]],
    ),
    "Dolly": ({"instruction": "a b", "context": None, "response": "c"}, TALK),
    "prompt and completion of turns": ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    "a number as completion": (
        {"prompt": "a b", "completion": 4},
        [ASKED, {"role": "assistant", "content": "4"}],
    ),
    "a history of turns": ({"prompt": "a b", "completion": "c", "history": TALK}, [*TALK, *TALK]),
}


@pytest.mark.parametrize(("row", "turns"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_people_have_is_read_as_openais(row: dict, turns: list) -> None:
    assert read([row])[0]["messages"] == turns


@pytest.mark.parametrize(
    "row",
    [
        {"messages": 5, "system": "s"},
        {"prompt": TALK[:1], "completion": 5},
        {"prompt": "a b", "completion": "c", "history": 7},
        {"prompt": "a b", "completion": "c", "history": [5]},
        {"prompt": "a b", "completion": "c", "history": ["hello", "world"]},
        *(
            {"messages": [{**TALK[1], "tool_calls": calls}]}
            for calls in (["f"], 5, "call", [{"function": "f"}])
        ),
    ],
    ids=str,
)
def test_what_is_no_turn_is_refused_with_its_row(row: dict) -> None:
    good = {"messages": TALK, "system": "s"} if "messages" in row else {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=r"do not: 2 "):
        read([good, row])


def test_tools_are_kept_as_each_row_has_them() -> None:
    tools = [[{"name": "f", "parameters": {"x": "int"}}], '[{"name": "g"}]', None]
    rows = [{"messages": TALK, "tools": own} for own in tools]
    assert [row["tools"] for row in read(rows)] == [tools[0], [{"name": "g"}], None]


def test_a_question_alone_is_enough_to_predict() -> None:
    assert read([{"prompt": "a b"}], need_label=False)[0]["messages"] == TALK[:1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": TALK}, {"messages": []}],
            r'"messages" of here must hold a list of .* rows do not: 2 ',
        ),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], r"must hold a list of .* do not: 1 "),
        ([{"messages": [{"speaker": "x", "line": "y"}]}], r"row 1 holds \[{'speaker': 'x', 'line': 'y'}\]"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
            r"row 1 holds .*'image_url'",
        ),
        ([{"prompt": " ", "completion": "c"}], r'Column "prompt" of here must hold a question .* do not: 1 '),
        (
            [{"dialog": [{"speaker": "x", "line": "y"}], "id": 7}],
            r'no column "text"; its columns are: dialog \(a list of objects with speaker, line\), id\..*ShareGPT',
        ),
    ],
)
def test_what_is_not_understood_says_what_it_looks_like(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(rows)


def test_conversations_are_recognised_without_being_told(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "input": "", "output": str(n)} for n in range(20)]
    data = load_task(write(tmp_path, "alpaca.json", json.dumps(rows)))
    assert (data.task.task, len(data.train), len(data.eval)) == ("causal-lm", 18, 2)
    assert 'Conversations are in "instruction", "input", "output"' in data.reason
