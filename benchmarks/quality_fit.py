"""What limits small adapters: how much of a fully trained update each structure holds, and what it then scores.

    python benchmarks/quality_fit.py --data DATA --json docs/data/quality_fit.json

The weights of all adapted modules are trained in full, with a head, as `quality.py` trains adapters. Their change is
then replaced by its best fit in every structure, nothing is trained again, and accuracy is measured. A structure whose
best fit scores well is expressive enough: what it lacks when it is trained itself, it lacks through its start or its
optimisation. LoTR has the largest ranks with at most LoRA's numbers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from quality_training import Bench, train
from records import calm, show, write_rows

RATES = (1e-4, 3e-4, 1e-3)
ROUNDS = 5  # of HOOI
Updates = list[Tensor]  # of each site, (o, i)
Groups = list[list[int]]  # of sites that share factors


def low_rank(D: Updates, rank: int) -> Updates:
    """Return the best fit of rank `rank` of each site: what a LoRA can hold."""
    fits = []
    for d in D:
        U, S, Vt = torch.linalg.svd(d, full_matrices=False)
        fits.append((U[:, :rank] * S[:rank]) @ Vt[:rank])
    return fits


def shared(D: Updates, groups: Groups, rank: int) -> Updates:
    """Return the best fit with factors shared in groups of sites: what a LoTR can hold (Tucker-2, by HOOI)."""
    fits = list(D)
    for group in groups:
        rank = min(rank, *D[group[0]].shape)
        V = torch.linalg.svd(torch.cat([D[n] for n in group]), full_matrices=False).Vh[:rank].mT
        for _ in range(ROUNDS):
            U = torch.linalg.svd(torch.cat([D[n] @ V for n in group], 1), full_matrices=False).U[:, :rank]
            V = torch.linalg.svd(torch.cat([D[n].mT @ U for n in group], 1), full_matrices=False).U[:, :rank]
        for n in group:
            fits[n] = U @ (U.mT @ D[n] @ V) @ V.mT
    return fits


def largest(D: Updates, groups: Groups, numbers: int) -> int:
    """Return the largest rank at which shared factors and the cores of all sites have at most so many numbers."""
    rank = 1
    while size(D, groups, rank + 1) <= numbers:
        rank += 1
    return rank


def size(D: Updates, groups: Groups, rank: int) -> int:
    """Return the numbers of shared factors and of the cores of all sites."""
    return sum(rank * sum(D[group[0]].shape) for group in groups) + len(D) * rank**2


def trained_in_full(
    bench: Bench, modules: str, name: str, seed: int
) -> tuple[nn.Module, list[tuple[str, nn.Linear]], Updates]:
    """Return the model whose adapted weights were trained at the rate that dev chose, the modules, the change."""
    task, settings, trials = bench.task(name), bench.grid["settings"], []
    for rate in RATES:
        model = bench.fresh(name, seed, settings).requires_grad_(False)
        ends = tuple(bench.grid["modules"][modules])
        blocks = (pair for pair in model.named_modules() if ".layer." in pair[0])
        linears = [(path, m) for path, m in blocks if path.endswith(ends) and isinstance(m, nn.Linear)]
        before = [m.weight.detach().clone() for _, m in linears]
        groups = [
            {"params": [m.weight.requires_grad_() for _, m in linears], "lr": rate},
            {"params": list(model.classifier.requires_grad_().parameters()), "lr": settings["head_lr"]},
        ]
        train(model, groups, task, seed, settings["warmup"], task.steps)
        change = [m.weight.detach() - W for (_, m), W in zip(linears, before, strict=True)]
        trials.append((task.accuracy(model, task.dev), model, linears, change))
    return max(trials, key=lambda trial: trial[0])[1:]


def measure(bench: Bench, modules: str, name: str, seed: int) -> list[dict[str, Any]]:
    """Return, for every structure, the share of the change that it holds and the accuracy with it."""
    task = bench.task(name)
    model, linears, D = trained_in_full(bench, modules, name, seed)
    before = [m.weight.detach() - d for (_, m), d in zip(linears, D, strict=True)]
    projections = _alike((path.rpartition(".")[2], d.shape) for (path, _), d in zip(linears, D, strict=True))
    shapes = _alike(d.shape for d in D)
    cores = len(D) * 16**2
    fits: dict[str, tuple[int, Updates]] = {
        "the trained update": (sum(d.numel() for d in D), D),
        "head alone": (0, [0 * d for d in D]),
    }
    for rank in (1, 2, 4):
        numbers = rank * sum(sum(d.shape) for d in D)
        mine = largest(D, shapes, numbers)
        fits[f"LoRA, rank {rank}"] = numbers, low_rank(D, rank)
        fits[f"LoTR as large as LoRA of rank {rank}"] = size(D, shapes, mine), shared(D, shapes, mine)
    fits["cores, best factors of a projection, rank 16"] = cores, shared(D, projections, 16)
    fits["cores, best factors of a site, rank 16"] = cores, low_rank(D, 16)
    rows = []
    energy = sum(float(d.norm()) ** 2 for d in D)
    for structure, (numbers, fit) in fits.items():
        with torch.no_grad():
            for (_, module), W, d in zip(linears, before, fit, strict=True):
                module.weight.copy_(W + d)
        lost = sum(float((d - f).norm()) ** 2 for d, f in zip(D, fit, strict=True))
        score = round(task.accuracy(model, task.test), 4)
        row = {"target": modules, "task": name, "seed": seed, "fit": structure, "numbers": numbers}
        rows.append({**row, "kept": round(1 - lost / energy, 4), "test": score})
    return rows


def _alike(keys: Iterable[Hashable]) -> Groups:
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def summary(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table: means over tasks and seeds."""
    cells = []
    for name in dict.fromkeys(row["fit"] for row in rows):
        mine = [row for row in rows if row["fit"] == name]
        scores = [
            statistics.mean(row["test"] for row in mine if row["task"] == task)
            for task in dict.fromkeys(row["task"] for row in rows)
        ]
        kept = statistics.mean(row["kept"] for row in mine)
        cells.append(
            [
                name,
                f"{mine[0]['numbers']:,}",
                f"{100 * kept:.0f} %",
                *(f"{100 * score:.1f}" for score in scores),
            ]
        )
    return cells


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the tasks' files")
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_name("quality.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, default=Path("out/quality_fit.json"))
    options = parser.parse_args()
    calm()
    grid = yaml.safe_load(options.grid.read_text())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(grid, options.data, Path(folder))
        for modules, task, seed in itertools.product(grid["modules"], grid["mean"], options.seeds):
            rows += measure(bench, modules, task, seed)
    write_rows(options.json, {}, "rows", rows)
    for modules in grid["modules"]:
        header = ("fit of the trained update", "numbers", "of its energy", *grid["mean"])
        show(modules, header, summary([row for row in rows if row["target"] == modules]))


if __name__ == "__main__":
    main()
