"""Rows to token ids, and token ids to padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .chat import IGNORED, encode_chat
from .columns import Columns, Task, chat_column, check_rows, label_values

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Row = dict[str, Any]


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    columns: Columns,
    labels: Sequence[str],
    max_length: int,
    with_labels: bool = True,
) -> Dataset:
    """Turn rows into token ids and labels.

    Texts are cut to `max_length`. A language model learns every token of a plain text and the end-of-text
    token behind it; of a conversation it learns the assistant's turns only.

    Args:
        rows: Rows with the columns that the task needs.
        tokenizer: The model's tokenizer; for conversations it needs a chat template.
        task: What is learned.
        columns: Names of the columns.
        labels: Names of the classes in the order of their ids.
        max_length: The most tokens of a row.
        with_labels: Whether to make labels. Without them no row is dropped.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes them, `labels` (a class id, a
        number or token ids) and `length`, in memory. Rows of a language model that have nothing left to
        learn are dropped with a warning.

    Raises:
        DataError: A column or value does not fit the task, or a conversation cannot be encoded.
    """
    from datasets import Dataset, concatenate_datasets
    from tqdm import tqdm

    check_rows(rows, columns, task, "the data set", labels, need_label=with_labels)
    conversations = chat_column(rows, columns) if task == "causal-lm" else None
    names = [conversations or columns.text]
    if task != "causal-lm" and columns.text2 in rows.column_names:
        names.append(columns.text2)
    targets: list[Any] | None = None
    if with_labels and task == "classification":
        ids = {name: index for index, name in enumerate(labels)}
        targets = [ids[name] for name in label_values(rows, columns)]
    elif with_labels and task == "regression":
        targets = [float(value) for value in rows[columns.label][:]]
    texts = rows.select_columns(names)
    parts = []
    n_dropped = 0
    with tqdm(total=len(rows), desc="Tokenizing", unit=" rows", delay=2, leave=False, disable=None) as bar:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            batch = texts[first : first + ROWS_AT_ONCE]
            if conversations:
                numbered = enumerate(batch[conversations], start=first + 1)
                encoded: list[Row] = [
                    encode_chat(tokenizer, turns, n, max_length, with_labels) for n, turns in numbered
                ]
            else:
                encoded = _encode_texts(tokenizer, [batch[name] for name in names], max_length)
            if task == "causal-lm" and not conversations:
                encoded = [_with_end(row, tokenizer.eos_token_id, max_length, with_labels) for row in encoded]
            for n, row in enumerate(encoded, start=first):
                row["length"] = len(row["input_ids"])
                if targets is not None:
                    row["labels"] = targets[n]
            taught = [row for row in encoded if _teaches(row)]
            n_dropped += len(encoded) - len(taught)
            if taught:
                parts.append(Dataset.from_dict({name: [row[name] for row in taught] for name in taught[0]}))
            bar.update(len(encoded))
    if not parts:
        raise DataError(
            f"None of the {len(rows)} rows has a token to learn within {max_length} tokens. Raise --max-length; "
            'a conversation needs a turn of the role "assistant".'
        )
    if n_dropped:
        warnings.warn(
            f"{n_dropped} of {len(rows)} rows have no token to learn within {max_length} tokens and were "
            "dropped; raise --max-length to keep them.",
            stacklevel=2,
        )
    return concatenate_datasets(parts)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], max_length: int) -> list[Row]:
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=True)
    names = [name for name in MODEL_INPUTS if name in encoded]
    return [{name: encoded[name][n] for name in names} for n in range(len(texts[0]))]


def _with_end(row: Row, eos: int | None, max_length: int, with_labels: bool) -> Row:
    """Append the end-of-text token, unless the text was cut: its end is not where the cut is."""
    ids = row["input_ids"]
    if eos is not None and len(ids) < max_length and not (ids and ids[-1] == eos):
        end = {"input_ids": eos, "attention_mask": 1, "token_type_ids": 0}
        row = {name: [*values, end[name]] for name, values in row.items()}
    return {**row, "labels": row["input_ids"]} if with_labels else row


def _teaches(row: Row) -> bool:
    labels = row.get("labels")
    # the first token is never predicted, so its label alone teaches nothing
    return not isinstance(labels, list) or any(label != IGNORED for label in labels[1:])


def collator(tokenizer: PreTrainedTokenizerBase, task: Task) -> Callable[[list[Row]], dict[str, Tensor]]:
    """Return the function that makes a batch of encoded rows.

    Args:
        tokenizer: Gives the padding token, or else the end-of-text token in its place, and the side.
        task: What is learned; labels of a language model are padded with -100.

    Returns:
        A function from a list of rows to tensors of shape (rows, width), and labels of shape (rows,) where
        a row has one label. It can be pickled, for worker processes.

    Raises:
        DataError: The tokenizer has neither of the two tokens.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no padding token and no "
                "end-of-text token to pad with. Set tokenizer.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    pad = DataCollatorForSeq2Seq if task == "causal-lm" else DataCollatorWithPadding
    return partial(_collate, pad(tokenizer))


def _collate(pad: Callable[[list[Row]], Any], rows: list[Row]) -> dict[str, Tensor]:
    return dict(pad([{name: row[name] for name in row if name in (*MODEL_INPUTS, "labels")} for row in rows]))
