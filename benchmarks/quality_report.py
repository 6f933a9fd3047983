"""What the runs of `quality.py` say: means with errors, paired differences, steps; and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from quality_grid import Done, Rates, Run, recipe, tried_rates

Row = dict[str, Any]
Estimate = tuple[float, float]  # a mean and its standard error


class Results:
    """The runs with the rates that each method has earned; a method whose sweep is unfinished is left out.

    Args:
        grid: The grid.
        done: The runs that are there.
    """

    def __init__(self, grid: dict[str, Any], done: Done) -> None:
        runs = [run for run in done.values() if run.get("recipe") == recipe(grid, run)]
        self.grid, self.n_runs = grid, len(runs)
        #: Runs of other settings than the grid's, which are left out.
        self.n_others = len(done) - len(runs)
        self.cells: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
        #: Of each target and method the rates that were tried, the best first.
        self.tried: dict[tuple[str, str], list[Rates]] = {}
        for run in runs:
            cell = run["target"], run["method"]
            if cell not in self.tried:
                self.tried[cell] = [rates for rates, _ in tried_rates(grid, done, *cell)]
            swept = len(self.tried[cell]) == len(grid["methods"][run["method"]]["rates"])
            if swept and run["rates"] == self.tried[cell][0]:  # with rates untried, a score would be unfair
                self.cells.setdefault(cell, {}).setdefault(run["task"], {})[run["seed"]] = run

    @property
    def tasks(self) -> list[str]:
        """The tasks that have results, in the grid's order."""
        found = {task for tasks in self.cells.values() for task in tasks}
        return [task for task in self.grid["tasks"] if task in found]

    def rows(self) -> list[Row]:
        """Return one entry a target and method, the smallest first."""
        order = list(self.grid["targets"])
        rows = [self._row(*cell) for cell in self.cells]
        return sorted(rows, key=lambda row: (order.index(row["target"]), row["numbers"], row["method"]))

    def _row(self, target: str, method: str) -> Row:
        tasks = self.cells[target, method]
        scores = {
            task: estimate([run["test"] for run in tasks[task].values()])
            for task in self.grid["tasks"]
            if task in tasks
        }
        frontier = self.grid["frontier"]
        whole = all(task in scores for task in frontier)
        some = next(iter(tasks.values()))
        return {
            "target": target,
            "method": method,
            "family": family(self.grid["methods"][method]),
            "more": more_steps(self.grid, method, next(iter(scores))),
            "numbers": next(iter(some.values()))["numbers"],
            "rates": next(iter(some.values()))["rates"],
            "seeds": min(len(runs) for runs in tasks.values()),
            "tasks": scores,
            "test": over_tasks([scores[task] for task in frontier]) if whole else None,
        }

    def against(self, target: str, method: str, peer: str) -> tuple[dict[str, Estimate], int, int]:
        """Return by how much a method is above a peer: task by task, and `all`, from runs of the same seed.

        Beside it how many seeds the tasks have at least (an error from two is a guess), and the degrees of freedom.
        """
        mine, theirs = self.cells.get((target, method), {}), self.cells.get((target, peer), {})
        found, fewest, freedom = {}, 0, 0
        for task in self.grid["tasks"]:
            seeds = sorted(mine.get(task, {}).keys() & theirs.get(task, {}).keys())
            if seeds:
                found[task] = estimate([mine[task][s]["test"] - theirs[task][s]["test"] for s in seeds])
                fewest = min(fewest or len(seeds), len(seeds))
                freedom += len(seeds) - 1
        return ({**found, "all": over_tasks(list(found.values()))} if found else {}), fewest, freedom

    def steps(self, target: str, method: str, peer: str, share: float = 0.95) -> dict[str, Estimate]:
        """Return how many steps a method needs to reach a share of the peer's last dev score, task by task.

        A run that never does counts with all its steps.
        """
        mine, theirs = self.cells.get((target, method), {}), self.cells.get((target, peer), {})
        found = {}
        for task in self.grid["tasks"]:
            needed = []
            for seed in sorted(mine.get(task, {}).keys() & theirs.get(task, {}).keys()):
                history = mine[task][seed].get("history", ())
                if len(history) > 1:
                    goal = share * theirs[task][seed]["dev"]
                    needed.append(next((step for step, dev in history if dev >= goal), history[-1][0]))
            if needed:
                found[task] = estimate(needed)
        return found


def more_steps(grid: dict[str, Any], name: str, task: str) -> int:
    """Return how many steps more than a task has a method takes, those of a trial in its start among them."""
    method, has = grid["methods"][name], grid["tasks"][task]["steps"]
    settings = method.get("settings", {})
    trial = settings["start_batches"] if method["fields"].get("start") == "update" else 0
    taken: int = settings.get("steps", has) + trial - has
    return taken


def family(method: dict[str, Any]) -> str:
    """Return whose a method is.

    `lotr`; `table`: others', as rows of this library, the authors' LoTR among them; `lora`: LoRA with this library's
    start; `peft`; or `head`, without any.
    """
    if "peft" in method:
        return "peft"
    fields = method["fields"]
    if "target_modules" in fields:
        return "head"
    if fields["method"] == "lora":
        return "lora"
    return (
        "lotr"
        if fields["method"] in ("lotr", "lotr_joint") and fields.get("start") != "gaussian"
        else "table"
    )


#: How many standard errors the 95 % interval has on each side, with 1, 2, … degrees of freedom.
_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    return _QUANTILES[freedom - 1] if 0 < freedom <= len(_QUANTILES) else 1.96 + 2.6 / max(freedom, 1)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its standard error, which one value alone does not have."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over tasks; its error is that of the tasks' means, added in quadrature."""
    errors = sum(error**2 for _, error in estimates) ** 0.5
    return statistics.mean(mean for mean, _ in estimates), errors / len(estimates)


def show(results: Results) -> None:
    """Print the table."""
    tasks = results.tasks
    table = Table(
        title=f"Test accuracy, rates chosen on dev; {results.n_runs} runs. "
        f"Mean: of {', '.join(results.grid['frontier'])}.",
        title_justify="left",
    )
    for name in ("target", "method", "numbers", "seeds", *tasks, "mean", "± error"):
        table.add_column(name, justify="left" if name in ("target", "method") else "right")
    for row in results.rows():
        scores = [f"{row['tasks'][task][0]:.4f}" if task in row["tasks"] else "" for task in tasks]
        mean = [f"{value:.4f}" for value in row["test"] or ()] or ["", ""]
        table.add_row(row["target"], row["method"], f"{row['numbers']:,}", str(row["seeds"]), *scores, *mean)
    console = Console(width=160)
    console.print(table)
    if results.n_others:
        console.print(
            f"{results.n_others} runs of other settings, or of methods that are gone, are left out."
        )
