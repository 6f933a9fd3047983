"""What a norm for every output adds to a training step with frozen factors, pass by pass.

    python benchmarks/bench_norms.py --short
    python benchmarks/bench_norms.py --shapes minilm bert-base gpt2 llama-half

A module's output is scaled, which is one pass over it; on the way back the gains need the sums over tokens of the
gradient and of its products with the output, one pass over both, and the gradient is scaled, one more. Each pass is
timed alone, over the outputs of all modules, beside whole steps with and without norms, in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import nn

from grids import REFERENCE
from lotr.math.matmul import column_sums
from lotr.tuner.layer import LotrLinear
from peers import make, training_step
from records import Row, begin, keep_memory, parser, progress, ratio, rounded, show, size, write
from shapes import batch_for, build
from timing import interleaved

RANK = 16
PLAIN, NORMS = "lotr_cores", "lotr_per_output_cores"
STEP = {PLAIN: "step without norms", NORMS: "step with norms"}
HEADER = ("batch × tokens", "what", "ms", "of a step without norms")


def passes(model: nn.Module, tokens: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what norms add to a step, each over all modules, with a memory for each output as in a step."""
    layers = [module for module in model.modules() if isinstance(module, LotrLinear)]
    sites = [
        (layer, torch.randn(tokens, layer.out_features), layer.lotr_magnitude["default"]()["m"].detach())
        for layer in layers
    ]
    gradients = {layer.out_features: torch.randn(tokens, layer.out_features) for layer in layers}

    @torch.no_grad()
    def norms() -> None:
        for layer, _, _ in sites:
            layer.adapted("default").gains()

    @torch.no_grad()
    def scale_outputs() -> None:
        for _, y, gain in sites:
            torch.addcmul(gain, y, gain)

    @torch.no_grad()
    def sums() -> None:
        for layer, y, _ in sites:
            column_sums(gradients[layer.out_features], y)

    @torch.no_grad()
    def scale_gradients() -> None:
        for layer, _, gain in sites:
            gradients[layer.out_features] * gain

    yield "norms of the rows", norms
    yield "outputs scaled", scale_outputs
    yield "sums for the norms' gradients", sums
    yield "gradients scaled", scale_gradients


def measure(shape: str, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time steps and passes of one model beside each other."""
    base, (batch, length) = build(shape, device), REFERENCE[shape]
    words = batch_for(base, batch, length)
    models = {method: make(method, RANK, shape, base) for method in STEP}
    runs = {STEP[method]: training_step(model, words) for method, model in models.items()}
    runs |= dict(passes(models[NORMS], batch * length))
    with progress(f"{shape}, {batch} × {length}", len(runs) * (options.rounds + 1)) as bar:
        samples = interleaved(
            runs,
            options.rounds,
            device,
            patience=options.patience,
            tick=lambda: bar.advance(bar.task_ids[0]),
        )
    return [
        {
            "shape": shape,
            "batch": batch,
            "length": length,
            "what": name,
            "seconds": rounded(samples.spread(name)),
            "of_step": rounded(samples.ratio(name, STEP[PLAIN])),
            "disturbed": samples.disturbed,
        }
        for name in runs
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [size(row), row["what"], f"{1e3 * row['seconds']['median']:.1f}", ratio(row["of_step"])]


def main() -> None:
    """Measure, print the table, write JSON."""
    made = parser(__doc__, "norms", pictured=False)
    made.add_argument("--shapes", nargs="+", choices=REFERENCE, default=list(REFERENCE))
    options = made.parse_args()
    keep_memory()
    device = begin(options)
    rows: list[Row] = []
    for shape in ["minilm"] if options.short else options.shapes:
        rows += measure(shape, options, device)
        write(options.json, "norms", rows)
    show("What norms add to a training step, frozen factors, r = 16", HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
