"""Scores of predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data.conversations import IGNORED

#: The number that a task is judged by.
MAIN = {"classification": "accuracy", "regression": "pearson", "causal-lm": "loss"}


def measure(
    task: str,
    scores: np.ndarray,  # (n, classes), logits; of a regression (n,) or (n, 1)
    labels: np.ndarray,  # (n,), class ids or numbers
) -> dict[str, float]:
    """Return accuracy, macro F1 and Matthews correlation; or Pearson and Spearman correlation and mean squared error.

    A side of a regression that is constant correlates with nothing.
    """
    if task == "regression":
        return _regression(scores.reshape(-1).astype(float), labels.reshape(-1).astype(float))
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted, labels = scores.argmax(-1), labels.astype(int)
    with warnings.catch_warnings():  # few rows may all have one label, of which the coefficient is zero
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(labels, predicted)),
        }


def _regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import rankdata

    mse = float(np.mean((scores - labels) ** 2))
    if scores.std() == 0 or labels.std() == 0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    pearson, spearman = np.corrcoef(scores, labels), np.corrcoef(rankdata(scores), rankdata(labels))
    return {"pearson": float(pearson[0, 1]), "spearman": float(spearman[0, 1]), "mse": mse}


def perplexity(loss: float) -> float:
    """Return the exponential of a loss, which is never infinite."""
    return math.exp(min(loss, 700.0))


def token_losses(logits: Any, labels: Tensor) -> Tensor:  # (rows, tokens, vocabulary), (rows, tokens)
    """Return the summed loss of each row and how many tokens it is of, `(rows, 2)`, instead of the logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = [
        F.cross_entropy(row[:-1].float(), own[1:], reduction="sum")
        for row, own in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(sums), (labels[:, 1:] != IGNORED).sum(1)], 1)


def for_trainer(task: str) -> Callable[[Any], dict[str, float]]:
    """Return the function that transformers' Trainer calls; of a language model it is given `token_losses`.

    It measures the loss too, in place of the Trainer's own: that one is a mean over processes, of which the last may
    have seen rows twice to fill its batch, and of batches, of which a short text's tokens weigh more.
    """

    def of_tokens(output: Any) -> dict[str, float]:
        total, tokens = output.predictions.astype(float).sum(0)
        return {"loss": float(total / max(tokens, 1))}

    def of_outputs(output: Any) -> dict[str, float]:
        scores, labels = output.predictions, output.label_ids
        result = measure(task, scores, labels)
        if task == "regression":
            return result | {"loss": result["mse"]}
        targets = torch.from_numpy(labels.reshape(-1)).long()
        return result | {"loss": float(F.cross_entropy(torch.from_numpy(scores).double(), targets))}

    return of_tokens if task == "causal-lm" else of_outputs
