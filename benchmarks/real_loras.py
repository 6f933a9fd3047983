"""Real LoRAs for the benchmarks of compression: tasks on MiniLM, trained with PEFT, and what scores them.

A family is the same tasks, trained from other starts. Everything is kept in a folder, adapters and results, so
a benchmark that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import lotr
from lotr.compression.scores import Before, measure_adapters, measure_bank
from lotr.files.peft_lora import read_lora
from lotr.training.data.docstrings import load_docstrings
from lotr.training.trained import load_trained

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import demo_bank

Row = dict[str, Any]
Pairs = dict[str, tuple[Tensor, Tensor]]  # module → A, B
Scores = dict[str, float]
RANK, MOST = 8, {"train": 1100, "test": 400}
SETS = ("reviews_books", "reviews_dvd", "reviews_kitchen", "sst2")
WEIGHTS = "adapter_model.safetensors"
#: How the A of a family begins: each adapter at one of its own, all at one, or all at one that is not trained.
STARTS = ("own", "one", "fixed")


class Start(TrainerCallback):
    """Draws every A of a LoRA anew, as PEFT draws them, from a seed that does not depend on the task's classes."""

    def __init__(self, seed: int, is_fixed: bool) -> None:
        self.seed, self.is_fixed = seed, is_fixed

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Replace them before the first step."""
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                parameter.data.uniform_(-bound, bound, generator=generator)
                parameter.requires_grad_(not self.is_fixed)


class Family:
    """The adapters of all tasks that began in one way.

    Args:
        work: Folder of everything.
        data: Folder with the sets of reviews and sentences; without it docstrings alone remain.
        start: One of `STARTS`.
        targets: `--target-modules` of the training; `None`: query and value.
        tasks: How many.
        lr: Learning rate of LoRA's matrices.
    """

    def __init__(
        self,
        work: Path,
        data: Path | None,
        start: str,
        targets: str | None,
        tasks: int,
        lr: float = 2e-3,
    ) -> None:
        self.start, self.targets, self.lr = start, targets, lr
        self.name = f"{start}-{'qv' if targets is None else targets}"
        self.work, self.files = work, write_tasks(work / "data", data, tasks)
        self.folders = {name: work / "loras" / self.name / name for name in self.files}
        for n in range(len(self.files)):
            self._train(n)

    def _train(self, n: int) -> None:
        name, folder = list(self.folders.items())[n]
        if (folder / "metrics.json").is_file():
            return
        print(f"training {self.name}: {name}", flush=True)
        lotr.train(
            model="minilm",
            train=self.files[name]["train"],
            eval=self.files[name]["test"],
            output=str(folder),
            method="peft_lora",
            rank=str(RANK),
            target_modules=self.targets,
            max_length=32,
            epochs=3 if name in SETS else 12,  # docstrings have 80 rows
            lr=self.lr,
            eval_steps=10_000,
            callbacks=[Start(0 if self.start != "own" else 1 + n, self.start == "fixed")],
            say=lambda line: None,
            overwrite=True,
        )

    @cached_property
    def pairs(self) -> dict[str, Pairs]:
        """The updates of every task."""
        return {name: pairs_of(folder) for name, folder in self.folders.items()}

    def scores_before(self) -> Scores:
        """Return the accuracy of every adapter by itself."""
        return {of.source.name: of.score for of in self.before}

    @cached_property
    def before(self) -> list[Before]:
        """The adapters as `lotr compress --evaluate` measures them."""
        tests = {name: str(Path(of_task["test"]).resolve()) for name, of_task in self.files.items()}
        (self.work / "tasks.yaml").write_text(json.dumps(tests))
        return measure_adapters(self.work / "tasks.yaml", self.folders, None, quiet)

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {name: load_trained(folder) for name, folder in self.folders.items()}

    def scores_with(self, after: dict[str, Pairs]) -> Scores:
        """Return the accuracy of each task with other matrices and the head that it has."""
        scores = {}
        for name, pairs in after.items():
            trained = self._loaded[name]
            for path, module in trained.model.base_model.model.named_modules():
                if hasattr(module, "lora_A"):
                    none = torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)
                    A, B = pairs.get(path, none)
                    module.lora_A["default"].weight = nn.Parameter(A)
                    module.lora_B["default"].weight = nn.Parameter(B / module.scaling["default"])
            scores[name] = float(lotr.evaluate(trained, self.files[name]["test"])["accuracy"])
        return scores

    def scores_in(self, bank: Path, names: list[str] | None = None) -> Scores:
        """Return the accuracy of tasks of a bank."""
        before = [of for of in self.before if names is None or of.source.name in names]
        return {name: of["score_after"] for name, of in measure_bank(before, bank, None, quiet).items()}

    def head_bytes(self, names: list[str]) -> int:
        """Return the bytes of some tasks' heads."""
        heads = (read_lora(self.folders[name]).head() for name in names)
        return sum(tensor.numel() * tensor.element_size() for head in heads for tensor in head.values())

    @property
    def numbers(self) -> int:
        """Numbers of all updates."""
        return sum(A.numel() + B.numel() for own in self.pairs.values() for A, B in own.values())


