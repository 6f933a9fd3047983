"""The words of a model card: how to use an adapter, with and without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEADING = "## How to use"

USAGE = f"""{_HEADING}

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
    True: "the same update as a plain LoRA, which is exact: `lotr export path/of/this/adapter --output lora-folder`",
    False: "a plain model with the update merged in: `lotr merge path/of/this/adapter --output model-folder`",
}


_ON_BASIS = """
The file holds cores alone. Their factors are those of the adapter `{name}`, hash `{hash}`: it has to lie where
`adapter_config.json` says, or in a folder of that name beside this one. `LotrConfig(basis_copy=True)` makes files that
stand alone.
"""


def usage(
    task_type: str | None,
    additive: bool = True,
    n_labels: int = 0,
    basis: tuple[str, str | None] | None = None,
) -> str:
    """Return the section that says how an adapter is loaded.

    Args:
        task_type: PEFT's task type, which names the class to load with.
        additive: Whether the adapter only adds to the weight, so that a LoRA can hold it.
        n_labels: Size of a new head, which the base model is loaded with.
        basis: Path or hub id, and hash, of the adapter that the file refers to.

    Returns:
        Markdown.

    Example:
        >>> "AutoPeftModelForCausalLM" in usage("CAUSAL_LM")
        True
    """
    more = f", num_labels={n_labels}" if n_labels else ""
    text = USAGE.replace("{auto}", _AUTO.get(str(task_type), ""))
    text = text.replace("{exit}", _EXITS[additive]).replace("{more}", more)
    if basis is None:
        return text
    name, found = basis
    shown = Path(name).name if Path(name).is_dir() else name  # no folder of the machine it was made on
    return text + _ON_BASIS.format(name=shown, hash=found)


def add_usage(
    folder: Path, task_type: str | None, additive: bool = True, basis: tuple[str, str | None] | None = None
) -> None:
    """Add that section to the card which PEFT wrote into a folder, once; without a card nothing is done."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _HEADING not in text:
        card.write_text(f"{text.rstrip()}\n\n{usage(task_type, additive, basis=basis)}", encoding="utf-8")


def for_run(
    report: dict[str, Any],
    task_type: str | None,
    additive: bool = True,
    basis: tuple[str, str | None] | None = None,
) -> str:
    """Return the card of an adapter that `lotr train` made; equal runs give equal cards.

    Args:
        report: Content of `metrics.json`.
        task_type: PEFT's task type.
        additive: Whether the adapter only adds to the weight.
        basis: Path or hub id, and hash, of the adapter that the file refers to.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    task, settings, numbers = report["task"], report["settings"], report["trained_numbers"]
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(report["eval"].items()))
    labels = f"Labels: {', '.join(task['labels'])}.\n\n" if task["labels"] else ""
    how = (
        usage(task_type, additive, len(task["labels"]), basis)
        if settings["method"] not in ("peft_lora", "peft_dora")
        else ""
    )
    return f"""---
base_model: {task["base_model"]}
library_name: peft
tags: [{settings["method"]}, peft]
---

# {settings["method"]} adapter for {task["base_model"]}

Trained on `{settings["train"]}` ({task["task"]}, {report["rows"]["train"]} rows, {report["steps"]} steps, seed
{settings["seed"]}) with `lotr train`.

- {numbers["adapter"]:,} trained numbers in the adapter, {numbers["head"]:,} in the head
- {report["adapter_bytes"]:,} bytes on disk

{labels}| metric ({report["rows"]["eval"]} rows) | value |
|---|---|
{scores}

{how}"""
