"""Rows of data: where they come from, their columns, tokens and batches."""

from .columns import Columns, TaskRecord, rows_of_task
from .encode import collator, encode
from .load import TaskData, load_task, read

__all__ = ["Columns", "TaskData", "TaskRecord", "collator", "encode", "load_task", "read", "rows_of_task"]
