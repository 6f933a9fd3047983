"""A decoder of thirty layers learns a second text: cores alone on factors of the first, beside PEFT's LoRA.

    python benchmarks/deep_transfer.py --data FOLDER --runs docs/data/deep_transfer.csv

LoTR of rank 31 learns docstrings; its factors stay, and cores alone learn reviews of books, as many numbers as LoRA of
rank 1 has. Beside them cores between factors that gradients of the reviews turned, and between random ones. Loss per
token on 64 rows that were not trained on, after 25, 50 and 100 steps of 8 rows of 64 tokens, of a rate that rises for
ten steps and falls to zero at the last. A run is a line of the file; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import set_seed

import lotr
from compress_decoder import BATCH, base, tokens
from deep import batches, groups, loss_of
from quality_runs import append, rates_text
from records import calm, markdown

TARGETS, RANK, STEPS, SEEN = ["q_proj", "v_proj"], 31, 100, (25, 50, 100)
Rates = dict[str, float]
#: Of each method the rates that are tried with the first seed; the best is run with the others.
METHODS: dict[str, list[Rates]] = {
    "LoRA": [{"lr": 1e-2}, {"lr": 3e-2}],
    "cores, factors of docstrings": [{"lr": 1e-2, "core_lr": 1e-2}, {"lr": 1e-2, "core_lr": 3e-2}],
    "cores, factors from gradients": [{"lr": 1e-2, "core_lr": 1e-2}, {"lr": 1e-2, "core_lr": 3e-2}],
    "cores, random factors": [{"lr": 1e-2, "core_lr": 3e-2}],
}
COLUMNS = ("method", "rates", "seed", "numbers", *(f"after {n}" for n in SEEN), "seconds")


def learn(model: Any, rates: Rates, rows: dict[str, Tensor], seed: int, seen: tuple[int, ...]) -> list[float]:
    """Train, and return the held-out loss after some of the steps."""
    optimizer = torch.optim.AdamW(groups(model, rates), weight_decay=0.0)
    trained, losses = [p for group in optimizer.param_groups for p in group["params"]], []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (STEPS - step) / (STEPS - 10))
    )
    for step, batch in enumerate(itertools.islice(batches(rows["train"], BATCH, seed), STEPS), 1):
        model.train()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in seen:
            losses.append(round(loss_of(model, rows["test"]), 4))
    return losses


def lotr_on(model: nn.Module, seed: int, **fields: Any) -> Any:
    """Return the decoder with cores, and factors, that have just begun."""
    config = lotr.LotrConfig(seed=seed, task_type="CAUSAL_LM", target_modules=TARGETS, **fields)
    return peft.get_peft_model(model, config)


def basis(folder: Path, data: Path) -> Path:
    """Train what the factors come from, where it is not there."""
    if not (folder / "adapter_config.json").is_file():
        set_seed(0)
        rows = tokens("docstrings", data)
        model = lotr_on(base(), 0, r=RANK, init="gradient")
        lotr.init_from_data(model, list(itertools.islice(batches(rows["train"], BATCH, 0), 8)), seed=0)
        learn(model, {"lr": 3e-3, "core_lr": 1e-2}, rows, 0, ())
        model.save_pretrained(folder)
    return folder


def adapted(method: str, rows: Tensor, seed: int, factors: Path) -> Any:
    """Return the decoder with a fresh adapter."""
    set_seed(seed)
    if method == "LoRA":
        return peft.get_peft_model(
            base(), peft.LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS, task_type="CAUSAL_LM")
        )
    if method == "cores, factors of docstrings":
        return lotr_on(base(), seed, basis=str(factors))
    if method == "cores, random factors":
        return lotr_on(base(), seed, r=RANK, trainable="cores", init="orthonormal")
    model = lotr_on(base(), seed, r=RANK, trainable="cores", init="gradient")
    lotr.init_from_data(model, list(itertools.islice(batches(rows, BATCH, seed), 8)), seed=seed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with reviews_books")
    parser.add_argument("--work", type=Path, default=Path("out/deep_transfer"))
    parser.add_argument("--runs", type=Path, default=Path("docs/data/deep_transfer.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    calm()
    factors, rows = basis(given.work / "basis", given.data), tokens("reviews_books", given.data)
    run = functools.partial(measured, given.runs, rows, factors)
    for method, rates in METHODS.items():
        for one in rates:
            run(method, one, 0)
    for seed in range(1, given.seeds):
        for method, rates in METHODS.items():
            run(method, min(rates, key=lambda one, of=method: last(read(given.runs), of, one)), seed)
    print("\n".join(table(read(given.runs))))


def measured(
    path: Path, rows: dict[str, Tensor], factors: Path, method: str, rates: Rates, seed: int
) -> None:
    """Do a run that the file lacks."""
    key = {"method": method, "rates": rates_text(rates), "seed": str(seed)}
    if any(key.items() <= run.items() for run in read(path)):
        return
    started, model = time.perf_counter(), adapted(method, rows["train"], seed, factors)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = dict(zip(COLUMNS[4:], learn(model, rates, rows, seed, SEEN), strict=False))
    run = {**key, "numbers": numbers, **losses, "seconds": round(time.perf_counter() - started)}
    append(path, run, COLUMNS)
    print(run, flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """Return the runs of a file."""
    return list(csv.DictReader(path.open(newline=""))) if path.is_file() else []


def last(runs: list[dict[str, str]], method: str, rates: Rates) -> float:
    """Return the last loss of a method with the first seed."""
    own = {"method": method, "rates": rates_text(rates), "seed": "0"}
    return next(float(run[COLUMNS[-2]]) for run in runs if own.items() <= run.items())


def table(runs: list[dict[str, str]]) -> list[str]:
    """Return the means over seeds of every method at its best rates, in Markdown."""
    body = []
    for method, rates in METHODS.items():
        best = rates_text(min(rates, key=lambda one: last(runs, method, one)))
        own = [run for run in runs if (run["method"], run["rates"]) == (method, best)]
        means = [f"{sum(float(run[f'after {n}']) for run in own) / len(own):.3f}" for n in SEEN]
        body.append([method, f"{int(own[0]['numbers']):,}", str(len(own)), *means])
    return markdown(["method", "numbers", "seeds", *(f"after {n} steps" for n in SEEN)], body)


if __name__ == "__main__":
    main()
