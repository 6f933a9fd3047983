"""What limits small adapters: how much of a fully trained update each structure holds, and what it then scores.

    python benchmarks/quality_fit.py --data DATA --json docs/data/quality_fit.json

The weights of all adapted modules are trained in full, with a head, as `quality.py` trains adapters. Their change is
then replaced by its best fit in every structure, nothing is trained again, and accuracy is measured. A structure whose
best fit scores well is expressive enough: what it lacks when it is trained itself, it lacks through its start or its
optimisation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging

from lotr.files import write_json
from lotr.subspaces import Subspaces
from lotr.tuner.layer import LotrLinear
from quality_run import Bench, train

HERE = Path(__file__).parent
RATES = (1e-4, 3e-4, 1e-3)
ROUNDS = 5  # of HOOI
CONFIG = {"method": "lora_xs", "start": "gradient"}
Fit = Callable[[Tensor], Tensor]  # updates (s, o, i) -> their fits


def low_rank(rank: int) -> Fit:
    """Return the best fit of rank `rank` of each site: what a LoRA can hold."""

    def fit(D: Tensor) -> Tensor:
        U, S, Vt = torch.linalg.svd(D, full_matrices=False)
        return (U[..., :rank] * S[..., None, :rank]) @ Vt[..., :rank, :]

    return fit


def shared(rank: int, groups: Sequence[Sequence[int]]) -> Fit:
    """Return the best fit with factors shared in groups of sites: what a LoTR can hold."""

    def fit(D: Tensor) -> Tensor:
        found = torch.empty_like(D)
        for group in groups:
            spaces = Subspaces(
                tuple(D.shape[1:]), (rank, rank), torch.Generator().manual_seed(0), normalise=False
            )
            for _ in range(ROUNDS):
                spaces.turn([d @ spaces.V for d in D[group]], [d.T @ spaces.U for d in D[group]])
            found[group] = between(D[group], *spaces.factors())
        return found

    return fit


def between(D: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return the part of updates between orthonormal factors: what cores alone can hold."""
    return U @ (U.mT @ D @ V) @ V.mT


def trained_in_full(
    bench: Bench, run: dict[str, Any]
) -> tuple[nn.Module, list[tuple[str, nn.Linear]], Tensor, float]:
    """Return the model whose adapted weights were trained, the modules, the change, and the rate that dev chose."""
    task, found = bench.task(run["task"]), []
    for rate in RATES:
        model = bench.fresh(run, bench.grid["settings"])
        model.requires_grad_(False)
        ends = tuple(bench.grid["targets"][run["target"]])
        modules = [(name, m) for name, m in model.named_modules() if name.endswith(ends)]
        before = torch.stack([m.weight.detach().clone() for _, m in modules])
        groups = [
            {"params": [m.weight.requires_grad_() for _, m in modules], "lr": rate},
            {
                "params": [p.requires_grad_() for p in model.classifier.parameters()],
                "lr": bench.grid["settings"]["head_lr"],
            },
        ]
        train(model, groups, task, run["seed"], bench.grid["settings"]["warmup"])
        change = torch.stack([m.weight.detach() for _, m in modules]) - before
        found.append((task.accuracy(model, task.dev), model, modules, change, rate))
    return max(found, key=lambda trial: trial[0])[1:]


def started_factors(
    bench: Bench, run: dict[str, Any], names: Sequence[str], fields: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return `U` and `V` of every site as a start from gradients makes them."""
    model, _ = bench.started(run, {"fields": fields}, bench.grid["settings"])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LotrLinear)}
    updates = []
    for name in names:
        adapted = layers[f"base_model.model.{name}"].adapted("default")
        updates.append(adapted.placed(adapted.members[0]).update)
    return torch.stack([u.U.detach() for u in updates]), torch.stack([u.V.detach() for u in updates])


def measure(bench: Bench, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for every structure, the share of the change that it holds and the accuracy with it."""
    task = bench.task(run["task"])
    model, modules, D, rate = trained_in_full(bench, run)
    names, before = [name for name, _ in modules], torch.stack([m.weight.detach() for _, m in modules]) - D
    s, o, i = D.shape
    kinds = sorted({name.rpartition(".")[2] for name in names})
    groups = [[n for n, name in enumerate(names) if name.endswith(kind)] for kind in kinds]
    own = {**CONFIG, "r": 16}
    together = {"method": "lotr", "r": 16, "start": "gradient", "train": "cores"}
    fits: dict[str, tuple[int, Tensor]] = {
        "the trained update": (D.numel(), D),
        "head alone": (0, 0 * D),
        "LoRA, rank 1": (s * (o + i), low_rank(1)(D)),
        "LoRA, rank 4": (4 * s * (o + i), low_rank(4)(D)),
    }
    for rank in (10, 32):
        fits[f"LoTR, one pair of factors, rank {rank}"] = (
            rank * (o + i) + s * rank**2,
            shared(rank, [range(s)])(D),
        )
    fits["cores, best factors of a projection, rank 16"] = (s * 256, shared(16, groups)(D))
    fits["cores, best factors of a site, rank 16"] = (s * 256, low_rank(16)(D))
    for what, fields in (("projection", together), ("site", own)):
        fits[f"cores, gradient factors of a {what}, rank 16"] = (
            s * 256,
            between(D, *started_factors(bench, run, names, fields)),
        )
    rows = []
    for name, (numbers, fit) in fits.items():
        with torch.no_grad():
            for (_, module), W, d in zip(modules, before, fit, strict=True):
                module.weight.copy_(W + d)
        kept = 1 - float(((D - fit).norm() / D.norm()) ** 2)
        rows.append(
            {
                **run,
                "rate": rate,
                "fit": name,
                "numbers": numbers,
                "kept": kept,
                "test": task.accuracy(model, task.test),
            }
        )
    return rows


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
        for task in grid["frontier"]:
            for seed in asked.seeds:
                rows += measure(bench, {"task": task, "target": "qv", "method": "fit", "seed": seed})
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.json, rows)
    table = Table("fit of the trained update", "numbers", "of its energy", *grid["frontier"])
    for cells in summary(rows):
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
