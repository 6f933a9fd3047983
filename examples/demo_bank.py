"""Train twenty tasks at once on one basis, and compare each with a LoRA of its own.

The tasks come from Python's own docstrings: which module of a package, which package of a family, which kind of
definition does a text describe? One LoTR on docstrings gives the basis; then every task has 3,072 numbers and a head.
Beside it every task gets a separate PEFT LoRA of as many numbers, and one of twelve times as many, with the same rows
and passes. Run by `make demo-bank`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is packaged and the data is Python's own library

from peft import LoraConfig
from rich.console import Console
from rich.table import Table

import lotr
from lotr.training.data.docstrings import load_docstrings

#: Which module of the package? Those of its modules that have enough texts.
PACKAGES = ("tkinter", "idlelib", "importlib", "email", "asyncio", "distutils")
PACKAGES += ("xml", "logging", "multiprocessing", "http", "unittest")
#: Which package of the family?
FAMILIES = {
    "mail": ("email", "mailbox", "smtplib", "imaplib", "nntplib"),
    "network": ("http", "urllib", "ftplib", "socketserver", "ssl", "xmlrpc"),
    "files": ("tarfile", "zipfile", "shutil", "pathlib", "io"),
    "concurrency": ("asyncio", "multiprocessing", "threading", "concurrent"),
    "debugging": ("pdb", "bdb", "doctest", "unittest", "traceback"),
    "code": ("inspect", "pydoc", "lib2to3", "ast", "symtable"),
    "numbers": ("decimal", "statistics", "numbers", "calendar", "datetime"),
    "text": ("difflib", "codecs", "encodings", "configparser"),
}
#: Texts that a class has at least, and rows that a task has at most to train and to measure on.
FEWEST, MOST = 12, {"train": 80, "test": 120}
LORAS = {
    "LoRA, equal": LoraConfig(r=1, lora_alpha=1, layers_to_transform=[4, 5], task_type="SEQ_CLS"),
    "LoRA, large": LoraConfig(r=4, lora_alpha=4, task_type="SEQ_CLS"),
}

Rows = dict[str, list[dict[str, str]]]  # split -> rows


def tasks_of(rows: Rows) -> dict[str, Rows]:
    """Return the tasks: name → rows with text and label."""
    tasks = {f"module of {package}": labelled(rows, "module", "label", (package,)) for package in PACKAGES}
    tasks |= {f"package for {name}": labelled(rows, "label", "label", of) for name, of in FAMILIES.items()}
    return tasks | {"kind of definition": labelled(rows, "kind", "label", PACKAGES)}


def labelled(rows: Rows, label: str, column: str, among: tuple[str, ...]) -> Rows:
    """Return the rows whose `column` is among some names, labelled by another column."""
    own = {split: [row for row in part if row[column] in among] for split, part in rows.items()}
    sizes = Counter(row[label] for row in own["train"])
    task = {}
    for split, part in own.items():
        task[split] = [
            {"text": row["text"], "label": row[label]} for row in part if sizes[row[label]] >= FEWEST
        ]
        random.Random(0).shuffle(task[split])
        task[split] = task[split][: MOST[split]]
    return task


def write(tasks: dict[str, Rows], folder: Path) -> dict[str, dict[str, str]]:
    """Write the rows of each task to files, and the list of tasks that `lotr bank train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for n, (name, rows) in enumerate(tasks.items()):
        paths = {split: str(folder / f"{n}.{split}.csv") for split in rows}
        for split, part in rows.items():
            with Path(paths[split]).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(part)
        sources[name] = {"train": paths["train"], "eval": paths["test"]}
    (folder / "tasks.yaml").write_text(json.dumps(sources), encoding="utf-8")  # JSON is YAML
    return sources


def bank_of(basis: Path, tasks: Path, bank: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """Train all tasks at once, from the command line, and return its report."""
    options = [word for name, value in shared.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = [
        "bank",
        "train",
        "--basis",
        str(basis),
        "--tasks",
        str(tasks),
        "--output",
        str(bank),
        *options,
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "lotr", *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def lora_of(source: dict[str, str], config: LoraConfig, shared: dict[str, Any]) -> tuple[float, int]:
    """Train a LoRA of PEFT for one task; return its accuracy and its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        report = lotr.train(
            **source,
            **shared,
            model="minilm",
            method="peft_lora",
            output=folder,
            batch_size=8,
            eval_steps=10**6,
            overwrite=True,
            say=lambda line: None,
            config=config,
        )
    return report.score, report.trained_numbers["adapter"]


def main() -> None:
    """Run the comparison and print its table."""
    warnings.filterwarnings("ignore")  # what the libraries underneath plan to rename is no news here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo-bank"))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--length", type=int, default=48, help="longest text, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, started = options.output, time.perf_counter()
    shared = {"epochs": options.epochs, "max_length": options.length, "seed": options.seed}
    sources = write(tasks_of(load_docstrings(packages=80)), out / "tasks")

    print("One LoTR on docstrings, for the basis …", file=sys.stderr, flush=True)
    basis = {**shared, "epochs": 1, "eval_steps": 10**6, "overwrite": True}
    lotr.train(model="minilm", train="docstrings", output=str(out / "basis"), **basis)
    bank = Path(tempfile.mkdtemp(dir=out)) / "bank"
    report = bank_of(out / "basis", out / "tasks" / "tasks.yaml", bank, shared)
    scores = {"bank": {name: task["accuracy"] for name, task in report["tasks"].items()}}
    numbers = {"bank": report["numbers_a_task"]}
    for kind, config in LORAS.items():
        print(f"{len(sources)} times {kind}, one by one …", file=sys.stderr, flush=True)
        runs = {name: lora_of(source, config, shared) for name, source in sources.items()}
        scores[kind] = {name: score for name, (score, _) in runs.items()}
        numbers[kind] = max(size for _, size in runs.values())
    (out / "demo.json").write_text(
        json.dumps({"scores": scores, "numbers": numbers}, indent=2), encoding="utf-8"
    )
    show(report, scores, numbers)
    print(f"{time.perf_counter() - started:.0f} seconds in all. The bank is {bank}.")


def show(report: dict[str, Any], scores: dict[str, dict[str, float]], numbers: dict[str, int]) -> None:
    """Print the table."""
    table = Table(title="Accuracy on rows that were held out", title_justify="left")
    for name in ("task", "classes", "trained on", *scores):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, task in report["tasks"].items():
        own = (f"{of[name]:.3f}" for of in scores.values())
        table.add_row(name, str(task["labels"]), str(task["rows"]["train"]), *own)
    means = (f"{statistics.mean(of.values()):.3f}" for of in scores.values())
    table.add_row("mean", "", "", *means, style="bold")
    table.add_row("numbers a task", "", "", *(f"{n:,}" for n in numbers.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
