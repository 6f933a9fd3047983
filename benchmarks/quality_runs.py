"""The runs of `quality.py`: which there should be, which rates a method has earned, and what the scores say."""

from __future__ import annotations

import csv
import itertools
import statistics
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = (
    *("modules", "name", "method", "init", "rank", "numbers"),
    *("task", "steps", "seed", "rates", "dev", "test"),
)
Definition = dict[str, Any]
Rates = dict[str, float]


class Key(NamedTuple):
    """What tells a run from others."""

    modules: str
    name: str
    task: str
    seed: int
    rates: str


Runs = dict[Key, dict[str, Any]]


class Estimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of that error."""

    mean: float
    error: float
    freedom: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(statistics.mean(values), error, len(values) - 1)

    @classmethod
    def over_tasks(cls, estimates: Sequence[Estimate]) -> Estimate:
        """Return the mean of the tasks' means; errors are added in quadrature, degrees of freedom summed."""
        error = sum(estimate.error**2 for estimate in estimates) ** 0.5 / len(estimates)
        mean = statistics.mean(estimate.mean for estimate in estimates)
        return cls(mean, error, sum(estimate.freedom for estimate in estimates))

    @property
    def interval(self) -> float:
        """Half of the 95 % interval, by Student's t."""
        quantiles = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
        known = 0 < self.freedom <= len(quantiles)
        return self.error * (quantiles[self.freedom - 1] if known else 1.96 + 2.6 / max(self.freedom, 1))


def read(path: Path) -> Runs:
    """Return the runs of a file, by what tells them apart."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        runs = [
            {**row, **{name: int(row[name]) for name in ("numbers", "steps", "seed")}}
            | {name: float(row[name]) for name in ("dev", "test")}
            for row in csv.DictReader(file)
        ]
    return {Key(*(run[name] for name in Key._fields)): run for run in runs}


def append(path: Path, run: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Add a run to a file, a line with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(run)


def rates_text(rates: Rates) -> str:
    """Return rates as they stand in the file: `lr=0.01 core_lr=0.03`."""
    return " ".join(f"{name}={value:g}" for name, value in sorted(rates.items()))


def wanted(grid: Definition, runs: Runs) -> Iterator[tuple[Key, Rates] | None]:
    """Yield the runs that a grid asks for, in its order; `None` for one whose rates are not known yet."""
    for entry in grid["runs"]:
        for name in entry["methods"]:
            yield from sweep(grid, entry["modules"], name)
        for seed, task, name in itertools.product(range(entry["seeds"]), entry["tasks"], entry["methods"]):
            rates = best_rates(grid, runs, entry["modules"], name)
            if rates is None:
                yield None
            else:
                yield Key(entry["modules"], name, task, seed, rates_text(rates)), rates


def sweep(grid: Definition, modules: str, name: str) -> list[tuple[Key, Rates]]:
    """Return the trials of the rates of a method; of one rate there is nothing to try."""
    rates = grid["methods"][name]["rates"]
    places = itertools.product(grid["sweep"]["seeds"], grid["sweep"]["tasks"])
    return [
        (Key(modules, name, task, seed, rates_text(tried)), tried)
        for seed, task in places
        for tried in (rates if len(rates) > 1 else ())
    ]


def best_rates(grid: Definition, runs: Runs, modules: str, name: str) -> Rates | None:
    """Return the rates with the best mean score on dev over the sweep, or `None` while trials are missing."""
    rates: list[Rates] = grid["methods"][name]["rates"]
    trials = sweep(grid, modules, name)
    if any(key not in runs for key, _ in trials):
        return None

    def score(tried: Rates) -> float:
        return statistics.mean([runs[key]["dev"] for key, some in trials if some == tried] or [0.0])

    return max(rates, key=score)


def share_of(key: Key, shares: int) -> int:
    """Return which of several processes does a run: all rates of one start fall to the same one."""
    return zlib.crc32("/".join(map(str, key[:4])).encode()) % shares


class Results:
    """Test scores of every method at the rates it has earned; one whose sweep is unfinished is left out.

    Args:
        grid: The definition.
        runs: The runs that are there; those of methods that the definition does not know are left out.
    """

    def __init__(self, grid: Definition, runs: Runs) -> None:
        self.grid, self.n_runs = grid, len(runs)
        self.scores: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
        self.numbers: dict[tuple[str, str], int] = {}
        self.rates: dict[tuple[str, str], Rates] = {}
        for modules, name in dict.fromkeys((key.modules, key.name) for key in runs):
            rates = best_rates(grid, runs, modules, name) if name in grid["methods"] else None
            if rates is not None:
                self.rates[modules, name] = rates
        for key, run in runs.items():
            cell = key.modules, key.name
            if cell in self.rates and key.rates == rates_text(self.rates[cell]):
                self.numbers[cell] = run["numbers"]
                self.scores.setdefault(cell, {}).setdefault(key.task, {})[key.seed] = run["test"]

    def score(self, modules: str, name: str, tasks: Sequence[str]) -> Estimate | None:
        """Return the mean score of a method over tasks; None where one is missing."""
        scores = self.scores.get((modules, name), {})
        if any(task not in scores for task in tasks):
            return None
        return Estimate.over_tasks([Estimate.of(list(scores[task].values())) for task in tasks])

    def above(self, modules: str, name: str, peer: str) -> tuple[Estimate, dict[str, Estimate]]:
        """Return by how much a method is above a peer, in all and by task, from pairs of runs of the same seed."""
        mine, theirs = self.scores[modules, name], self.scores[modules, peer]
        by_task = {}
        for task in self.grid["tasks"]:
            seeds = sorted(mine.get(task, {}).keys() & theirs.get(task, {}).keys())
            if seeds:
                by_task[task] = Estimate.of([mine[task][seed] - theirs[task][seed] for seed in seeds])
        return Estimate.over_tasks(list(by_task.values())), by_task
