"""Scores of predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

#: The number that a task is judged by.
MAIN = {"classification": "accuracy", "regression": "pearson", "causal-lm": "loss"}


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation.

    Args:
        scores: Logits, shape `(n, classes)`.
        labels: Class ids, shape `(n,)`.

    Returns:
        Scores by name.

    Example:
        >>> classification(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1]))["accuracy"]
        1.0
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = scores.argmax(-1)
    with warnings.catch_warnings():  # few rows may all have one label, of which the coefficient is zero
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(labels, predicted)),
        }


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count rows by true and predicted class, shape `(classes, classes)`."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, scores.argmax(-1), labels=range(scores.shape[-1]))


def regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error; a constant side correlates with nothing.

    Args:
        scores: Predictions, shape `(n,)` or `(n, 1)`.
        labels: Targets, shape `(n,)`.

    Returns:
        Scores by name.

    Example:
        >>> round(regression(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))["pearson"], 6)
        1.0
    """
    from scipy.stats import rankdata

    scores, labels = scores.reshape(-1).astype(float), labels.reshape(-1).astype(float)
    return {
        "pearson": _correlation(scores, labels),
        "spearman": _correlation(rankdata(scores), rankdata(labels)),
        "mse": float(np.mean((scores - labels) ** 2)),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def for_trainer(task: str) -> Callable[[Any], dict[str, float]] | None:
    """Return the function that transformers' Trainer calls, or `None` where the loss says it all.

    It measures the loss too, in place of the Trainer's own: that one is a mean over processes, of which the last may
    have seen rows twice to fill its batch.
    """
    if task == "classification":
        return lambda output: {
            **classification(output.predictions, output.label_ids),
            "loss": _cross_entropy(output.predictions, output.label_ids),
        }
    if task == "regression":
        return lambda output: (
            (scores := regression(output.predictions, output.label_ids)) | {"loss": scores["mse"]}
        )
    return None


def _cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    targets = torch.from_numpy(labels.reshape(-1)).long()
    return float(F.cross_entropy(torch.from_numpy(scores).double(), targets))
