"""Seconds before the first step and after the last: import, wrap, save, load, merge, unmerge, beside PEFT's LoRA.

    python benchmarks/bench_start.py --short

A model of BERT-base's shape, all linear modules of its blocks, rank 16. The import is measured in processes of their
own, on top of `import peft`. Ratios are medians over rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peers import ADAPTERS
from pictures import bars
from records import Row, begin, parser, progress, ratio, rounded, show, write
from shapes import SHAPES, build
from timing import Samples, Spread, interleaved

METHODS = ("peft_lora", "peft_dora", "lotr", "lotr_cores", "lotr_per_output")
RANK = 16
HEADER = ("what", "method", "ms", "of LoRA")
IMPORTS = """
import time; start = time.perf_counter()
import peft; middle = time.perf_counter()
import lotr; print(middle - start, time.perf_counter() - middle)
"""


class Life:
    """An adapter of one method, from the wrapping to the merged model."""

    def __init__(self, method: str, shape: str, base: PreTrainedModel, folder: Path) -> None:
        self.base, self.folder = base, folder / method
        self.config = ADAPTERS[method](RANK, list(SHAPES[shape].linears))
        self.model = get_peft_model(copy.deepcopy(base), self.config)  # weights of its own, to be merged
        self.model.save_pretrained(self.folder)
        self.bare: Any = None

    def fresh(self) -> None:
        self.bare = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def wrap(self) -> None:
        get_peft_model(self.bare, self.config)

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def load(self) -> None:
        PeftModel.from_pretrained(self.bare, self.folder)

    def is_merged(self, wanted: bool) -> None:
        merged = bool(self.model.get_model_status().merged_adapters)
        if merged != wanted:
            self.merge() if wanted else self.unmerge()

    def merge(self) -> None:
        self.model.merge_adapter()

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def actions(self) -> dict[str, tuple[Callable[[], None], Callable[[], None] | None]]:
        """Return what is timed, and what has to come before."""
        return {
            "wrap": (self.wrap, self.fresh),
            "save": (self.save, None),
            "load": (self.load, self.fresh),
            "merge": (self.merge, lambda: self.is_merged(False)),
            "unmerge": (self.unmerge, lambda: self.is_merged(True)),
        }


def imports(rounds: int) -> list[Row]:
    """Return the seconds of `import peft`, and of `import lotr` after it."""
    times = []
    with progress("import", rounds + 1) as bar:
        for _ in range(rounds + 1):  # the first fills the caches
            said = subprocess.run(
                [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
            ).stdout
            times.append([float(seconds) for seconds in said.split()])
            bar.advance(bar.task_ids[0])
    host, ours = (Spread.of(list(seconds)) for seconds in zip(*times[1:], strict=True))
    return [
        {"action": "import", "method": name, "seconds": rounded(spread), "of_lora": None}
        for name, spread in (("peft", host), ("lotr, on top", ours))
    ]


def lives(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time everything else, all methods beside each other."""
    base = build(options.shape, device)
    with tempfile.TemporaryDirectory() as folder:
        made = {method: Life(method, options.shape, base, Path(folder)) for method in METHODS}
        steps = {f"{action} {m}": pair for m, life in made.items() for action, pair in life.actions().items()}
        with progress("wrap, save, load, merge", len(steps) * (options.rounds + 1)) as bar:
            samples = interleaved(
                {name: run for name, (run, _) in steps.items()},
                options.rounds,
                device,
                patience=options.patience,
                tick=lambda: bar.advance(bar.task_ids[0]),
                before={name: first for name, (_, first) in steps.items() if first is not None},
            )
    actions = next(iter(made.values())).actions()
    return [row(action, method, samples) for action in actions for method in METHODS]


def row(action: str, method: str, samples: Samples) -> Row:
    """Return what is recorded of one action of one method."""
    name = f"{action} {method}"
    return {
        "action": action,
        "method": method,
        "seconds": rounded(samples.spread(name)),
        "of_lora": rounded(samples.ratio(name, f"{action} peft_lora")),
        "disturbed": samples.disturbed,
    }


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [row["action"], row["method"], f"{1e3 * row['seconds']['median']:.1f}", ratio(row["of_lora"])]


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    made = parser(__doc__, "start")
    made.add_argument("--shape", choices=SHAPES, default="bert-base")
    options = made.parse_args()
    device = begin(options)
    rows = imports(options.rounds) + lives(options, device)
    write(options.json, "start", rows, shape=options.shape, rank=RANK)
    shown = [
        [r["action"], r["method"], f"{1e3 * r['seconds']['median']:.1f}", ratio(r["of_lora"])] for r in rows
    ]
    show(f"{options.shape}, rank {RANK}; median and quartiles of ratios within a round", HEADER, shown, 2)
    bars(rows[2:], "ratio to PEFT's LoRA", options.picture)


if __name__ == "__main__":
    main()
