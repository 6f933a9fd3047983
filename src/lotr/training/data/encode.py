"""Rows to token ids, and token ids to batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .chat import chat_encoder
from .collate import IGNORED, collator
from .columns import (
    Columns,
    Task,
    chat_column,
    check_classes,
    check_columns,
    check_numbers,
    label_values,
    to_number,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["collator", "encode"]

BATCH = 1000
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MASKS = MODEL_INPUTS[1:]

Row = dict[str, Any]


def encode(
    dataset: Dataset,
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
        dataset: Rows with the columns that the task needs.
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
    source = "the data set"
    check_columns(dataset, columns, with_labels and task != "causal-lm", source, chat=task == "causal-lm")
    if task == "causal-lm":
        conversations = chat_column(dataset, columns)
        encoder = _language_encoder(tokenizer, conversations, columns, max_length, with_labels)
        return _encode_batches(dataset.select_columns(conversations or columns.text), encoder, max_length)
    targets: list[Any] | None = None
    if with_labels and task == "classification":
        check_classes(dataset, columns, labels, source, "the model")
        ids = {name: index for index, name in enumerate(labels)}
        targets = [ids[name] for name in label_values(dataset, columns)]
    elif with_labels:
        check_numbers(dataset, columns, source)
        targets = [to_number(value) for value in dataset[columns.label][:]]
    texts = [name for name in (columns.text, columns.text2) if name in dataset.column_names]
    encoder = _text_encoder(tokenizer, columns, max_length, targets)
    return _encode_batches(dataset.select_columns(texts), encoder, max_length)


Encoder = Callable[[dict[str, list[Any]], int], list[Row]]
"""Takes a batch of columns and the index of its first row; gives one encoded row each."""


def _text_encoder(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int, targets: list[Any] | None
) -> Encoder:
    def rows(batch: dict[str, list[Any]], first: int) -> list[Row]:
        pairs = batch.get(columns.text2)
        encoded = tokenizer(
            batch[columns.text], pairs, truncation=True, max_length=max_length, return_attention_mask=True
        )
        made = _by_row(encoded)
        if targets is not None:
            for row, target in zip(made, targets[first : first + len(made)], strict=True):
                row["labels"] = target
        return made

    return rows


def _language_encoder(
    tokenizer: PreTrainedTokenizerBase,
    conversations: str | None,
    columns: Columns,
    max_length: int,
    with_labels: bool,
) -> Encoder:
    def texts(batch: dict[str, list[Any]], first: int) -> list[Row]:
        encoded = tokenizer(
            batch[columns.text], truncation=True, max_length=max_length, return_attention_mask=True
        )
        made = [_ended(row, tokenizer.eos_token_id, max_length) for row in _by_row(encoded)]
        return [{**row, "labels": list(row["input_ids"])} for row in made] if with_labels else made

    if conversations is None:
        return texts
    encode_chat = chat_encoder(tokenizer, with_labels)

    def chats(batch: dict[str, list[Any]], first: int) -> list[Row]:
        numbered = enumerate(batch[conversations], start=first + 1)
        made = [encode_chat(turns, number) for number, turns in numbered]
        return [{name: values[:max_length] for name, values in row.items()} for row in made]

    return chats


def _by_row(encoded: Any) -> list[Row]:
    names = [name for name in MODEL_INPUTS if name in encoded]
    return [
        dict(zip(names, values, strict=True)) for values in zip(*(encoded[n] for n in names), strict=True)
    ]


def _ended(row: Row, eos: int | None, max_length: int) -> Row:
    """Append the end-of-text token, unless the text was cut: its end is not where the cut is."""
    ids = row["input_ids"]
    if eos is None or len(ids) >= max_length or (ids and ids[-1] == eos):
        return row
    extra = {"input_ids": eos, "attention_mask": 1, "token_type_ids": 0}
    return {name: [*values, extra[name]] for name, values in row.items()}


def _encode_batches(dataset: Dataset, encoder: Encoder, max_length: int) -> Dataset:
    from datasets import Dataset, concatenate_datasets
    from tqdm import tqdm

    parts = []
    n_rows = n_kept = 0
    with tqdm(total=len(dataset), desc="Tokenizing", unit=" rows", delay=2, leave=False, disable=None) as bar:
        for first in range(0, len(dataset), BATCH):
            made = encoder(dataset[first : first + BATCH], first)
            kept = [{**row, "length": len(row["input_ids"])} for row in made if _teaches(row)]
            n_rows, n_kept = n_rows + len(made), n_kept + len(kept)
            if kept:
                columns = {name: [row[name] for row in kept] for name in kept[0]}
                parts.append(Dataset.from_dict(columns, features=_features(columns)))
            bar.update(len(made))
    if not parts:
        raise DataError(
            f"None of the {n_rows} rows has a token to learn within {max_length} tokens. Raise --max-length; "
            'a conversation needs a turn of the role "assistant".'
        )
    if n_kept < n_rows:
        warnings.warn(
            f"{n_rows - n_kept} of {n_rows} rows have no token to learn within {max_length} tokens and were "
            "dropped; raise --max-length to keep them.",
            stacklevel=3,
        )
    return concatenate_datasets(parts)


def _teaches(row: Row) -> bool:
    labels = row.get("labels")
    # the first token is never predicted, so its label alone teaches nothing
    return not isinstance(labels, list) or any(label != IGNORED for label in labels[1:])


def _features(columns: dict[str, list[Any]]) -> Any:
    from datasets import Features, Sequence, Value

    def feature(name: str, example: Any) -> Any:
        if isinstance(example, list):
            return Sequence(Value("int8" if name in MASKS else "int32"))
        return Value("float32" if isinstance(example, float) else "int64")

    return Features({name: feature(name, values[0]) for name, values in columns.items()})
