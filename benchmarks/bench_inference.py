"""Seconds of a forward pass beside the frozen model's: adapters as they are, merged, and compiled.

    python benchmarks/bench_inference.py --short
    python benchmarks/bench_inference.py --shapes minilm --compiled

One adapter, all linear modules of the blocks, evaluation mode, `torch.inference_mode`. Every ratio is the median over
rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse

import torch

from peers import (
    FROZEN,
    FULL,
    LORA,
    MERGED,
    case_options,
    inference_step,
    make,
    settings,
    variant,
    with_graphs,
)
from records import Row, begin, keep_memory, parser, progress, ratio, rounded, show, write
from shapes import batch_for, build
from timing import interleaved

HEADER = ("batch × tokens", "method", "ms", "of the frozen model", "of LoRA")


def measure(
    setting: tuple[str, int, int, list[str]], options: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Time all methods beside each other."""
    shape, size, length, methods = setting
    methods = [name for name in methods if name != FULL]
    methods += [name + MERGED for name in (LORA, "lotr") if name in methods]
    if options.compiled:
        methods = with_graphs(shape, size, methods)
    base = build(shape, device)
    batch = batch_for(base, size, length)
    models = {method: make(method, options.rank, shape, base, trains=False) for method in methods}
    runs = {method: variant(method, inference_step(model, batch)) for method, model in models.items()}
    with progress(shape, len(runs) * (options.rounds + 1)) as bar:
        samples = interleaved(runs, options.rounds, device, lambda: bar.advance(bar.task_ids[0]))
    return [
        {
            "shape": shape,
            "batch": size,
            "length": length,
            "method": method,
            "rank": options.rank,
            "seconds": rounded(samples.spread(method)),
            "of_frozen": rounded(samples.ratio(method, FROZEN)),
            "of_lora": rounded(samples.ratio(method, LORA)),
            "disturbed": samples.disturbed,
        }
        for method in methods
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    size = f"{row['shape']} {row['batch']}×{row['length']}"
    seconds = f"{1e3 * row['seconds']['median']:.1f}"
    return [size, row["method"], seconds, ratio(row["of_frozen"]), ratio(row["of_lora"])]


def main() -> None:
    """Measure, print the table, write the record."""
    parsed = parser(__doc__, "inference")
    case_options(parsed)
    parsed.add_argument("--compiled", action="store_true", help="on MiniLM also by torch.compile")
    options = parsed.parse_args()
    keep_memory()
    device = begin(options)
    rows: list[Row] = []
    for setting in settings(options, device):
        rows += measure(setting, options, device)
        write(options.json, rows)
    title = f"Forward pass, rank {options.rank}; median and quartiles of ratios within a round"
    show(title, HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
