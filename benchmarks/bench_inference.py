"""Seconds of a forward pass beside the base model's: adapters as they are, and merged.

    python benchmarks/bench_inference.py --short
    python benchmarks/bench_inference.py --shape bert-base --batch 8 --length 128 --methods peft_lora lotr --ranks 8 16

One adapter, all linear modules of the blocks, evaluation mode, `torch.inference_mode`. Every ratio is the median over
rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse

import torch

from grids import Setting, forward, grid, one
from peers import BASE, MKL, inference_step, label, make, mkl_alone
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
from timing import interleaved

HEADER = ("batch × tokens", "method", "r", "ms", "of the base", "of LoRA, same r")


def measure(setting: Setting, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time all cases of a setting beside each other."""
    base = build(setting.shape, device)
    batch = batch_for(base, setting.batch, setting.length)
    models = {label(*case): make(*case, setting.shape, base) for case in setting.cases}
    runs = {name: inference_step(model, batch) for name, model in models.items()}
    runs |= {name: mkl_alone(runs[name]) for name in runs if MKL in name}
    with progress(str(setting), len(runs) * (options.rounds + 1)) as bar:
        samples = interleaved(
            runs,
            options.rounds,
            device,
            patience=options.patience,
            tick=lambda: bar.advance(bar.task_ids[0]),
        )
    return [
        {
            "shape": setting.shape,
            "batch": setting.batch,
            "length": setting.length,
            "method": method,
            "rank": rank,
            "seconds": rounded(samples.spread(label(method, rank))),
            "of_base": rounded(samples.ratio(label(method, rank), BASE)),
            "of_lora": rounded(samples.ratio(label(method, rank), label("peft_lora", rank))),
            "disturbed": samples.disturbed,
        }
        for method, rank in setting.cases
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [
        size(row),
        row["method"],
        str(row["rank"] or ""),
        f"{1e3 * row['seconds']['median']:.1f}",
        ratio(row["of_base"]),
        ratio(row["of_lora"]),
    ]


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    made = parser(__doc__, "inference")
    case_options(made)
    options = made.parse_args()
    keep_memory()
    device = begin(options)

    settings = grid(options.short, device.type == "cuda") if options.shape is None else [one(options)]
    rows, missing = resumed(options, settings)
    for setting in missing:
        rows += measure(forward(setting), options, device)
        write(options.json, "inference", rows)
        panels(rows, "of_base", "forward pass, ratio to the base", options.picture)
    show("Forward pass; median and quartiles of ratios within a round", HEADER, [cells(r) for r in rows], 2)


if __name__ == "__main__":
    main()
