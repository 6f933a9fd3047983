"""What bounds a training step with an adapter: the thin products of one adapted linear beside its two wide ones.

    python benchmarks/bench_products.py

A frozen linear takes two products a step, `X Wᵀ` and `dY W`. Its adapter takes six of inner or outer width `r`. This
tells what they are beside the wide ones by count of operations and by time, each measured alone, with
nothing of Python or autograd around it. Their sum is what no implementation out of these products can undercut.
Beside each stands the same product by PyTorch's own operator, which asks MKL.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lotr.math.matmul import product
from records import Row, begin, keep_memory, parser, progress, rounded, show, write
from timing import Samples, Spread, interleaved

HEADER = (
    "tokens, in → out",
    "product",
    "ms",
    "GFLOP/s",
    "ms by PyTorch's operator",
    "of the frozen two, by count",
    "by time",
)
SIZES = (
    (1024, 768, 768),
    (1024, 768, 3072),
    (1024, 3072, 768),
    (2048, 384, 384),
    (2048, 384, 1536),
    (2048, 1536, 384),
)
RANK = 16
WIDE, THIN = ("X Wᵀ", "dY W"), "the thin six"
OWN = "PyTorch's "
Product = Callable[[Tensor, Tensor], Tensor]
_COPIES = 4  # of the activations, so that none is in the cache from the call before


@dataclass
class Operands:
    """What one adapted linear reads and writes, for `n` tokens: `C` is taken as the identity."""

    X: Tensor  # (n, in)
    dY: Tensor  # (n, out)
    W: Tensor  # (out, in)
    U: Tensor  # (out, r)
    V: Tensor  # (in, r)
    h: Tensor  # (n, r)

    def products(self, of: Product) -> dict[str, Callable[[], Tensor]]:
        """Return the wide products, and the thin ones as `lotr.math.fused_linear` takes them.

        What is added in place is PyTorch's own everywhere.
        """
        return {
            WIDE[0]: lambda: of(self.X, self.W.T),
            WIDE[1]: lambda: of(self.dY, self.W),
            "h = X V": lambda: of(self.X, self.V),
            "Y += h Uᵀ": lambda: self.dY.addmm_(self.h, self.U.T, alpha=1e-6),
            "q = dY U": lambda: of(self.dY, self.U),
            "dU = dYᵀ h": lambda: of(self.dY.T, self.h),
            "dV = Xᵀ q": lambda: of(self.X.T, self.h),
            "dX += q Vᵀ": lambda: self.X.addmm_(self.h, self.V.T, alpha=1e-6),
        }


def operands(tokens: int, i: int, o: int, device: torch.device) -> Operands:
    """Return random operands of one size."""
    shapes = ((tokens, i), (tokens, o), (o, i), (o, RANK), (i, RANK), (tokens, RANK))
    return Operands(*(torch.randn(*shape, device=device) for shape in shapes))


def measure(size: tuple[int, int, int], options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time the products of one size beside each other."""
    copies = [operands(*size, device) for _ in range(_COPIES)]
    taken = [made.products(product) for made in copies]
    own = [made.products(torch.matmul) for made in copies]
    runs = {name: _in_turn([made[name] for made in taken]) for name in taken[0]}
    runs |= {OWN + name: _in_turn([made[name] for made in own]) for name in own[0]}
    with progress(str(size), len(runs) * (options.rounds + 1)) as bar:
        tick = lambda: bar.advance(bar.task_ids[0])  # noqa: E731
        with torch.no_grad():
            samples = interleaved(runs, options.rounds, device, patience=options.patience, tick=tick)
    names = list(taken[0])
    for whose in ("", OWN):
        thin = (samples.seconds[whose + name] for name in names if name not in WIDE)
        samples.seconds[whose + THIN] = [sum(each) for each in zip(*thin, strict=True)]
    return [row(size, name, samples) for name in (*names, THIN)]


def _in_turn(products: list[Callable[[], Tensor]]) -> Callable[[], None]:
    def all_once() -> None:
        for each in products:
            each()

    return all_once


def row(size: tuple[int, int, int], name: str, samples: Samples) -> Row:
    """Return what is recorded of one product, or of all thin ones together."""
    tokens, i, o = size
    width = {WIDE[0]: i * o, WIDE[1]: i * o, THIN: 3 * RANK * (i + o)}.get(
        name, RANK * (i if "X" in name else o)
    )
    frozen = [sum(pair) for pair in zip(*(samples.seconds[OWN + of] for of in WIDE), strict=True)]
    seconds = samples.seconds[name]
    return {
        "tokens": tokens,
        "in": i,
        "out": o,
        "product": name,
        "seconds": rounded(Spread.of([taken / _COPIES for taken in seconds])),
        "own_seconds": rounded(Spread.of([taken / _COPIES for taken in samples.seconds[OWN + name]])),
        "flop": 2 * tokens * width,
        "by_count": width / (2 * i * o),
        "by_time": rounded(Spread.of([taken / base for taken, base in zip(seconds, frozen, strict=True)])),
        "rounds": [float(f"{taken / _COPIES:.4g}") for taken in seconds],
        "disturbed": samples.disturbed,
    }


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    seconds = row["seconds"]["median"]
    shares = (
        ["", f"{100 * row['by_time']['median']:.1f} %"]
        if row["product"] in WIDE
        else [f"{100 * row['by_count']:.1f} %", f"{100 * row['by_time']['median']:.1f} %"]
    )
    size = f"{row['tokens']:,}, {row['in']:,} → {row['out']:,}"
    speed, own = row["flop"] / seconds / 1e9, row["own_seconds"]["median"]
    return [size, row["product"], f"{1e3 * seconds:.3f}", f"{speed:.0f}", f"{1e3 * own:.3f}", *shares]


def main() -> None:
    """Measure, print the table, write JSON."""
    options = parser(__doc__, "products", pictured=False).parse_args()
    keep_memory()
    device = begin(options)
    rows: list[Row] = []
    for size in SIZES[:3] if options.short else SIZES:
        rows += measure(size, options, device)
        write(options.json, "products", rows)
    show("Products of one adapted linear, rank 16; medians", HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
