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
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging

from lotr.files.atomic import write_json
from lotr.math.hooi import Subspaces
from lotr.tuner.layer import LotrLinear
from quality_run import Bench, train

HERE = Path(__file__).parent
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
    """Return the best fit with factors shared in groups of sites: what a LoTR can hold."""
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for group in groups:
        spaces = Subspaces(
            tuple(D[group[0]].shape), (rank, rank), torch.Generator().manual_seed(0), normalise=False
        )
        for _ in range(ROUNDS):
            spaces.turn([D[n] @ spaces.V for n in group], [D[n].T @ spaces.U for n in group])
        factors |= dict.fromkeys(group, spaces.factors())
    return [between(d, *factors[n]) for n, d in enumerate(D)]


def between(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return the part of an update between orthonormal factors: what cores alone can hold."""
    return U @ (U.mT @ d @ V) @ V.mT


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
    bench: Bench, run: dict[str, Any]
) -> tuple[nn.Module, list[tuple[str, nn.Linear]], Updates, float]:
    """Return the model whose adapted weights were trained, the modules, the change, and the rate that dev chose."""
    task, found = bench.task(run["task"]), []
    for rate in RATES:
        model = bench.fresh(run, bench.grid["settings"])
        model.requires_grad_(False)
        ends = tuple(bench.grid["targets"][run["target"]])
        blocks = (pair for pair in model.named_modules() if ".layer." in pair[0])
        modules = [(name, m) for name, m in blocks if name.endswith(ends) and isinstance(m, nn.Linear)]
        before = [m.weight.detach().clone() for _, m in modules]
        groups = [
            {"params": [m.weight.requires_grad_() for _, m in modules], "lr": rate},
            {
                "params": [p.requires_grad_() for p in model.classifier.parameters()],
                "lr": bench.grid["settings"]["head_lr"],
            },
        ]
        train(model, groups, task, run["seed"], bench.grid["settings"]["warmup"])
        change = [m.weight.detach() - W for (_, m), W in zip(modules, before, strict=True)]
        found.append((task.accuracy(model, task.dev), model, modules, change, rate))
    return max(found, key=lambda trial: trial[0])[1:]


def between_started(
    bench: Bench, run: dict[str, Any], names: Sequence[str], D: Updates, fields: dict[str, Any]
) -> Updates:
    """Return the part of updates between the factors that a start from gradients makes."""
    model, _ = bench.started(run, {"fields": fields}, bench.grid["settings"])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LotrLinear)}
    fits = []
    for name, d in zip(names, D, strict=True):
        update = layers[f"base_model.model.{name}"].factored("default")[0]
        fits.append(between(d, update.U.detach(), update.V.detach()))
    return fits


def measure(bench: Bench, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for every structure, the share of the change that it holds and the accuracy with it."""
    task = bench.task(run["task"])
    model, modules, D, rate = trained_in_full(bench, run)
    names = [name for name, _ in modules]
    before = [m.weight.detach() - d for (_, m), d in zip(modules, D, strict=True)]
    projections = _alike((name.rpartition(".")[2], d.shape) for name, d in zip(names, D, strict=True))
    shapes = _alike(d.shape for d in D)
    own = {"method": "lora_xs", "r": 16, "init": "gradient"}
    together = {"method": "lotr", "r": 16, "init": "gradient", "trainable": "cores"}
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
    for what, fields in (("projection", together), ("site", own)):
        started = between_started(bench, run, names, D, fields)
        fits[f"cores, gradient factors of a {what}, rank 16"] = cores, started
    rows = []
    energy = sum(float(d.norm()) ** 2 for d in D)
    for name, (numbers, fit) in fits.items():
        with torch.no_grad():
            for (_, module), W, d in zip(modules, before, fit, strict=True):
                module.weight.copy_(W + d)
        lost = sum(float((d - f).norm()) ** 2 for d, f in zip(D, fit, strict=True))
        score = task.accuracy(model, task.test)
        rows.append(
            {**run, "rate": rate, "fit": name, "numbers": numbers, "kept": 1 - lost / energy, "test": score}
        )
    return rows


def _alike(kinds: Iterable[object]) -> Groups:
    groups: dict[object, list[int]] = {}
    for n, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(n)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, default=Path("out/quality_fit.json"))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    grid = yaml.safe_load((HERE / "quality.yaml").read_text())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(grid, asked.data, Path(folder))
        for target, task, seed in itertools.product(grid["targets"], grid["frontier"], asked.seeds):
            rows += measure(bench, {"task": task, "target": target, "method": "fit", "seed": seed})
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.json, rows)
    for target in grid["targets"]:
        table = Table(
            "fit of the trained update", "numbers", "of its energy", *grid["frontier"], title=target
        )
        for cells in summary([row for row in rows if row["target"] == target]):
            table.add_row(*cells)
        Console().print(table)


if __name__ == "__main__":
    main()
