"""Write docs/performance.md from what the benchmarks recorded.

python benchmarks/report_performance.py --data docs/data --output docs/performance.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_inference
import bench_memory
import bench_norms
import bench_products
import bench_start
import bench_train_step
from lotr.files.atomic import read_json
from peers import TEXT

Record = dict[str, Any]

INTRODUCTION = """# Performance

What an adapter costs beside the frozen model, and beside PEFT's own methods. The tables are written by
`benchmarks/report_performance.py` from what the benchmarks recorded; `make bench` runs a short form of each,
`make bench-performance` all of it (an hour or two). Above each table stands the command that it was measured with;
`--short` leaves out sizes, ranks and models, `--rounds` sets the number of rounds.

Every model is randomly initialised from its configuration, without a head. All linear modules of its blocks are
adapted, dropout is off, attention is torch's `scaled_dot_product_attention` for all. Runs are interleaved in one
process and drawn into a new order each round; a ratio is taken within a round, and the tables show the median over
the rounds with the quartiles. A measurement in which other programs had more than 5 % of the machine is repeated, as
long as there is patience left; where any stayed disturbed, the line above the table says how many.
"""

SECTIONS: dict[str, tuple[str, str, Sequence[str], Callable[[Record], list[str]]]] = {
    "train_step": (
        "Training step",
        "Gradients set to none, forward, backward, AdamW over the trained numbers. The floor is the frozen model with "
        "gradients flowing through every layer and no adapter. Adapters do not need the gradient of the first "
        "layer's input, and the floor computes it; `floor_tight` leaves it out. On processors with AVX-512 that are "
        "not Intel's the library takes products with oneDNN, the floor and PEFT with MKL, as PyTorch has them: that "
        "is why a step can take less time than the frozen model's. What it takes without oneDNN is `…_mkl`.",
        bench_train_step.HEADER,
        bench_train_step.cells,
    ),
    "products": (
        "What bounds a training step",
        "The products of one adapted linear at rank 16, each alone, without Python or autograd around it, as the "
        "library takes them and as PyTorch's own operator does. PyTorch asks MKL, which has no kernels for AVX-512 on "
        "processors that are not Intel's; oneDNN has, so there the library takes its products with it. Only while the "
        "update is zero `X Wᵀ` stays with MKL, because it has to be the frozen model's bit for bit. The shares are "
        "those of the two products of the frozen linear, by PyTorch. Where a group spans projections (`lotr_joint`), "
        "`q`, `k` and `v` share `h`, `dV` and `dX`; with factors that stay, `dU` and `dV` are not taken.",
        bench_products.HEADER,
        bench_products.cells,
    ),
    "norms": (
        "What norms add",
        "A norm for every output on frozen factors: `lotr_per_output_cores` beside `lotr_cores`, and each pass over "
        "the outputs of all modules alone; the sums are two in one pass already. What the passes do not explain is "
        "what they push out of the caches, and two more steps of autograd a module.",
        bench_norms.HEADER,
        bench_norms.cells,
    ),
    "memory": (
        "Memory of a training step",
        "In MB; each case in a process of its own. *saved*: storages that autograd keeps between forward and backward, "
        "parameters aside. *allocated*: the peak of torch's allocator, parameters included. *resident*: the peak of "
        "the process, which also has what the C library keeps for later. Beside each: what of it is above the floor's, "
        "and that as a share of LoRA's at the same rank.",
        bench_memory.HEADER,
        bench_memory.cells,
    ),
    "inference": (
        "Inference",
        "A forward pass in `torch.inference_mode`, one adapter, as it is and merged.",
        bench_inference.HEADER,
        bench_inference.cells,
    ),
    "start": (
        "Import, wrap, save, load, merge",
        "The import is measured in processes of their own, `lotr` on top of `peft`. Merging keeps the untouched "
        "weights, so that unmerging restores them bit for bit; PEFT's LoRA subtracts what it added.",
        bench_start.HEADER,
        bench_start.cells,
    ),
}


def page(data: Path) -> str:
    """Return the page, with a section for every record that is there."""
    lines = [INTRODUCTION, "| method | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in TEXT.items()]
    for name, (title, text, header, cells) in SECTIONS.items():
        record = data / f"{name}.json"
        if record.is_file():
            lines += section(read_json(record, "a record of a benchmark"), title, text, header, cells)
            lines += (
                ["", f"![{title}](images/{name}.png)"]
                if (data.parent / "images" / f"{name}.png").is_file()
                else []
            )
    return "\n".join(lines) + "\n"


def section(
    record: Record, title: str, text: str, header: Sequence[str], cells: Callable[[Record], list[str]]
) -> list[str]:
    """Return the lines of one section."""
    rows = record["rows"]
    lines = ["", f"## {title}", "", text, "", said_of(record), "", *head(header)]
    return lines + [f"| {' | '.join(cells(row))} |" for row in rows]


def head(header: Sequence[str]) -> list[str]:
    """Return the first two lines of a table: words to the left, numbers to the right."""
    sides = [
        "---" if name in ("batch × tokens", "method", "what", "product", bench_products.HEADER[0]) else "---:"
        for name in header
    ]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(sides)}|"]


def disturbed(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many measurements other programs disturbed, where it was the largest share."""
    shares = []
    for row in rows:
        of = {name: row[name] for name in ("shape", "batch", "length", "tokens", "in", "out") if name in row}
        taken = sum(len(r.get("rounds", ())) for r in rows if of.items() <= r.items())
        if row.get("disturbed") and taken:
            shares.append((row["disturbed"] / taken, row["disturbed"], taken))
    if not shares:
        return ""
    _, some, taken = max(shares)
    return f" Other programs disturbed at most {some} of the {taken} measurements of a size."


def said_of(record: Record) -> str:
    """Return date, machine and command of a record, and how quiet the machine was."""
    machine = record["machine"]
    where = (
        machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    noise = disturbed(record["rows"])
    allocator = machine.get("allocator", "as it is")
    kept = "" if allocator == "as it is" else f"; the allocator {allocator}, for all methods alike"
    return f"{record['date']}, {where}, {machine['numbers']}{kept}; {versions}. `{record['command']}`{noise}"


def main() -> None:
    """Write the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path("docs/data"))
    made.add_argument("--output", type=Path, default=Path("docs/performance.md"))
    options = made.parse_args()
    options.output.write_text(page(options.data), encoding="utf-8")


if __name__ == "__main__":
    main()
