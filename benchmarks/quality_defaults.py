"""Whether `lotr train` without options learns every task with every seed: accuracy beside that of the larger class.

    python benchmarks/quality_defaults.py --data DATA --json docs/data/defaults.json

What runs is `lotr train --model minilm --train TRAIN --eval DEV --output FOLDER --seed SEED` and nothing else: three
epochs, in float32. Runs that the JSON file holds already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from records import show, write_rows

HEADER = ("task", "larger class", "accuracy on dev, a seed each")
TASKS = ("docstrings", "mrpc", "sst2", "reviews_kitchen", "reviews_dvd", "reviews_books")


def lotr_train(*words: str) -> dict[str, Any]:
    """Return the report of `lotr train` with these options, in a process of its own; nothing is fetched."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lotr", "train", "--model", "minilm", *words]
        command += ["--output", folder, "--overwrite", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measure(task: str, seed: int, data: Path) -> dict[str, Any]:
    """Train on a task with the settings of the command line, and return its accuracy."""
    if task == "docstrings":
        report, largest = lotr_train("--train", task, "--seed", str(seed)), 0.159
    else:
        parts = [str(data / task / f"{part}.csv") for part in ("train", "dev")]
        report = lotr_train("--train", parts[0], "--eval", parts[1], "--seed", str(seed))
        with Path(parts[1]).open(newline="", encoding="utf-8") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        largest = Counter(labels).most_common(1)[0][1] / len(labels)
    accuracy = round(report["accuracy"], 4)
    return {"task": task, "seed": seed, "accuracy": accuracy, "larger_class": round(largest, 4)}


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
    options = parser.parse_args()
    runs = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.json.is_file() else []
    have = {(run["task"], run["seed"]) for run in runs}
    for seed, task in itertools.product(options.seeds, options.tasks):
        if (task, seed) not in have:
            runs.append(measure(task, seed, options.data))
            write_rows(options.json, {"command": "lotr train"}, "rows", runs)
    show("lotr train without options", HEADER, summary(runs))


if __name__ == "__main__":
    main()
