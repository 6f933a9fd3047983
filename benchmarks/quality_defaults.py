"""Whether `lotr train` without options learns every task with every seed: accuracy beside that of the larger class.

    python benchmarks/quality_defaults.py --data DATA --json docs/data/defaults.json

What runs is `lotr train --model minilm --train TRAIN --eval DEV --output FOLDER --seed SEED` and nothing else: three
epochs, in float32. Runs that the JSON file holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

from rich.console import Console
from rich.table import Table

from lotr.files.atomic import write_json
from lotr.training.data import Columns, load_task
from lotr.training.run import train
from lotr_cli.settings import TrainSettings

HEADER = ("task", "larger class", "accuracy on dev, a seed each")
TASKS = ("docstrings", "mrpc", "sst2", "reviews_kitchen", "reviews_dvd", "reviews_books")


def measure(task: str, seed: int, data: Path) -> dict[str, Any]:
    """Train on a task with the settings of the command line, and return its accuracy."""
    files = [None if task == "docstrings" else str(data / task / f"{part}.csv") for part in ("train", "dev")]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model="minilm", train=files[0] or task, eval=files[1], output=folder, seed=seed, overwrite=True
        )
        report = train(settings, say=lambda line: None)
    held_out = load_task(files[0] or task, files[1], Columns("text", "text2", "label"), None, seed=0).eval
    largest = Counter(held_out["label"]).most_common(1)[0][1] / len(held_out)
    return {
        "task": task,
        "seed": seed,
        "accuracy": round(report["accuracy"], 4),
        "larger_class": round(largest, 4),
        "steps": report["steps"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def summary(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table: a task a row, its accuracies in the order of the seeds."""
    cells = []
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = sorted((run for run in runs if run["task"] == task), key=lambda run: run["seed"])
        scores = ", ".join(f"{100 * run['accuracy']:.1f}" for run in mine)
        cells.append([task, f"{100 * mine[0]['larger_class']:.1f}", scores])
    return cells


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the tasks' files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, default=Path("out/defaults.json"))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    console, runs = Console(stderr=True), []
    if asked.json.is_file():
        runs = json.loads(asked.json.read_text(encoding="utf-8"))
    have = {(run["task"], run["seed"]) for run in runs}
    for seed, task in ((s, t) for s in asked.seeds for t in asked.tasks):
        if (task, seed) not in have:
            console.print(f"{task}, seed {seed}", highlight=False)
            runs.append(measure(task, seed, asked.data))
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(asked.json, runs)
    table = Table(*HEADER, title="lotr train without options")
    for cells in summary(runs):
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
