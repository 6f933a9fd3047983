"""Every row of the table of methods on real text: trained numbers, accuracy, seconds a step.

    python benchmarks/bench_methods.py --json docs/data/methods.json --picture docs/images/methods.png

The packaged MiniLM learns the 16 classes of `docstrings` with each row's default settings, beside a bare head and
PEFT's own LoRA and DoRA, in one process. Runs that the JSON file holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged, the data is Python's own library

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import TrainerCallback

from lotr import METHODS
from lotr.adapters import plots
from lotr.files.atomic import write_json
from lotr.training.adapter import PEERS
from lotr.training.run import train
from lotr.training.settings import TrainSettings

ERROR = 0.017  # of an accuracy near two thirds, measured on 756 rows
HEADER = ("method", "trained numbers", "accuracy", "seconds a step")


class StepTimes(TrainerCallback):
    """The wall time of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def measure(method: str, seed: int, epochs: float) -> dict[str, Any]:
    """Train one row with its default settings."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model="minilm",
            train="docstrings",
            output=folder,
            method=method,
            epochs=epochs,
            batch_size=16,
            max_length=64,
            eval_steps=10**6,
            head_warmup=0,  # a cold head, for every method alike
            seed=seed,
            overwrite=True,
        )
        report = train(settings, say=lambda line: None, callbacks=[times])
    return {
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "trained_numbers": report.trained_numbers["adapter"],
        "head_numbers": report.trained_numbers["head"],
        "accuracy": round(report.score, 4),
        "seconds_a_step": round(statistics.median(times.seconds), 4),
        "rates": vars(report.rates),
    }


def table(runs: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return one row a method: means over the seeds."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        score = statistics.mean(run["accuracy"] for run in mine)
        seconds = statistics.median(run["seconds_a_step"] for run in mine)
        rows.append((method, mine[0]["trained_numbers"], score, seconds))
    return rows


def main() -> None:
    """Run what is missing, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/methods.json"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*reversed(PEERS), *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    found = json.loads(options.json.read_text()) if options.json.is_file() else {"runs": []}
    runs: list[dict[str, Any]] = found["runs"]
    have = {(run["method"], run["seed"], run["epochs"]) for run in runs}
    todo = [(m, s) for s in options.seeds for m in options.methods if (m, s, options.epochs) not in have]
    for method, seed in track(todo, description="training", console=Console(stderr=True)):
        runs.append(measure(method, seed, options.epochs))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"date": str(date.today()), "threads": os.cpu_count(), "runs": runs})

    shown = Table(title="MiniLM on docstrings: 16 classes, default settings", title_justify="left")
    for name in HEADER:
        shown.add_column(name, justify="left" if name == "method" else "right")
    rows = table([run for run in runs if run["epochs"] == options.epochs])
    for method, numbers, score, seconds in rows:
        shown.add_row(method, f"{numbers:,}", f"{score:.4f}", f"{seconds:.3f}")
    Console().print(shown)
    if options.picture:
        names, sizes, scores = ([row[at] for row in rows] for at in range(3))
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        plots.score_by_name(names, sizes, scores, ERROR, "accuracy, one standard error", options.picture)


if __name__ == "__main__":
    main()
