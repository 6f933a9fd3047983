"""Seconds before the first step and after the last: import, wrap, save, load, merge, unmerge, beside PEFT's LoRA.

    python benchmarks/bench_start.py --short

A model of BERT-base's shape, all linear modules of its blocks, rank 16. The import is measured in processes of their
own, on top of `import peft`. Ratios are medians over rounds of a ratio within a round. A merge adds the update to all
weights of a model whose weights and cores have been read before, so it does not wait for the system's memory.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peers import ADAPTERS, LORA
from records import Row, begin, keep_memory, parser, progress, ratio, rounded, show, write
from shapes import SHAPES, build
from timing import Spread, interleaved

METHODS = (LORA, "peft_dora", "lotr", "lotr_cores", "lotr_per_output")
HEADER = ("what", "method", "ms", "of LoRA")
IMPORTS = """
import time; start = time.perf_counter()
import peft; middle = time.perf_counter()
import lotr; print(middle - start, time.perf_counter() - middle)
"""


class Adapter:
    """An adapter of one method, from the wrapping to the merged model."""

    def __init__(self, method: str, rank: int, shape: str, base: PreTrainedModel, folder: Path) -> None:
        self.base, self.folder = base, folder / method
        self.config = ADAPTERS[method](rank, list(SHAPES[shape].linears))
        self.model = get_peft_model(copy.deepcopy(base), self.config)  # weights of its own, to be merged
        for parameter in self.model.parameters():  # an update of zero may take another path
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=1e-3)
        self.model.save_pretrained(self.folder)
        self.bare: Any = None

    def fresh(self) -> None:
        self.bare = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def be_merged(self, merged: bool) -> None:
        if bool(self.model.get_model_status().merged_adapters) != merged:
            (self.model.merge_adapter if merged else self.model.unmerge_adapter)()

    def actions(self) -> dict[str, tuple[Callable[[], Any], Callable[[], None] | None]]:
        """Return what is timed, and what has to come before."""
        return {
            "wrap": (lambda: get_peft_model(self.bare, self.config), self.fresh),
            "save": (lambda: self.model.save_pretrained(self.folder), None),
            "load": (lambda: PeftModel.from_pretrained(self.bare, self.folder), self.fresh),
            "merge": (lambda: self.model.merge_adapter(), lambda: self.be_merged(False)),
            "unmerge": (lambda: self.model.unmerge_adapter(), lambda: self.be_merged(True)),
        }


def imports(rounds: int) -> list[Row]:
    """Return the seconds of `import peft`, and of `import lotr` after it."""
    times = []
    with progress("import", rounds + 1) as bar:
        for _ in range(rounds + 1):  # the first fills the caches
            command = [sys.executable, "-c", IMPORTS]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            times.append([float(seconds) for seconds in answer.split()])
            bar.advance(bar.task_ids[0])
    host, ours = (Spread.of(list(seconds)) for seconds in zip(*times[1:], strict=True))
    names = (("peft", host), ("lotr, on top", ours))
    return [
        {"action": "import", "method": name, "seconds": rounded(spread), "of_lora": None}
        for name, spread in names
    ]


def actions(shape: str, rank: int, rounds: int, device: torch.device) -> list[Row]:
    """Time everything else, all methods beside each other."""
    base = build(shape, device)
    with tempfile.TemporaryDirectory() as folder:
        adapters = {method: Adapter(method, rank, shape, base, Path(folder)) for method in METHODS}
        steps = {
            (action, method): pair for method, a in adapters.items() for action, pair in a.actions().items()
        }
        with progress("wrap, save, load, merge", len(steps) * (rounds + 1)) as bar:
            samples = interleaved(
                {" ".join(name): run for name, (run, _) in steps.items()},
                rounds,
                device,
                lambda: bar.advance(bar.task_ids[0]),
                {" ".join(name): first for name, (_, first) in steps.items() if first is not None},
            )
    return [
        {
            "action": action,
            "method": method,
            "seconds": rounded(samples.spread(f"{action} {method}")),
            "of_lora": rounded(samples.ratio(f"{action} {method}", f"{action} {LORA}")),
            "disturbed": samples.disturbed,
        }
        for action, method in sorted(steps, key=lambda name: list(adapters[LORA].actions()).index(name[0]))
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [row["action"], row["method"], f"{1e3 * row['seconds']['median']:.1f}", ratio(row["of_lora"])]


def main() -> None:
    """Measure, print the table, write the record."""
    parsed = parser(__doc__, "start")
    parsed.add_argument("--shape", choices=SHAPES, default="bert-base")
    options = parsed.parse_args()
    keep_memory()
    device = begin(options)
    rows = imports(options.rounds)
    rows += actions(options.shape, options.rank, max(options.rounds, 5), device)
    write(options.json, rows, shape=options.shape, rank=options.rank)
    title = f"{options.shape}, rank {options.rank}; median and quartiles of ratios within a round"
    show(title, HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
