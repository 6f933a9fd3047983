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
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is packaged and the data is Python's own library

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from lotr import CoreBank
from lotr.files.adapter_folder import WEIGHTS
from lotr.training.data.docstrings import load_docstrings
from lotr.training.run import train
from lotr.training.settings import TrainSettings
from lotr.training.tasks.run import train_bank
from lotr.training.tasks.served import load_served
from lotr.training.tasks.settings import BankSettings
from lotr.training.tasks.task_list import TaskSource

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
    "equal": {"r": 1, "layers_to_transform": [4, 5]},
    "large": {"r": 4, "layers_to_transform": None},
}

Rows = dict[str, list[dict[str, str]]]  # split -> rows


def tasks_of(rows: Rows) -> dict[str, Rows]:
    """Return the tasks: name → rows with text and label."""
    made = {f"module of {package}": _labelled(rows, "module", "label", (package,)) for package in PACKAGES}
    made |= {f"package for {name}": _labelled(rows, "label", "label", of) for name, of in FAMILIES.items()}
    return made | {"kind of definition": _labelled(rows, "kind", "label", PACKAGES)}


def _labelled(rows: Rows, label: str, column: str, among: tuple[str, ...]) -> Rows:
    own = {split: [row for row in part if row[column] in among] for split, part in rows.items()}
    sizes = Counter(row[label] for row in own["train"])
    made = {
        split: [{"text": row["text"], "label": row[label]} for row in part if sizes[row[label]] >= FEWEST]
        for split, part in own.items()
    }
    for split, part in made.items():
        random.Random(0).shuffle(part)
        made[split] = part[: MOST[split]]
    return made


def written(tasks: dict[str, Rows], folder: Path) -> list[TaskSource]:
    """Write the rows of each task to files."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for n, (name, rows) in enumerate(tasks.items()):
        for split, part in rows.items():
            with (folder / f"{n}.{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(part)
        sources.append(TaskSource(name, str(folder / f"{n}.train.csv"), str(folder / f"{n}.test.csv")))
    return sources


def separate(source: TaskSource, lora: dict[str, object], options: argparse.Namespace) -> dict[str, float]:
    """Train a LoRA of PEFT for one task."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model="minilm",
            method="peft_lora",
            train=source.train,
            eval=source.eval,
            output=folder,
            epochs=options.epochs,
            batch_size=8,
            max_length=options.length,
            seed=options.seed,
            eval_steps=10**6,
            overwrite=True,
        )
        config = LoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], lora_alpha=lora["r"], **lora
        )
        report = train(settings, say=lambda line: None, config=config)
        return {
            "accuracy": report.score,
            "numbers": report.trained_numbers["adapter"],
            "bytes": (Path(folder) / WEIGHTS).stat().st_size,
        }


def batch_times(bank: Path, rows: int = 64, rounds: int = 9) -> dict[str, float]:
    """Return seconds of a batch whose rows have one task, many tasks, and none, measured in turns."""
    served = load_served(bank)
    names = list(served.bank.names())
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (rows, 48), generator=generator),
        "attention_mask": torch.ones(rows, 48, dtype=torch.long),
    }
    chosen = {
        "one task": names[:1] * rows,
        f"{len(names)} tasks mixed": [names[n % len(names)] for n in range(rows)],
        "no task": [None] * rows,
    }
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    with torch.inference_mode():
        for _ in range(rounds + 2):
            for name, ids in chosen.items():
                started = time.perf_counter()
                served.model(**batch, task_ids=ids)
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[2:]) for name, seconds in taken.items()}


