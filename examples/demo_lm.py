"""Teach a chat model to write docstrings as the functions of your own Python have them; LoTR beside LoRA.

The packaged SmolLM2-135M-Instruct learns from names of functions and docstrings: of Python's own library, or
of any folder (`--source`). Loss on held-out functions and five answers, before and after. Run by `make demo-lm`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is packaged and the data is Python's own library

from rich.console import Console
from rich.table import Table

import lotr
from lotr.training.base_model import halves_are_slow
from lotr.training.data.docstrings import load_functions
from lotr.training.trained import load_trained

METHODS: dict[str, dict[str, Any]] = {
    "peft_lora": {"rank": "1"},
    "lotr": {"rank": "18", "init": "gradient", "start_batches": 4},
}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """Write questions and answers, one a line."""
    asked = [
        {**row, "prompt": f"Write the docstring of the Python function {row['prompt']}."} for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return str(path)


def main() -> None:
    """Train both, and print losses and answers."""
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, which calls its own old names
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo-lm"))
    parser.add_argument("--source", type=Path, help="folder with Python files; default: Python's own library")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    out, console, started = options.output, Console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    rows, draw = load_functions(options.source), random.Random(0)
    train = write(out / "train.jsonl", draw.sample(rows["train"], min(2000, len(rows["train"]))))
    held_out = draw.sample(rows["test"], min(64, len(rows["test"])))
    test, asked = write(out / "test.jsonl", held_out), write(out / "asked.jsonl", held_out[:5])

    dtype = "float32" if halves_are_slow() else "bfloat16"
    table = Table(title="SmolLM2-135M on docstrings it has not seen", title_justify="left")
    for name in ("", "trained numbers", "loss per token", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    answers: dict[str, list[str]] = {"asked": [row["prompt"] for row in held_out[:5]]}
    for method, fields in METHODS.items():
        console.print(f"{method}: {options.steps} steps of 8 rows …", highlight=False)
        report = lotr.train(
            **{
                "model": "smollm2",
                "train": train,
                "eval": test,
                "output": str(out / method),
                "overwrite": True,
            },
            **{"method": method, "dtype": dtype, "batch_size": 8, "max_length": 96},
            **{"max_steps": options.steps, "eval_steps": options.steps, "warmup": 0.1, **fields},
            say=lambda line: None,
        )
        trained = load_trained(out / method)
        if "before" not in answers:
            with trained.model.disable_adapter():
                table.add_row("before", "", f"{lotr.evaluate(trained, test, batch_size=8)['loss']:.3f}", "")
                answers["before"] = written(trained, asked)
        numbers = f"{report.trained_numbers['adapter']:,}"
        table.add_row(method, numbers, f"{report.eval['loss']:.3f}", f"{report.seconds:.0f}")
        answers[method] = written(trained, asked)
    console.print(table)
    for name, *lines in zip(*answers.values(), strict=True):
        console.print(f"\n[bold]{name}[/bold]")
        for who, line in zip(list(answers)[1:], lines, strict=True):
            console.print(f"  {who}: {' '.join(line.split())}", highlight=False, markup=False)
    console.print(f"\n{time.perf_counter() - started:.0f} seconds in all.", highlight=False)


def written(model: Any, asked: str) -> list[str]:
    """Return the answers to some questions."""
    return [row["prediction"] for row in lotr.predict(model, asked, max_new_tokens=24)]


if __name__ == "__main__":
    main()
