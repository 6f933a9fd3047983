"""Rows to token ids, and token ids to padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from .columns import TaskRecord
from .conversations import CHAT, IGNORED, Chat
from .tables import Table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000
LENGTH = "length"
"""Column with the number of tokens of a row, which groups rows of one length and is no input of a model."""

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Tensor]]


def encode(rows: Table, tokenizer: PreTrainedTokenizerBase, task: TaskRecord) -> Dataset:
    """Turn rows that `rows_of_task` made into token ids and labels, in memory.

    Texts are cut to the task's length. A language model learns every token of a plain text and the end-of-text
    token behind it; of a conversation it learns the assistant's turns only. Its rows that have nothing left to
    learn are dropped with a warning.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes them, `length`, and `labels`: token
        ids, or a class id or a number where the rows have labels.

    Raises:
        DataError: No row is left, or a conversation cannot be encoded.
    """
    from datasets import Dataset, concatenate_datasets
    from tqdm import tqdm

    length, causal, parts = task.max_length, task.task == "causal-lm", []
    with tqdm(total=len(rows), desc="Tokenizing", unit=" rows", delay=2, leave=False, disable=None) as bar:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            batch = {name: list(rows[name][first : first + ROWS_AT_ONCE]) for name in rows.columns}
            if CHAT in batch:
                chats = (Chat(tokenizer, content, n) for n, content in enumerate(batch[CHAT], first + 1))
                encoded = [chat.encoded(length) for chat in chats]
            else:
                texts = [batch[name] for name in ("text", "text2") if name in batch]
                columns = tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=True)
                encoded = [
                    dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
                ]
                if causal:
                    eos = tokenizer.eos_token_id
                    encoded = [_with_end(row, eos, length) for row in encoded]
            bar.update(len(encoded))
            for row, label in zip(encoded, batch.get("label", ()), strict=False):
                row["labels"] = label
            if causal:  # the first token is never predicted, so its label alone teaches nothing
                encoded = [row for row in encoded if any(n != IGNORED for n in row["labels"][1:])]
            parts.append(Dataset.from_list([{**row, LENGTH: len(row["input_ids"])} for row in encoded]))
    encoded_rows = concatenate_datasets([part for part in parts if len(part)] or parts)
    n_dropped = len(rows) - len(encoded_rows)
    if n_dropped == len(rows):
        raise DataError(
            f"None of the {len(rows)} rows has a token to learn within {length} tokens. Raise --max-length; "
            'a conversation needs a turn of the role "assistant".'
        )
    if n_dropped:
        warnings.warn(
            f"{n_dropped} of {len(rows)} rows have no token to learn within {length} tokens and were "
            "dropped. Raise --max-length to keep them, or give them an answer where theirs is empty.",
            stacklevel=2,
        )
    return encoded_rows


def _with_end(row: Row, eos: int | None, max_length: int) -> Row:
    """Append the end-of-text token, unless the text was cut: its end is not where the cut is."""
    ids = row["input_ids"]
    if eos is not None and len(ids) < max_length and not (ids and ids[-1] == eos):
        end = {"input_ids": eos, "attention_mask": 1, "token_type_ids": 0}
        row = {name: [*values, end[name]] for name, values in row.items()}
    return {**row, "labels": row["input_ids"]}


def collator(tokenizer: PreTrainedTokenizerBase, task: str) -> Collate:
    """Return the function that makes a batch of encoded rows: tensors `(rows, width)`, and labels `(rows,)`
    where a row has one label. Labels of a language model are padded with -100.

    Raises:
        DataError: The tokenizer has no padding token.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if tokenizer.pad_token is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no padding token and no "
            "end-of-text token to pad with. Set tokenizer.pad_token."
        )
    pad = DataCollatorForSeq2Seq if task == "causal-lm" else DataCollatorWithPadding
    return partial(_collate, pad(tokenizer))


def _collate(pad: Callable[[list[Row]], Any], rows: list[Row]) -> dict[str, Tensor]:
    return dict(pad([{name: value for name, value in row.items() if name != LENGTH} for row in rows]))


def packed(model: PreTrainedModel, task: str, padded: Collate, rows: Dataset) -> Collate:
    """Return the function that makes a packed batch, once the model has shown that packed texts do not see each other.

    Two of the encoded rows are tried, packed and `padded`. Where a text's logits depend on what it is packed with, or
    the task is not a language model's, that is a ConfigError.
    """
    from transformers import DataCollatorWithFlattening

    if task != "causal-lm":
        raise ConfigError(
            f"packing joins the texts of a language model, and the task is {task}. Leave it out."
        )
    collate = partial(_collate, DataCollatorWithFlattening())
    model.config.use_cache = False  # with a cache, transformers does not look where a text begins
    first, second = rows[0], rows[len(rows) - 1]
    with torch.no_grad():
        alone = model(**padded([second])).logits[0]
        together = model(**collate([first, second])).logits[0, first[LENGTH] :]
    error = (together - alone).norm() / alone.norm()
    if error > (1e-3 if alone.dtype == torch.float32 else 5e-2):  # half precision rounds
        raise ConfigError(
            f"packing changes what {type(model).__name__} computes, by {error:.0%} of the logits of a text behind "
            "another: it sees the one before. Leave it out."
        )
    return collate
