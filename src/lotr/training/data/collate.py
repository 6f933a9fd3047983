"""Encoded rows to padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .columns import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that takes no part in the loss, as in `torch.nn.CrossEntropyLoss`."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest; see `collator`.

    Attributes:
        fill: What each column is padded with.
        on_left: Whether the padding stands before the tokens.
        real_labels: Whether labels are real numbers.
        multiple: The width is a multiple of this.
    """

    fill: dict[str, int]
    on_left: bool
    real_labels: bool
    multiple: int

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Return the batch of `rows`."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        batch = {
            name: torch.tensor([self._padded(row[name], width, fill) for row in rows])
            for name, fill in self.fill.items()
            if name in rows[0]
        }
        if "labels" in rows[0] and "labels" not in batch:
            dtype = torch.float32 if self.real_labels else torch.int64
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=dtype)
        return batch

    def _padded(self, values: list[int], width: int, fill: int) -> list[int]:
        padding = [fill] * (width - len(values))
        return padding + list(values) if self.on_left else list(values) + padding


def collator(
    tokenizer: PreTrainedTokenizerBase, task: Task, pad_to_multiple_of: int | None = None
) -> Collator:
    """Return the function that makes a batch of encoded rows.

    Args:
        tokenizer: Gives the padding token, or else the end-of-text token in its place, and the side.
        task: What is learned; labels of a language model are padded with -100.
        pad_to_multiple_of: Round the width up. Some accelerators are faster with 8; default: no rounding.

    Returns:
        A function from a list of rows to tensors of shape (rows, width), and labels of shape (rows,) where
        a row has one label. It can be pickled, for worker processes.

    Raises:
        DataError: The tokenizer has neither of the two tokens.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no padding token and no "
            "end-of-text token to pad with. Set tokenizer.pad_token."
        )
    fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id}
    if task == "causal-lm":
        fill["labels"] = IGNORED
    return Collator(fill, tokenizer.padding_side == "left", task == "regression", pad_to_multiple_of or 1)
