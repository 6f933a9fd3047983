"""Rows of data: where they come from, their columns, tokens and batches."""

from .columns import Columns, Task, chat_column, check_task
from .encode import collator, encode
from .load import TaskData, load_rows, load_task, read

__all__ = [
    "Columns",
    "Task",
    "TaskData",
    "chat_column",
    "check_task",
    "collator",
    "encode",
    "load_rows",
    "load_task",
    "read",
]
