"""The model card of an adapter: how to use it, with and without this library, and how it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADING = "## How to use"

_USAGE = f"""{_HEADING}

An adapter of the `lotr` package, `ΔW = σ·U·C·Vᵀ`. PEFT loads it once `lotr` is imported:

```python
import lotr  # registers the method with PEFT; must come before loading
from peft import AutoPeftModel{{auto}}

model = AutoPeftModel{{auto}}.from_pretrained("path/or/hub-id/of/this/adapter"{{more}})
```

Whoever cannot install `lotr` can use {{exit}}.
"""

_AUTO = {
    "SEQ_CLS": "ForSequenceClassification",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}

_EXITS = {
    True: "the same update as PEFT's LoRA, which is exact: `lotr export path/of/this/adapter --output lora-folder`",
    False: "a plain model with the update merged in: `lotr merge path/of/this/adapter --output model-folder`",
}

_ON_BASIS = """
The file holds cores alone. Their factors are those of the adapter `{name}`, hash `{hash}`: it has to lie where
`adapter_config.json` says, or in a folder of that name beside this one. `LotrConfig(basis_copy=True)` makes files that
stand alone.
"""

_RESULTS = """\
Trained on `{settings[train]}` ({task[task]}, {rows[train]:,} rows, {steps} steps, seed {seed}) with `lotr train`.

- {trained_numbers[adapter]:,} trained numbers in the adapter, {trained_numbers[head]:,} in the head
- {adapter_bytes:,} bytes on disk
{rates_of_parts}
{labels}| metric ({rows[eval]} rows) | value |
|---|---|
{scores}
"""


@dataclass(frozen=True)
class Card:
    """What a model card tells of an adapter."""

    method: str  # row of the table of methods, or the name of a method of PEFT's
    base_model: str | None = None
    task_type: str | None = None  # PEFT's, which names the class to load with
    has_lora_form: bool = True
    n_labels: int = 0  # of a new head, which the base model is loaded with
    basis: tuple[str, str] | None = None  # path or hub id, and hash, of the adapter that the file refers to
    is_lotr: bool = True
    ranks: Sequence[tuple[int, int]] = ()  # `(k, r)` of its modules, each once
    targets: Sequence[str] = ()  # names of the adapted modules, each once

    def usage(self) -> str:
        """Return the section that says how the adapter is loaded.

        Example:
            >>> "AutoPeftModelForCausalLM" in Card("lotr", task_type="CAUSAL_LM").usage()
            True
        """
        if not self.is_lotr:
            return ""
        more = f", num_labels={self.n_labels}" if self.n_labels else ""
        text = _USAGE.replace("{auto}", _AUTO.get(str(self.task_type), ""))
        text = text.replace("{exit}", _EXITS[self.has_lora_form]).replace("{more}", more)
        if self.basis is None:
            return text
        name, digest = self.basis
        shown = Path(name).name if Path(name).is_dir() else name  # no folder of the machine it was made on
        return text + _ON_BASIS.format(name=shown, hash=digest)

    def text(self, results: str = "") -> str:
        """Return the whole card, with the front matter that the hub reads; equal adapters have equal cards."""
        base = f" for {self.base_model}" if self.base_model else ""
        front = f"base_model: {self.base_model}\n" if self.base_model else ""
        ranks = ", ".join(str(k) if k == r else f"({k}, {r})" for k, r in self.ranks)
        targets = ", ".join(f"`{name}`" for name in self.targets)
        adapted = f"Rank {ranks}, on {targets}." if targets else ""
        sections = [part for part in (adapted, results.strip(), self.usage().strip()) if part]
        tags = dict.fromkeys([*(["lotr"] if self.is_lotr else []), self.method, "peft"])
        return (
            f"---\n{front}library_name: peft\ntags: [{', '.join(tags)}]\n---\n\n"
            f"# {self.method} adapter{base}\n\n" + "\n\n".join(sections) + "\n"
        )


def update_card(folder: Path, card: Card) -> None:
    """Put a card in the place of PEFT's empty template; a card that someone wrote gets the usage alone, once."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if "# Model Card for Model ID" in text:
        path.write_text(card.text(), encoding="utf-8")
    elif _HEADING not in text:
        path.write_text(f"{text.rstrip()}\n\n{card.usage()}", encoding="utf-8")


def results(report: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """Return the section of a card on how an adapter was trained and how it scores, from what `metrics.json` holds.

    `rates` are the learning rates of the parts that trained.
    """
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(report["eval"].items()))
    labels = report["task"]["labels"]
    named = f"Labels: {', '.join(labels)}.\n\n" if labels else ""
    shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    listed = f"- learning rates: {shown}\n" if shown else ""
    return _RESULTS.format(labels=named, scores=table, rates_of_parts=listed, **report)
