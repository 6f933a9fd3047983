"""Seconds of a training step beside the frozen model's: PEFT's methods, full fine-tuning and ours.

    python benchmarks/bench_train_step.py --short
    python benchmarks/bench_train_step.py --shape bert-base --batch 8 --length 128 --methods peft_lora lotr --ranks 8 16

A step sets the gradients to none, runs forward, backward and AdamW over the trained numbers. All linear modules of the
blocks are adapted; no dropout, one attention kernel, the same tokens. The floor is the frozen model with gradients
flowing through every layer and no adapter. Every ratio is the median over rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse

import torch

from grids import Setting, grid, one
from peers import FLOOR, MKL, label, make, mkl_alone, trained, training_step
from pictures import panels
from records import (
    Row,
    begin,
    case_options,
    keep_memory,
    parser,
    progress,
    ratio,
    resumed,
    rounded,
    show,
    size,
    write,
)
from shapes import batch_for, build
from timing import Samples, interleaved

HEADER = ("batch × tokens", "method", "r", "trained", "ms a step", "of the floor", "of LoRA, same r")


def measure(setting: Setting, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time all cases of a setting beside each other."""
    base = build(setting.shape, device)
    batch = batch_for(base, setting.batch, setting.length)
    models = {label(*case): make(*case, setting.shape, base) for case in setting.cases}
    steps = {name: training_step(model, batch) for name, model in models.items()}
    steps |= {name: mkl_alone(steps[name]) for name in steps if MKL in name}
    with progress(str(setting), len(steps) * (options.rounds + 1)) as bar:
        samples = interleaved(
            steps,
            options.rounds,
            device,
            patience=options.patience,
            tick=lambda: bar.advance(bar.task_ids[0]),
        )
    counts = {name: sum(p.numel() for p in trained(model)) for name, model in models.items()}
    return [row(setting, method, rank, counts, samples) for method, rank in setting.cases]


def row(setting: Setting, method: str, rank: int | None, counts: dict[str, int], samples: Samples) -> Row:
    """Return what is recorded of one case."""
    name, lora = label(method, rank), label("peft_lora", rank)
    return {
        "shape": setting.shape,
        "batch": setting.batch,
        "length": setting.length,
        "method": method,
        "rank": rank,
        "trained": counts[name],
        "seconds": rounded(samples.spread(name)),
        "of_floor": rounded(samples.ratio(name, FLOOR)),
        "of_lora": rounded(samples.ratio(name, lora)),
        "rounds": [float(f"{seconds:.4g}") for seconds in samples.seconds[name]],
        "disturbed": samples.disturbed,
    }


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [
        size(row),
        row["method"],
        str(row["rank"] or ""),
        f"{row['trained']:,}",
        f"{1e3 * row['seconds']['median']:.1f}",
        ratio(row["of_floor"]),
        ratio(row["of_lora"]),
    ]


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    made = parser(__doc__, "train_step")
    case_options(made)
    options = made.parse_args()
    keep_memory()
    device = begin(options)

    settings = grid(options.short, device.type == "cuda") if options.shape is None else [one(options)]
    rows, missing = resumed(options, settings)
    for setting in missing:
        rows += measure(setting, options, device)
        write(options.json, "train_step", rows)
        panels(rows, "of_floor", "step, ratio to the floor", options.picture)
    show("Training step; median and quartiles of ratios within a round", HEADER, [cells(r) for r in rows], 2)


if __name__ == "__main__":
    main()
