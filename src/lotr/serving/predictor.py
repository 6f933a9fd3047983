"""Texts to labels and scores: rows of any tasks in one batch of an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training.base_model import text_length
from ..training.data.encode import MODEL_INPUTS
from ..training.tasks.served import Served
from .catalog import Catalog, Entry
from .problems import Problem

_ATTEMPTS = 5


@dataclass(frozen=True)
class Text:
    """One text, or a pair, in tokens."""

    task: str
    inputs: dict[str, list[int]]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.inputs["input_ids"])


class Predictor:
    """Answers texts with a bank's tasks.

    Args:
        served: The bank on its base model.
        catalog: What its tasks are now.
    """

    def __init__(self, served: Served, catalog: Catalog) -> None:
        self.served, self.catalog = served, catalog
        self.collate = served.collator()
        self._version: object = None
        self._longest = text_length(served.model, str(served.bank.base_model), None)

    def encode(self, task: str, texts: Sequence[str], pairs: Sequence[str] | None, cut: bool) -> list[Text]:
        """Return texts in tokens.

        Args:
            task: The task that they are for.
            texts: The texts.
            pairs: The second text of each, where the task takes pairs.
            cut: Whether to cut what is too long, as in training.

        Raises:
            UnknownTaskError: There is no such task.
            Problem: A text is too long, or there should be two.
        """
        entry = self.catalog.get(task)
        takes_pairs = entry.metadata.get("pairs")
        if takes_pairs is not None and takes_pairs != (pairs is not None):
            what = "pairs: send text2 (or texts2) too" if takes_pairs else "single texts: leave text2 out"
            raise Problem(422, f"Task {task!r} takes {what}.", "text2")
        most = int(entry.metadata.get("max_length", self._longest))
        columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.served.tokenizer(*columns, truncation=cut, max_length=most if cut else None)
        names = [name for name in MODEL_INPUTS if name in encoded]
        rows = [Text(task, {name: encoded[name][n] for name in names}) for n in range(len(texts))]
        for n, row in enumerate(rows):
            if row.length > most:
                raise Problem(
                    422,
                    f"Text {n + 1} has {row.length} tokens, and task {task!r} takes {most}. Send less, or truncate: "
                    "true to cut it as in training.",
                    "text",
                    "text_too_long",
                )
        return rows

    def run(self, texts: Sequence[Text]) -> Iterable[tuple[int, Any]]:
        """Return number and prediction of each text, or the error of that row alone.

        A task may be replaced at any moment: a row whose task changed while the batch ran is run again.
        """
        answers: list[Any] = [None] * len(texts)
        rows = list(range(len(texts)))
        for _ in range(_ATTEMPTS):
            before = self._entries(texts, rows, answers)
            self._follow()
            logits = self.logits([texts[row] for row in before])
            for row, own in zip(before, logits, strict=True):
                answers[row] = prediction(before[row], own)
            after = self._entries(texts, before, answers)
            rows = [row for row in after if after[row] != before[row]]
            if not rows:
                return enumerate(answers)
        for row in rows:
            answers[row] = Problem(503, f"Task {texts[row].task!r} is being written all the time. Try again.")
        return enumerate(answers)

    def _follow(self) -> None:
        """Forget numbers in memory once the bank was written."""
        version = self.served.bank.store.version()
        if version != self._version:
            self.served.rows.slab.forget()
            self._version = version

    def _entries(
        self, texts: Sequence[Text], rows: Sequence[int] | dict[int, Entry], answers: list[Any]
    ) -> dict[int, Entry]:
        """Return the entries of the rows' tasks now; rows without one get their error for an answer."""
        entries = {}
        for row in rows:
            try:
                entries[row] = self.catalog.get(texts[row].task)
            except Exception as error:
                answers[row] = error
        return entries

    def logits(self, texts: Sequence[Text]) -> Tensor:  # (rows, labels)
        """Return what the model says of texts, each by its task."""
        if not texts:
            return torch.empty(0, 0)
        model = self.served.model
        inputs = {k: v.to(model.device) for k, v in self.collate([text.inputs for text in texts]).items()}
        with torch.inference_mode():
            output: Tensor = model(**inputs, task_ids=[text.task for text in texts]).logits
        return output.float().cpu()


def prediction(task: Entry, logits: Tensor) -> dict[str, Any]:  # (labels,)
    """Return what a task says of one text: a value, or its most likely label and the probability of each."""
    if task.kind == "regression":
        return {"value": float(logits[0])}
    labels = task.labels or tuple(
        str(n) for n, value in enumerate(logits) if value > torch.finfo(logits.dtype).min
    )
    scores = torch.softmax(logits[: len(labels)], -1).tolist()
    return {"label": labels[scores.index(max(scores))], "scores": dict(zip(labels, scores, strict=True))}
