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
from grids import Setting, grid, ranked
from peers import ADAPTERS, FLOOR, FULL, label, make, trained, training_step
from pictures import panels
from records import Row, begin, parser, progress, show, write
from shapes import SHAPES, batch_for, build
from timing import Samples, interleaved

HEADER = ("model, batch × tokens", "method", "r", "trained", "ms a step", "of the floor", "of LoRA, same r")


def settings(options: argparse.Namespace, device: torch.device) -> list[Setting]:
    """Return what the command line asks for."""
    if options.shape is None:
        return grid(options.short, device.type == "cuda")
    free = tuple((method, None) for method in options.methods if method not in ADAPTERS)
    adapters = [method for method in options.methods if method in ADAPTERS]
    cases = ((FLOOR, None), *free, *ranked(adapters, options.ranks))
    return [Setting(options.shape, options.batch, options.length, cases)]


def measure(setting: Setting, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time all cases of a setting beside each other."""
    base = build(setting.shape, device)
    batch = batch_for(base, setting.batch, setting.length)
    models = {label(*case): make(*case, setting.shape, base) for case in setting.cases}
    steps = {name: training_step(model, batch) for name, model in models.items()}
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


def row(
    setting: Setting, method: str, rank: int | None, counts: dict[str, int], samples: Samples
) -> Row:
    """Return what is recorded of one case."""
    name, lora = label(method, rank), label("peft_lora", rank)
    return {
        "shape": setting.shape,
        "batch": setting.batch,
        "length": setting.length,
        "method": method,
        "rank": rank,
        "trained": counts[name],
        "seconds": samples.spread(name).rounded(),
        "of_floor": samples.ratio(name, FLOOR).rounded(),
        "of_lora": samples.ratio(name, lora).rounded() if lora in counts else None,
        "rounds": [float(f"{seconds:.4g}") for seconds in samples.seconds[name]],
        "disturbed": samples.disturbed,
    }


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [
        f"{row['shape']}, {row['batch']} × {row['length']}",
        row["method"],
        str(row["rank"] or ""),
        f"{row['trained']:,}",
        f"{1e3 * row['seconds']['median']:.1f}",
        spread(row["of_floor"]),
        spread(row["of_lora"]),
    ]


def spread(ratio: dict[str, float] | None) -> str:
    """Return a median and its quartiles."""
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['low']:.3f} – {ratio['high']:.3f})"


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    made = parser(__doc__, "train_step")
    made.add_argument("--shape", choices=SHAPES, help="one model instead of the grid")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--length", type=int, default=128, help="tokens of a row")
    made.add_argument("--methods", nargs="+", choices=[*ADAPTERS, FULL, "floor_tight"], default=[*ADAPTERS])
    made.add_argument("--ranks", nargs="+", type=int, default=[16])
    options = made.parse_args()
    device = begin(options)

    rows: list[Row] = []
    for setting in settings(options, device):
        rows += measure(setting, options, device)
        write(options.json, "train_step", rows)
    show("Training step; median and quartiles of ratios within a round", HEADER, [cells(r) for r in rows], 2)
    panels(rows, "of_floor", "step, ratio to the floor", options.picture)


if __name__ == "__main__":
    main()
