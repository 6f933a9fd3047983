"""What each trained number buys: methods of this library beside PEFT's, on real data, every method tuned alike.

    python benchmarks/quality.py --data DATA --share 0/1
    python benchmarks/quality.py --report --page docs/quality.md

DATA has a folder a task with train.csv, dev.csv and test.csv (columns text, maybe text2, label): SST-2 and MRPC of
GLUE, and the books, dvd and kitchen reviews of Blitzer et al. (2007). The task docstrings needs no files.

A grid (`quality.yaml`) of methods × targets × tasks × seeds, in two stages: the sweep tries every rate of a method on
some tasks and seeds; the rates with the best mean score on dev are then used for all tasks and seeds. Each run is
appended to a file as one line of JSON; runs that are there are not run again, so the grid can be stopped and continued,
and several processes can share it (`--share 0/2` and `--share 1/2`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import yaml
from rich.console import Console
from transformers.utils import logging

import quality_page
import quality_report
from quality_grid import key_of, read, runs_of, share_of
from quality_run import Bench

HERE = Path(__file__).parent


def work(grid: dict[str, Any], asked: argparse.Namespace, folder: Path) -> None:
    """Run what is missing of this process's share, one after the other, and append each to its file."""
    bench, console = Bench(grid, asked.data, folder), Console(stderr=True)
    share, shares = (int(part) for part in asked.share.split("/"))
    mine = asked.lines / f"{asked.grid.stem}.{share}.jsonl"
    asked.lines.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    while time.monotonic() - started < 60 * asked.minutes:
        done = read(asked.lines)
        left = [run for run in runs_of(grid, done) if run is None or key_of(run) not in done]
        run = next((run for run in left if run and share_of(run, shares) == share), None)
        if run is None:
            if None not in left:
                return
            time.sleep(5)  # another process is about to find the rates
            continue
        console.print(f"{len(left)} to do: {key_of(run)}", highlight=False, soft_wrap=True)
        with mine.open("a") as lines:
            lines.write(json.dumps(bench.measure(run), sort_keys=True) + "\n")


def main() -> None:
    """Run what is missing of the grid, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=HERE / "quality.yaml")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with the tasks' files, as the grid names them"
    )
    parser.add_argument(
        "--lines", type=Path, default=HERE / "results", help="folder where runs are kept, one line each"
    )
    parser.add_argument(
        "--share", default="0/1", help="which part of the runs this process does: INDEX/COUNT"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument(
        "--page", type=Path, help="write the page of the docs here, its pictures into images/ beside"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    grid = yaml.safe_load(asked.grid.read_text())
    if not asked.report:
        with tempfile.TemporaryDirectory() as folder:
            work(grid, asked, Path(folder))
    results = quality_report.Results(grid, read(asked.lines))
    quality_report.show(results)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(results.rows(), indent=1) + "\n")
    if asked.page is not None:
        quality_page.write(results, asked.page)


if __name__ == "__main__":
    main()
