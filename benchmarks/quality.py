"""What each trained number buys: methods of this library beside PEFT's, on real data, every method tuned alike.

    python benchmarks/quality.py --data ../shared/data --tasks mrpc --seeds 0 --methods 'lora r1' 'lotr gradient r10'
    python benchmarks/quality.py --report

A grid (`quality.yaml`) of methods × targets × tasks × seeds. Each run trains on the training rows, measures dev during
the run and test at its end, and is appended to a file as one line of JSON; runs that are there are not run again, so
the grid can be stopped and continued. For every method, target and task the rates are chosen by the mean dev score.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import peft
import quality_report
import yaml
from rich.console import Console
from rich.progress import track

from lotr.training.data import Columns, load_task
from lotr.training.run import train
from lotr.training.trained import evaluate, load_trained
from lotr_cli.settings import TrainSettings

HERE = Path(__file__).parent
LINES = HERE / "results" / "quality.jsonl"
_KEY = ("task", "target", "method", "seed", "rates")


def runs_of(grid: dict[str, Any], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the runs of a grid, in its order; the seeds are the outermost loop, so that all methods grow together."""
    for seed, target, method, task in itertools.product(
        asked.seeds, asked.targets, asked.methods, asked.tasks
    ):
        rates = grid["methods"][method]["rates"]
        for values in itertools.product(*rates.values()):
            chosen = dict(zip(rates, values, strict=True))
            yield {"task": task, "target": target, "method": method, "seed": seed, "rates": chosen}


def key_of(run: dict[str, Any]) -> str:
    """Return what tells a run from others."""
    return json.dumps({name: run[name] for name in _KEY}, sort_keys=True)


def measure(run: dict[str, Any], grid: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Train one adapter; return its dev scores over the steps and its test score."""
    task, method, modules = (
        grid["tasks"][run["task"]],
        grid["methods"][run["method"]],
        grid["targets"][run["target"]],
    )
    files = split_files(task, data, folder)
    steps = task["steps"]
    common = {**grid["settings"], **run["rates"], "target": ",".join(modules), "seed": run["seed"]}
    settings = TrainSettings(
        model=grid["model"],
        train=files["train"],
        eval=files["dev"],
        output=str(folder / "adapter"),
        max_steps=steps,
        eval_steps=max(1, steps // 5),
        **{**common, **method.get("settings", {"method": run["method"]})},
    )
    config = None
    if "peft" in method:
        fields = {"task_type": "SEQ_CLS", "target_modules": modules, **method["fields"]}
        config = getattr(peft, method["peft"])(**fields)
    report = train(settings, say=lambda line: None, config=config)
    history = json.loads((folder / "adapter" / "metrics.json").read_text())["history"]
    return {
        **run,
        "numbers": report["trained_numbers"]["adapter"],
        "dev": report["accuracy"],
        "test": evaluate(load_trained(folder / "adapter"), files["test"])["accuracy"],
        "history": [(log["step"], log["eval_accuracy"]) for log in history if "eval_accuracy" in log],
        "kept": report["begun"].get("kept"),
        "seconds": report["seconds"],
    }


def split_files(task: dict[str, Any], data: Path, folder: Path) -> dict[str, str]:
    """Return the three files of a task; of a built-in set a fifth of the training rows is dev."""
    if "dev" in task:
        return {part: str(data / task[part]) for part in ("train", "dev", "test")}
    loaded = load_task(task["train"], None, Columns("text", "text2", "label"), None, seed=0)
    parts = loaded.train.train_test_split(test_size=0.2, seed=0)
    found = {"train": parts["train"], "dev": parts["test"], "test": loaded.eval}
    for name, rows in found.items():
        rows.select_columns(["text", "label"]).to_csv(folder / f"{name}.csv")
    return {name: str(folder / f"{name}.csv") for name in found}


def main() -> None:
    """Run what is missing of the grid, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=HERE / "quality.yaml")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with the tasks' files"
    )
    parser.add_argument("--lines", type=Path, default=LINES, help="where runs are kept, one line each")
    for name in ("methods", "tasks", "targets"):
        parser.add_argument(f"--{name}", nargs="+", help=f"some of the grid's {name}")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    grid = yaml.safe_load(asked.grid.read_text())
    for name in ("methods", "tasks", "targets", "seeds"):
        given = getattr(asked, name)
        unknown = [entry for entry in given or () if entry not in grid[name]]
        if unknown:
            parser.error(
                f"--{name}: {unknown[0]!r} is not in {asked.grid}; it has {', '.join(map(str, grid[name]))}"
            )
        setattr(asked, name, given or list(grid[name]))

    done = {key_of(run) for run in quality_report.read(asked.lines)}
    todo = [] if asked.report else [run for run in runs_of(grid, asked) if key_of(run) not in done]
    asked.lines.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for run in track(todo, description="runs", console=Console(stderr=True)):
        if time.monotonic() - started > 60 * asked.minutes:
            break
        with tempfile.TemporaryDirectory() as folder, asked.lines.open("a") as lines:
            lines.write(json.dumps(measure(run, grid, asked.data, Path(folder)), sort_keys=True) + "\n")
    quality_report.show(quality_report.read(asked.lines))


if __name__ == "__main__":
    main()
