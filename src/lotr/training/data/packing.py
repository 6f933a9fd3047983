"""Batches without padding: their texts one behind the other in a single row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError
from .encode import LENGTH

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Collate = Callable[[list[Any]], Any]


def packed(model: PreTrainedModel, task: str, padded: Collate, rows: Dataset) -> Collate:
    """Return the function that makes a packed batch, once the model has shown that packed texts do not see each other.

    Args:
        model: A language model.
        task: Of the run.
        padded: Makes a batch with padding.
        rows: Encoded rows, of which two are tried.

    Raises:
        ConfigError: The task is another, or a text's logits depend on what it is packed with.
    """
    from transformers import DataCollatorWithFlattening

    if task != "causal-lm":
        raise ConfigError(
            f"packing joins the texts of a language model, and the task is {task}. Leave it out."
        )
    flatten = DataCollatorWithFlattening()

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        return dict(flatten([{name: v for name, v in row.items() if name != LENGTH} for row in batch]))

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
