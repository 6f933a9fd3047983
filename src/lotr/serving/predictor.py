"""Texts to labels and scores, or to vectors in OpenAI's form: rows of any tasks in one batch of an encoder."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ..bank.cache import LoadedTask
from ..training.tasks.served import Served
from .bodies import Embed
from .problems import Problem

_POOLING = "1_Pooling/config.json"  # where sentence-transformers keeps how tokens become one vector


@dataclass(frozen=True)
class Text:
    """One text, or a pair, in tokens, its task as it was when the text came, and whether to embed or to label it."""

    name: str
    task: LoadedTask
    inputs: dict[str, list[int]]
    embed: bool = False

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.inputs["input_ids"])


class Predictor:
    """Answers texts with a bank's tasks."""

    def __init__(self, served: Served) -> None:
        self.served, self.collate = served, served.collator()
        # on a processor as on a MiniLM there; on an accelerator a guess: calls take most of the time of a small batch
        self.call_tokens = 32 if served.model.device.type == "cpu" else 4096
        self._encoder = served.model.get_base_model().base_model  # without the head, where there is one

    def encode(
        self,
        name: str,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        cut: bool = False,
        embed: bool = False,
    ) -> list[Text]:
        """Return texts in tokens for a task, cut to its length where that is asked for.

        Where they become vectors, the task may be one of pairs, too.
        """
        task = self.served.task(name)
        takes_pairs = task.metadata.get("pairs")
        if not embed and takes_pairs is not None and takes_pairs != (pairs is not None):
            what = "pairs: send text2 (or texts2) too" if takes_pairs else "single texts: leave text2 out"
            raise Problem(422, f"Task {name!r} takes {what}.", "text2")
        most = self.served.max_length(task.metadata)
        columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.served.tokenizer(*columns, truncation=cut, max_length=most if cut else None)
        inputs = [key for key in self.served.tokenizer.model_input_names if key in encoded]
        rows = [Text(name, task, {key: encoded[key][n] for key in inputs}, embed) for n in range(len(texts))]
        for n, row in enumerate(rows, 1):
            if row.length > most:
                raise Problem(
                    422,
                    f"Text {n} has {row.length} tokens, and task {name!r} takes {most}. Send less, or "
                    '"truncate": true to cut it.',
                    "text",
                    "text_too_long",
                )
        return rows

    def run(self, texts: Sequence[Text]) -> Iterator[tuple[int, Any]]:
        """Yield number and prediction, or vector, of each text."""
        for answers, embed in ((self._predictions, False), (self.vectors, True)):
            rows = [n for n, text in enumerate(texts) if text.embed == embed]
            if rows:
                yield from zip(rows, answers([texts[n] for n in rows]), strict=True)

    def _predictions(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        logits = (
            self._call(self.served.model, texts, self._inputs(texts)).logits.float().cpu()
        )  # (rows, labels)
        return [_prediction(text.task, own) for text, own in zip(texts, logits, strict=True)]

    def vectors(self, texts: Sequence[Text]) -> Tensor:  # (rows, width)
        """Return the mean over the tokens of each text, of length 1, as sentence-transformers' MiniLM does."""
        inputs = self._inputs(texts)
        hidden = self._call(self._encoder, texts, inputs).last_hidden_state.float()  # (rows, tokens, width)
        mask = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()

    def _inputs(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        device = self.served.model.device
        return {name: x.to(device) for name, x in self.collate([text.inputs for text in texts]).items()}

    def _call(self, model: Any, texts: Sequence[Text], inputs: dict[str, Tensor]) -> Any:
        with torch.inference_mode(), self.served.rows.use([text.task for text in texts]):
            return model(**inputs)


def _prediction(task: LoadedTask, logits: Tensor) -> dict[str, Any]:  # (labels,)
    """Return what a task says of one text: a value, or its most likely label and the probability of each."""
    if task.kind == "regression":
        return {"value": float(logits[0])}
    known = int((logits > torch.finfo(logits.dtype).min).sum())  # the heads of other rows may have more
    labels = task.labels or tuple(map(str, range(known)))
    scores = torch.softmax(logits[: len(labels)], -1).tolist()
    return {"label": labels[scores.index(max(scores))], "scores": dict(zip(labels, scores, strict=True))}


def check_pooling(base: nn.Module) -> None:
    """Raise a problem unless the base model was trained to embed by the mean of its tokens."""
    config: Any = base.config
    if type(base.base_model).__name__ not in (config.architectures or ()):
        trained_as = ", ".join(config.architectures or ("something else",))
        raise Problem(404, f"This bank's base model is no embedding model, but {trained_as}.")
    pooling = _pooling(config._name_or_path)
    if pooling != ["mean"]:
        raise Problem(
            404, f"This bank's base model pools by {' and '.join(pooling)}; only the mean is served."
        )


@lru_cache
def _pooling(source: str) -> list[str]:
    """Return how a model pools, in the older or the newer form of its file; the mean where it does not tell."""
    local = Path(source) / _POOLING if Path(source).is_dir() else try_to_load_from_cache(source, _POOLING)
    if not isinstance(local, str | Path) or not Path(local).is_file():
        return ["mean"]
    content = json.loads(Path(local).read_text(encoding="utf-8"))
    modes = content.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, used in content.items()
        if name.startswith("pooling_mode_") and used
    ]
    return [modes] if isinstance(modes, str) else list(modes)


def in_openai_form(asked: Embed, vectors: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    """Return the answer; base64 is of little-endian float32."""

    def encoded(vector: Tensor) -> str | list[float]:
        if asked.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": n, "embedding": encoded(v)} for n, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}
