"""Texts to labels and scores: rows of any tasks in one batch of an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints
from torch import Tensor

from ..bank.cache import LoadedTask
from ..training.base_model import text_length
from ..training.tasks.served import Served
from .problems import Problem

NotEmpty = Annotated[str, StringConstraints(min_length=1)]


class Texts(BaseModel):
    """What is to be labelled: one text or several; a second one each where the task takes pairs."""

    model_config = ConfigDict(extra="forbid")
    text: NotEmpty | None = None
    text2: NotEmpty | None = None
    texts: list[NotEmpty] | None = None
    texts2: list[NotEmpty] | None = None
    truncate: bool = False

    def columns(self, most: int) -> tuple[list[str], list[str] | None]:
        """Return the texts, and the second of each.

        Raises:
            Problem: They are none, too many, or do not go together.
        """
        firsts = self.texts if self.text is None else [self.text]
        seconds = self.texts2 if self.text2 is None else [self.text2]
        both = (self.text, self.texts), (self.text2, self.texts2)
        if not firsts or any(None not in pair for pair in both):
            raise Problem(422, "Send one of text and texts (and of text2 and texts2), not empty.", "text")
        if seconds is not None and len(seconds) != len(firsts):
            raise Problem(422, f"{len(firsts)} texts and {len(seconds)} second texts are no pairs.", "texts2")
        if len(firsts) > most:
            raise Problem(422, f"{len(firsts)} texts are more than the {most} of one request.", "texts")
        return firsts, seconds


@dataclass(frozen=True)
class Text:
    """One text, or a pair, in tokens, and its task as it was when the text came."""

    name: str
    task: LoadedTask
    inputs: dict[str, list[int]]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.inputs["input_ids"])


class Predictor:
    """Answers texts with a bank's tasks."""

    def __init__(self, served: Served) -> None:
        self.served, self.collate = served, served.collator()
        self._longest = text_length(served.model, str(served.bank.base_model), None)

    def encode(self, name: str, texts: Sequence[str], pairs: Sequence[str] | None, cut: bool) -> list[Text]:
        """Return texts in tokens.

        Args:
            name: The task that they are for.
            texts: The texts.
            pairs: The second text of each, where the task takes pairs.
            cut: Whether to cut what is too long, as in training.

        Raises:
            UnknownTaskError: There is no such task.
            CheckpointError: It is damaged.
            Problem: A text is too long, or there should be two.
        """
        (task,) = self.served.rows.find([name])
        assert task is not None
        takes_pairs = task.metadata.get("pairs")
        if takes_pairs is not None and takes_pairs != (pairs is not None):
            what = "pairs: send text2 (or texts2) too" if takes_pairs else "single texts: leave text2 out"
            raise Problem(422, f"Task {name!r} takes {what}.", "text2")
        most = int(task.metadata.get("max_length", self._longest))
        columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.served.tokenizer(*columns, truncation=cut, max_length=most if cut else None)
        inputs = [key for key in self.served.tokenizer.model_input_names if key in encoded]
        rows = [Text(name, task, {key: encoded[key][n] for key in inputs}) for n in range(len(texts))]
        for n, row in enumerate(rows, 1):
            if row.length > most:
                raise Problem(
                    422,
                    f"Text {n} has {row.length} tokens, and task {name!r} takes {most}. Send less, or "
                    '"truncate": true to cut it as in training.',
                    "text",
                    "text_too_long",
                )
        return rows

    def run(self, texts: Sequence[Text]) -> Iterable[tuple[int, dict[str, Any]]]:
        """Yield number and prediction of each text."""
        logits = self.logits(texts)
        return enumerate(prediction(text.task, own) for text, own in zip(texts, logits, strict=True))

    def logits(self, texts: Sequence[Text]) -> Tensor:  # (rows, labels)
        """Return what the model says of texts, each by its task."""
        model = self.served.model
        inputs = {k: v.to(model.device) for k, v in self.collate([text.inputs for text in texts]).items()}
        with torch.inference_mode(), self.served.rows.use([text.task for text in texts]):
            logits: Tensor = model(**inputs).logits
        return logits.float().cpu()


def prediction(task: LoadedTask, logits: Tensor) -> dict[str, Any]:  # (labels,)
    """Return what a task says of one text: a value, or its most likely label and the probability of each."""
    if task.kind == "regression":
        return {"value": float(logits[0])}
    known = int((logits > torch.finfo(logits.dtype).min).sum())  # the heads of other rows may have more
    labels = task.labels or tuple(map(str, range(known)))
    scores = torch.softmax(logits[: len(labels)], -1).tolist()
    return {"label": labels[scores.index(max(scores))], "scores": dict(zip(labels, scores, strict=True))}