def timed(what: str, work: Callable[[], object], seconds: dict[str, float]) -> object:
    """Do some work, say so, and note how long it took."""
    print(f"{what} …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    result = work()
    seconds[what] = time.perf_counter() - started
    return result


def main() -> None:
    """Run the comparison and print its table."""
    warnings.filterwarnings("ignore")  # what the libraries underneath plan to rename is no news here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo-bank"))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--length", type=int, default=48, help="longest text, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loras", nargs="*", default=list(LORAS), choices=LORAS)
    options = parser.parse_args()
    out, seconds = options.output, {}
    sources = written(tasks_of(load_docstrings(packages=80)), out / "tasks")

    basis = TrainSettings(
        model="minilm",
        train="docstrings",
        output=str(out / "basis"),
        epochs=1,
        max_length=options.length,
        seed=options.seed,
        eval_steps=10**6,
        overwrite=True,
    )
    timed("one LoTR on docstrings, for the basis", lambda: train(basis, say=lambda line: None), seconds)
    bank_path = Path(tempfile.mkdtemp(dir=out)) / "bank"
    bank = BankSettings(
        basis=str(out / "basis"),
        output=str(bank_path),
        tasks=[source.to_dict() for source in sources],
        epochs=options.epochs,
        max_length=options.length,
        seed=options.seed,
    )
    report = timed(f"{len(sources)} tasks at once", lambda: train_bank(bank, say=lambda line: None), seconds)
    loras = {
        kind: timed(
            f"{len(sources)} LoRAs one by one, {kind}",
            lambda kind=kind: {source.name: separate(source, LORAS[kind], options) for source in sources},
            seconds,
        )
        for kind in options.loras
    }
    stats = CoreBank.open(bank_path).stats()
    report["file_bytes_a_task"] = stats["bytes_of_tasks"] / stats["tasks"]
    times = timed("batches of 64 rows", lambda: batch_times(bank_path), seconds)
    content = {"bank": report, "loras": loras, "batch_seconds": times, "seconds": seconds}
    (out / "demo.json").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
    show(report, loras, times, seconds)


def show(report: dict, loras: dict, times: dict[str, float], seconds: dict[str, float]) -> None:
    """Print the table and what it cost."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table(title="Accuracy on rows that were held out", title_justify="left")
    for name in (
        "task",
        "classes",
        "trained on",
        "measured on",
        "bank",
        *(f"LoRA, {kind}" for kind in loras),
    ):
        table.add_column(name, justify="left" if name == "task" else "right")
    scores: dict[str, list[float]] = {"bank": [], **{kind: [] for kind in loras}}
    for name, found in report["tasks"].items():
        row = {"bank": found["accuracy"], **{kind: done[name]["accuracy"] for kind, done in loras.items()}}
        for kind, score in row.items():
            scores[kind].append(score)
        table.add_row(
            name,
            *map(str, (found["labels"], found["rows"]["train"], found["rows"]["eval"])),
            *(f"{score:.3f}" for score in row.values()),
        )
    means = [f"{statistics.mean(values):.3f}" for values in scores.values()]
    table.add_row("mean", "", "", "", *means, style="bold")
    sizes = {
        kind: [statistics.mean(d[key] for d in done.values()) for key in ("numbers", "bytes")]
        for kind, done in loras.items()
    }
    below = {
        "numbers a task": (report["numbers_a_task"], [numbers for numbers, _ in sizes.values()]),
        "bytes of the numbers": (report["bytes_a_task"], [4 * numbers for numbers, _ in sizes.values()]),
        "bytes of the file, head included": (
            report["file_bytes_a_task"],
            [size for _, size in sizes.values()],
        ),
    }
    for name, (mine, theirs) in below.items():
        table.add_row(name, "", "", "", *(f"{n:,.0f}" for n in (mine, *theirs)))
    console.print(table)
    for name, value in times.items():
        console.print(f"A batch of 64 rows, {name}: {1000 * value:.1f} ms", highlight=False)
    for what, value in seconds.items():
        console.print(f"{what}: {value:.0f} s", highlight=False)
    console.print(f"{sum(seconds.values()):.0f} seconds in all.", highlight=False)


if __name__ == "__main__":
    main()
