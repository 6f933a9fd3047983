"""Every row of the table of methods on real text: trained numbers and accuracy, with three seeds.

    python benchmarks/bench_methods.py --json docs/data/methods.json --picture docs/images/methods.png

The packaged MiniLM learns the 16 classes of `docstrings` with each row's default settings, beside a bare head and
PEFT's own LoRA and DoRA. Runs that the JSON file holds already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import pictures
from lotr import METHODS
from quality_defaults import lotr_train
from records import show, write_rows

PEERS = ("head", "peft_dora", "peft_lora")
#: Rows whose start differs from the paper's by choice, with that of the paper: Gaussian factors, `σ = 1 / r` and one
#: rate, which is the best of a sweep (`lotr_joint gaussian` in docs/results_encoder.md).
_GAUSSIAN = ("--init", "gaussian", "--scaling", "0.0625", "--lr", "0.003", "--core-lr", "0.003")
PUBLISHED = {f"{row} as published": ("--method", row, *_GAUSSIAN) for row in ("lotr", "lotr_joint")}
ERROR = 0.017  # of an accuracy near two thirds, measured on 756 rows
HEADER = ("method", "trained numbers", "accuracy", "seeds")
SEEDS = (0, 1, 2)


def measure(method: str, seed: int, epochs: float) -> dict[str, Any]:
    """Train one row with its default settings and a cold head, for every method alike."""
    report = lotr_train(
        *("--train", "docstrings", "--epochs", str(epochs), "--seed", str(seed)),
        *PUBLISHED.get(method, ("--method", method)),
        *("--batch-size", "16", "--max-length", "64", "--eval-steps", "1000000", "--head-warmup", "0"),
    )
    return {
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "trained_numbers": report["trained_numbers"]["adapter"],
        "head_numbers": report["trained_numbers"]["head"],
        "accuracy": round(report["accuracy"], 4),
        "rates": report["rates"],
    }


def main() -> None:
    """Run what is missing, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/bench/methods.json"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*PEERS, *PUBLISHED, *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    runs = json.loads(options.json.read_text())["runs"] if options.json.is_file() else []
    have = {(run["method"], run["seed"], run["epochs"]) for run in runs}
    for seed, method in itertools.product(options.seeds, options.methods):
        if (method, seed, options.epochs) not in have:
            runs.append(measure(method, seed, options.epochs))
            write_rows(options.json, {"date": str(date.today())}, "runs", runs)
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if (run["method"], run["epochs"]) == (method, options.epochs)]
        if mine:
            score = statistics.mean(run["accuracy"] for run in mine)
            rows.append((method, mine[0]["trained_numbers"], score, len(mine)))
    cells = [[m, f"{n:,}", f"{score:.4f}", str(seeds)] for m, n, score, seeds in rows]
    show("MiniLM on docstrings: 16 classes, default settings", HEADER, cells)
    if options.picture:
        names, sizes, scores, seeds = zip(*rows, strict=True)
        errors = [ERROR / math.sqrt(n) for n in seeds]
        names = [
            name if n == len(SEEDS) else f"{name}, seeds: {n}" for name, n in zip(names, seeds, strict=True)
        ]
        pictures.bars(names, sizes, scores, errors, options.picture)


if __name__ == "__main__":
    main()
