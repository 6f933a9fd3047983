"""What each trained number buys: methods of this library beside PEFT's, on real data, every method tuned alike.

    python benchmarks/quality.py --data DATA
    python benchmarks/quality.py --report --page docs/results_encoder.md

DATA has a folder a task with train.csv, dev.csv and test.csv (columns text, maybe text2, label): SST-2 and MRPC of
GLUE, and the books, dvd and kitchen reviews of Blitzer et al. (2007). The task docstrings needs no files.

`quality.yaml` defines methods, tasks and seeds. The sweep tries every rate of a method on some tasks and seeds; the
rates with the best mean score on dev are then used for all. Each run is appended to a file as one line; runs that are
there are not run again, so the grid can be stopped and continued, and processes can share it (`--share 0/2`, `1/2`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import yaml
from rich.console import Console

import quality_page
from quality_runs import Results, append, read, share_of, wanted
from quality_training import Bench
from records import calm, show

HERE = Path(__file__).parent


def work(grid: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """Do the missing runs of this process's share, one after the other, and append each to the file."""
    bench, console = Bench(grid, options.data, folder), Console(stderr=True)
    share, shares = (int(part) for part in options.share.split("/"))
    started = time.monotonic()
    while time.monotonic() - started < 60 * options.minutes:
        runs = read(options.runs)
        missing = [run for run in wanted(grid, runs) if run is None or run[0] not in runs]
        mine = next((run for run in missing if run and share_of(run[0], shares) == share), None)
        if mine is None:
            if None not in missing:
                return
            time.sleep(5)  # another process is about to find the rates
            continue
        console.print(f"{len(missing)} to do: {', '.join(map(str, mine[0]))}", highlight=False)
        append(options.runs, bench.measure(*mine))


def main() -> None:
    """Do what is missing of the grid, print the scores, and write the tables and the picture of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=HERE / "quality.yaml")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the tasks' files")
    parser.add_argument(
        "--runs", type=Path, default=Path("docs/data/grid.csv"), help="file with a line a run"
    )
    parser.add_argument("--share", default="0/1", help="part of the runs that this process does: INDEX/COUNT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    parser.add_argument("--page", type=Path, help="renew the tables of this page, and its picture")
    options = parser.parse_args()
    calm()
    grid = yaml.safe_load(options.grid.read_text())
    if not options.report:
        with tempfile.TemporaryDirectory() as folder:
            work(grid, options, Path(folder))
    results = Results(grid, read(options.runs))
    header, rows = quality_page.all_scores(results)
    show(f"Accuracy on test, {results.n_runs} runs; rates chosen on dev", header, rows, left=2)
    if options.page is not None:
        quality_page.renew(results, options.page)


if __name__ == "__main__":
    main()