class Results:
    """A line of JSON a result, so that what was measured once is not measured again.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )

    def of(self, row: Row, names: list[str]) -> Row:
        """Return the row that was measured with the same values of some names; empty where there is none."""
        same = {"measured", *names}
        own = {name: value for name, value in row.items() if name in same}
        return next(
            (other for other in self.rows if {n: v for n, v in other.items() if n in same} == own), {}
        )

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        """Return the row that has these values, measured now where there is none yet."""
        for row in self.rows:
            if key.items() <= row.items():
                return row
        row = key | measure()
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name != "scores"}), flush=True)
        return row


def quiet(what: str, done: int, of: int) -> None:
    """Show no progress."""


def options(what: str, tasks: int) -> argparse.ArgumentParser:
    """Return a parser with the options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with reviews_books, … and sst2")
    parser.add_argument("--tasks", type=int, default=tasks)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/compress_loras"),
        help="adapters and results; a run goes on there",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="page whose tables are written anew")
    return parser


def write_tasks(folder: Path, data: Path | None, n: int) -> dict[str, dict[str, str]]:
    """Write the rows of the tasks: reviews and sentences where they are at hand, then docstrings."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, demo_bank.Rows] = {}
    for name in SETS if data else ():
        assert data is not None
        tasks[name] = {split: _rows(data / name, split) for split in MOST}
    tasks |= {name.replace(" ", "_"): rows for name, rows in demo_bank.tasks_of(load_docstrings()).items()}
    files = {}
    for name, rows in list(tasks.items())[:n]:
        files[name] = {split: str(folder / f"{name}-{split}.csv") for split in MOST}
        for split, path in files[name].items():
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(rows[split])
    return files


def texts_of(folder: Path, split: str) -> list[str]:
    """Return the texts of a set in the order that rows are drawn in."""
    return [row["text"] for row in _all_rows(folder, split)]


def _rows(folder: Path, split: str) -> list[dict[str, str]]:
    return _all_rows(folder, split)[: MOST[split]]


def _all_rows(folder: Path, split: str) -> list[dict[str, str]]:
    names = [
        path
        for path in sorted(folder.iterdir())
        if split in path.name or (split == "test" and "dev" in path.name)
    ]
    with names[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if names[0].suffix == ".tsv" else ","))
    text = "text" if "text" in rows[0] else "sentence"
    random.Random(0).shuffle(rows)
    return [{"text": row[text], "label": row["label"]} for row in rows]


def pairs_of(folder: Path) -> Pairs:
    """Return `A` and `B` of every module of a LoRA, with the scaling in `B`."""
    lora = read_lora(folder)
    return {module: lora.matrices(module) for module in lora.keys}


def error_of(before: dict[str, Pairs], after: dict[str, Pairs]) -> float:
    """Return the root of the mean of the tasks' squared relative errors, as the bank has it."""
    squares = []
    for name, own in before.items():
        lost = energy = 0.0
        for module, (A, B) in own.items():
            dW = B @ A
            new = after[name].get(module)
            lost += float((dW - new[1] @ new[0] if new else dW).square().sum())
            energy += float(dW.square().sum())
        squares.append(lost / energy)
    return (sum(squares) / len(squares)) ** 0.5


def mean(scores: Scores, names: list[str] | None = None) -> float:
    """Return the mean of the scores of some tasks, or of all."""
    own = [score for name, score in scores.items() if names is None or name in names]
    return sum(own) / len(own)
