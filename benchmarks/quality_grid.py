"""Which runs the grid of `quality.py` asks for, and which rates a method has earned."""

from __future__ import annotations

import itertools
import json
import statistics
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_KEY = ("task", "target", "method", "seed", "rates", "recipe")
Run = dict[str, Any]
Done = dict[str, Run]
Rates = dict[str, float]


def read(folder: Path) -> Done:
    """Return the runs in all files of a folder, by their keys."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    return by_key(json.loads(line) for line in lines)


def by_key(runs: Iterable[Run]) -> Done:
    """Return runs by what tells them from others."""
    return {key_of(run): run for run in runs}


def key_of(run: Run) -> str:
    """Return what tells a run from others."""
    return json.dumps({name: run.get(name) for name in _KEY}, sort_keys=True)


def recipe(grid: dict[str, Any], run: Run) -> str | None:
    """Return what tells the settings behind a run from others; `None` when the grid does not know its method."""
    method = grid["methods"].get(run["method"])
    if method is None or run["task"] not in grid["tasks"] or run["target"] not in grid["targets"]:
        return None
    said = {name: value for name, value in method.items() if name != "rates"}
    all_of = [
        grid.get("model"),
        grid["settings"],
        grid["tasks"][run["task"]],
        grid["targets"][run["target"]],
        said,
    ]
    if "source" in method:
        source = method["source"]
        all_of += [grid["methods"][source["method"]]["fields"], grid["tasks"][source["task"]]]
    return f"{zlib.crc32(json.dumps(all_of, sort_keys=True).encode()):08x}"


def _planned(grid: dict[str, Any], run: Run) -> Run:
    return {**run, "recipe": recipe(grid, run)}


def runs_of(grid: dict[str, Any], done: Done) -> Iterator[Run | None]:
    """Yield the runs of a grid, in its order; `None` for one whose rates are not known yet."""
    for wave in grid["waves"]:
        cells = list(itertools.product(wave["targets"], wave["methods"]))
        for target, method in cells:
            yield from sweep_of(grid, target, method)
        for seed, task, (target, method) in itertools.product(wave["seeds"], wave["tasks"], cells):
            rates = best_rates(grid, done, target, method)
            if rates is None:
                yield None
            else:
                run = {"task": task, "target": target, "method": method, "seed": seed, "rates": rates}
                yield _planned(grid, run)


def sweep_of(grid: dict[str, Any], target: str, method: str) -> list[Run]:
    """Return the trials of the rates of a method; of one rate there is nothing to try."""
    rates = grid["methods"][method]["rates"]
    return [
        _planned(grid, {"task": task, "target": target, "method": method, "seed": seed, "rates": tried})
        for seed, task in itertools.product(grid["sweep"]["seeds"], grid["sweep"]["tasks"])
        for tried in (rates if len(rates) > 1 else ())
    ]


def tried_rates(grid: dict[str, Any], done: Done, target: str, method: str) -> list[tuple[Rates, float]]:
    """Return the rates that were tried on all tasks and seeds of the sweep, with mean dev scores, the best first.

    A method with one rate has that one, untried.
    """
    rates = grid["methods"][method]["rates"]
    if len(rates) == 1:
        return [(rates[0], 0.0)]
    trials = sweep_of(grid, target, method)
    tried = []
    for some in rates:
        mine = [done.get(key_of(trial)) for trial in trials if trial["rates"] == some]
        if None not in mine:
            tried.append((some, statistics.mean(run["dev"] for run in mine if run)))
    return sorted(tried, key=lambda pair: -pair[1])


def best_rates(grid: dict[str, Any], done: Done, target: str, method: str) -> Rates | None:
    """Return the rates with the best mean dev score over the sweep, or `None` while trials are missing."""
    tried = tried_rates(grid, done, target, method)
    return tried[0][0] if len(tried) == len(grid["methods"][method]["rates"]) else None


def share_of(run: Run, shares: int) -> int:
    """Return which process does a run: all rates of one start fall to the same one."""
    return zlib.crc32(f"{run['task']}/{run['target']}/{run['method']}/{run['seed']}".encode()) % shares
