"""Memory of a training step above the frozen model's: PEFT's methods, full fine-tuning and ours.

    python benchmarks/bench_memory.py --short
    python benchmarks/bench_memory.py --shape bert-base --batch 8 --length 128 --methods peft_lora lotr --ranks 8 16

Three measures, of the same training step as in bench_train_step.py, each case in a process of its own. *saved*: the
storages that autograd keeps between forward and backward, parameters aside. *allocated*: the peak of torch's own
allocator, parameters included. *resident*: the peak of the process, which knows pages and not tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from multiprocessing import get_context
from typing import Any

import torch

import memory
from grids import Setting, memory_grid, one
from peers import FLOOR, label
from pictures import panels
from records import Row, begin, case_options, parser, progress, resumed, show, size, write

MEASURES = ("saved", "allocated", "resident")
HEADER = (
    "batch × tokens",
    "method",
    "r",
    *(name for m in MEASURES for name in (m, "above floor", "of LoRA")),
)


def measure(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Measure all cases of a setting, one process each, one after the other."""
    context = get_context("forkserver")  # a child has the imports and nothing else
    found: dict[str, dict[str, Any]] = {}
    with progress(str(setting), len(setting.cases)) as bar:
        for case in setting.cases:
            with context.Pool(1) as pool:
                arguments = (setting.shape, setting.batch, setting.length, *case, options.threads)
                found[label(*case)] = pool.apply(memory.measure, arguments)
            bar.advance(bar.task_ids[0])
    return [row(setting, method, rank, found) for method, rank in setting.cases]


def row(setting: Setting, method: str, rank: int | None, found: dict[str, dict[str, Any]]) -> Row:
    """Return what is recorded of one case: bytes, bytes above the floor, and those as a share of LoRA's."""
    mine, floor, lora = (
        found.get(label(*case)) for case in ((method, rank), (FLOOR, None), ("peft_lora", rank))
    )
    assert mine is not None and floor is not None
    above = {m: mine[m] - floor[m] for m in MEASURES if mine[m] is not None}
    return {
        "shape": setting.shape,
        "batch": setting.batch,
        "length": setting.length,
        "method": method,
        "rank": rank,
        **mine,
        "above_floor": above,
        "of_lora": {
            m: round(above[m] / (lora[m] - floor[m]), 4) for m in above if lora and lora[m] != floor[m]
        },
        "of_floor": round(mine["saved"] / floor["saved"], 4),
    }


def cells(row: Row) -> list[str]:
    """Return a row of the table, in MB."""
    shown = [size(row), row["method"], str(row["rank"] or "")]
    for name in MEASURES:
        above, share = row["above_floor"].get(name), row["of_lora"].get(name)
        shown.append("" if row[name] is None else f"{row[name] / 1e6:.1f}")
        shown.append("" if above is None else f"{above / 1e6:+.1f}")
        shown.append("" if share is None else f"{share:.2f}")
    return shown


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    made = parser(__doc__, "memory")
    case_options(made)
    options = made.parse_args()
    begin(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler of each child writes to the terminal
    # the server of children imports once for all of them; it looks for modules where its environment says
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    get_context("forkserver").set_forkserver_preload(["memory"])

    cuda = torch.cuda.is_available()
    settings = memory_grid(options.short, cuda) if options.shape is None else [one(options)]
    rows, missing = resumed(options, settings)
    for setting in missing:
        rows += measure(setting, options)
        write(options.json, "memory", rows)
        panels(rows, "of_floor", "saved by autograd, ratio to the floor", options.picture)
    show(
        "Memory of a training step in MB, above the floor, and that as a share of LoRA's at the same rank",
        HEADER,
        [cells(r) for r in rows],
        2,
    )


if __name__ == "__main__":
    main()
