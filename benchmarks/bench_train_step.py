"""Seconds of a training step beside the frozen model's: PEFT's methods, full fine-tuning and ours.

    python benchmarks/bench_train_step.py --short
    python benchmarks/bench_train_step.py --shapes bert-base --methods peft_lora lotr --rank 8
    python benchmarks/bench_train_step.py --shapes minilm --compiled

A step sets the gradients to none, runs forward, backward and AdamW over the trained numbers. All linear modules of the
blocks are adapted; no dropout, one attention kernel, the same tokens. The frozen model has gradients flowing through
every layer and no adapter. Every ratio is the median over rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from peers import FROZEN, LORA, case_options, make, settings, trained, training_step, variant, with_graphs
from records import Row, begin, keep_memory, parser, progress, ratio, rounded, show, write
from shapes import batch_for, build
from timing import interleaved

HEADER = ("batch × tokens", "method", "trained", "ms a step", "of the frozen model", "of LoRA")


def measure(
    setting: tuple[str, int, int, list[str]], options: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Time all methods beside each other."""
    shape, size, length, methods = setting
    if options.compiled:
        methods = with_graphs(shape, size, methods)
    base = build(shape, device)
    batch = batch_for(base, size, length)
    models = {method: make(method, options.rank, shape, base) for method in methods}
    steps = {method: variant(method, training_step(model, batch)) for method, model in models.items()}
    with progress(shape, len(steps) * (options.rounds + 1)) as bar:
        tick = partial(bar.advance, bar.task_ids[0])
        clock = time.process_time if options.processor_time else time.perf_counter
        samples = interleaved(steps, options.rounds, device, tick, clock=clock)
    return [
        {
            "shape": shape,
            "batch": size,
            "length": length,
            "method": method,
            "rank": options.rank,
            "trained": sum(p.numel() for p in trained(model)),
            "seconds": rounded(samples.spread(method)),
            "of_frozen": rounded(samples.ratio(method, FROZEN)),
            "of_lora": rounded(samples.ratio(method, LORA)),
            "disturbed": samples.disturbed,
        }
        for method, model in models.items()
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    size = f"{row['shape']} {row['batch']}×{row['length']}"
    seconds = f"{1e3 * row['seconds']['median']:.1f}"
    ratios = ratio(row["of_frozen"]), ratio(row["of_lora"])
    return [size, row["method"], f"{row['trained']:,}", seconds, *ratios]


def main() -> None:
    """Measure, print the table, write the record."""
    parsed = parser(__doc__, "train_step")
    case_options(parsed)
    parsed.add_argument("--compiled", action="store_true", help="on MiniLM also by torch.compile")
    parsed.add_argument(
        "--processor-time", action="store_true", help="of all threads, for a machine that is busy otherwise"
    )
    options = parsed.parse_args()
    keep_memory()
    device = begin(options)
    rows: list[Row] = []
    for setting in settings(options, device):
        rows += measure(setting, options, device)
        write(options.json, rows)
    title = f"Training step, rank {options.rank}; median and quartiles of ratios within a round"
    show(title, HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
