"""What each trained number buys: methods of this library beside PEFT's, on real data, every method tuned alike.

    python benchmarks/quality.py --data ../shared/data --share 0/1
    python benchmarks/quality.py --report

A grid (`quality.yaml`) of methods × targets × tasks × seeds, in two stages: the sweep tries every rate of a method on
some tasks and one seed; the rates with the best mean score on dev are then used for all tasks and seeds. Each run is
appended to a file as one line of JSON; runs that are there are not run again, so the grid can be stopped and continued,
and several processes can share it (`--share 0/2` and `--share 1/2`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import quality_report
import yaml
from quality_run import Bench
from rich.console import Console
from transformers.utils import logging

HERE = Path(__file__).parent
LINES = HERE / "results"
_KEY = ("task", "target", "method", "seed", "rates")
Run = dict[str, Any]


def runs_of(grid: dict[str, Any], done: dict[str, Run]) -> Iterator[Run | None]:
    """Yield the runs of a grid, in its order; `None` for a result whose rates are not known yet."""
    for wave in grid["waves"]:
        cells = list(itertools.product(wave["targets"], wave["methods"]))
        for target, method in cells:
            yield from sweep_of(grid, target, method)
        for seed, task, (target, method) in itertools.product(wave["seeds"], wave["tasks"], cells):
            rates = best_rates(grid, done, target, method)
            if rates is None:
                yield None
            else:
                yield {"task": task, "target": target, "method": method, "seed": seed, "rates": rates}


def sweep_of(grid: dict[str, Any], target: str, method: str) -> list[Run]:
    """Return the trials of the rates of a method."""
    return [
        {"task": task, "target": target, "method": method, "seed": grid["sweep"]["seed"], "rates": rates}
        for task in grid["sweep"]["tasks"]
        for rates in grid["methods"][method]["rates"]
    ]


def best_rates(
    grid: dict[str, Any], done: dict[str, Run], target: str, method: str
) -> dict[str, float] | None:
    """Return the rates with the best mean dev score over the sweep's tasks, or `None` while trials are missing."""
    scores: dict[str, list[float]] = {}
    for trial in sweep_of(grid, target, method):
        found = done.get(key_of(trial))
        if found is None:
            return None
        scores.setdefault(json.dumps(trial["rates"]), []).append(found["dev"])
    best: dict[str, float] = json.loads(max(scores, key=lambda rates: statistics.mean(scores[rates])))
    return best


def key_of(run: Run) -> str:
    """Return what tells a run from others."""
    return json.dumps({name: run[name] for name in _KEY}, sort_keys=True)


def share_of(run: Run, shares: int) -> int:
    """Return which process does a run: all rates of one start fall to the same one."""
    return zlib.crc32(f"{run['task']}/{run['target']}/{run['method']}/{run['seed']}".encode()) % shares


def work(grid: dict[str, Any], asked: argparse.Namespace) -> None:
    """Run what is missing of this process's share, one after the other, and append each to its file."""
    bench, console = Bench(grid, asked.data), Console(stderr=True)
    share, shares = (int(part) for part in asked.share.split("/"))
    mine = asked.lines / f"quality.{share}.jsonl"
    asked.lines.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    while time.monotonic() - started < 60 * asked.minutes:
        done = {key_of(run): run for run in quality_report.read(asked.lines)}
        left = [run for run in runs_of(grid, done) if run is None or key_of(run) not in done]
        run = next((run for run in left if run and share_of(run, shares) == share), None)
        if run is None:
            if None not in left:
                return
            time.sleep(5)  # another process is about to find the rates
            continue
        console.print(f"{len(left)} to do: {key_of(run)}", highlight=False)
        with mine.open("a") as lines:
            lines.write(json.dumps(bench.measure(run), sort_keys=True) + "\n")


def main() -> None:
    """Run what is missing of the grid, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=HERE / "quality.yaml")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with the tasks' files"
    )
    parser.add_argument(
        "--lines", type=Path, default=LINES, help="folder where runs are kept, one line each"
    )
    parser.add_argument("--share", default="0/1", help="which part of the runs this process does: INDEX/COUNT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not asked.report:
        work(yaml.safe_load(asked.grid.read_text()), asked)
    quality_report.show(quality_report.read(asked.lines))


if __name__ == "__main__":
    main()
