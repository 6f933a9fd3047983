"""Time of a mixed batch: 64 rows with 64 tasks beside one task, a large bank beside a small one, PEFT beside both.

    python benchmarks/bench_bank.py --json out/bench_bank.json

Everything runs in one process, on the packaged MiniLM, in turns whose order is drawn anew each round; a ratio is the
median over rounds of the ratio within a round. All tasks are in memory, as they are once they have been used. Then
tasks of the large bank are used one after the other, with few of them in memory: does the process grow?
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lotr import CoreBank, LotrConfig, Task
from records import calm, progress, show
from shapes import minilm
from timing import interleaved

TARGETS = {"query, value": ["query", "value"], "all linears": "all-linear"}
#: What is compared with what.
RATIOS = {
    "64 tasks / one task": ("bank, 64 tasks", "bank, one task"),
    "large bank / small bank": ("large bank, 64 tasks", "bank, 64 tasks"),
    "one task / ordinary adapter": ("bank, one task", "ordinary adapter"),
    "64 tasks / base model": ("bank, 64 tasks", "base model"),
    "PEFT: 64 adapters / one": ("PEFT, 64 adapters", "PEFT, one adapter"),
    "PEFT: 64 adapters / base model": ("PEFT, 64 adapters", "base model"),
}

Run = Callable[[], object]


def base() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()


def bank_of(folder: Path, tasks: int, targets: list[str] | str, rank: int) -> CoreBank:
    """Make a bank with tasks of random numbers."""
    config = LotrConfig(r=rank, target_modules=targets, exclude_modules=["classifier"])
    get_peft_model(base(), config).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", folder / "basis")
    generator = torch.Generator().manual_seed(0)
    size = bank.layout.size

    def made() -> Iterator[Task]:
        for n in range(tasks):
            yield Task(f"task {n}", torch.randn(size, generator=generator) / 16)

    bank.add_many(made())
    return bank


def loras(names: list[str], targets: list[str] | str, rank: int) -> nn.Module:
    """Return a model with that many LoRA adapters of PEFT, with random numbers."""
    config = LoraConfig(
        r=rank, target_modules=targets, exclude_modules=["classifier"], init_lora_weights=False
    )
    model = get_peft_model(base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def runs(folder: Path, targets: list[str] | str, options: argparse.Namespace, large: int) -> dict[str, Run]:
    """Return what is timed, by name."""
    rows = options.rows
    generator = torch.Generator().manual_seed(0)
    shape = (rows, options.length)
    batch = {
        "input_ids": torch.randint(1000, 20000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
    }
    names = [f"task {n}" for n in range(rows)]
    bank = bank_of(folder / "small", 100, targets, options.rank)
    model = bank.wrap(base(), capacity=rows)
    lora = loras([f"lora {n}" for n in range(rows)], targets, options.rank)
    one, plain = get_peft_model(base(), bank.config).eval(), base()
    for number in one.parameters():  # an update of zero takes a way of its own
        if number.requires_grad and not number.any():
            nn.init.normal_(number, std=1 / 16)
    found: dict[str, Run] = {
        "base model": lambda: plain(**batch),
        "ordinary adapter": lambda: one(**batch),
        "bank, one task": lambda: model(**batch, task_ids=names[:1] * rows),
        "bank, 64 tasks": lambda: model(**batch, task_ids=names),
        "PEFT, one adapter": lambda: lora(**batch, adapter_names=["lora 0"] * rows),
        "PEFT, 64 adapters": lambda: lora(**batch, adapter_names=[f"lora {n}" for n in range(rows)]),
    }
    if large:
        big = large_bank(folder, targets, options, large).wrap(base(), capacity=rows)
        spread = [f"task {n * (large // rows)}" for n in range(rows)]
        found["large bank, 64 tasks"] = lambda: big(**batch, task_ids=spread)
    return found


def large_bank(folder: Path, targets: list[str] | str, options: argparse.Namespace, large: int) -> CoreBank:
    made = folder / "large" / "bank"
    return CoreBank.open(made) if made.is_dir() else bank_of(made.parent, large, targets, options.rank)


def growth(bank: CoreBank, rows: int) -> dict[str, float]:
    """Return the resident memory in MB after the first and after all of up to 20,000 tasks, four batches in memory."""
    model = bank.wrap(base(), capacity=4 * rows)
    names = list(islice(bank.names(), 20_000))
    batches = [names[at : at + rows] for at in range(0, len(names), rows)]
    found: dict[str, float] = {
        "tasks": len(names),
        "numbers of all, MB": 4e-6 * len(names) * bank.layout.size,
    }
    with torch.inference_mode():
        for n, batch in enumerate(batches, 1):
            model(input_ids=torch.full((len(batch), 4), 1000), task_ids=batch)
            if n in (max(1, len(batches) // 10), len(batches)):
                found[f"resident after {min(n * rows, len(names)):,} tasks, MB"] = resident()
    return found


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch, each with a task of its own")
    parser.add_argument("--length", type=int, default=32, help="tokens a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--large", type=int, default=100_000, help="tasks of the large bank (query, value); 0: none"
    )
    options = parser.parse_args()
    calm()
    reports = []
    for modules, targets in TARGETS.items():
        large = options.large if modules == "query, value" else 0
        with tempfile.TemporaryDirectory() as folder:
            timed = runs(Path(folder), targets, options, large)
            with progress(modules, (options.rounds + 1) * len(timed)) as bar, torch.inference_mode():
                samples = interleaved(
                    timed, options.rounds, tick=lambda bar=bar: bar.advance(bar.task_ids[0])
                )
            memory = {}
            if large and sys.platform == "linux":
                memory = growth(large_bank(Path(folder), targets, options, large), options.rows)
        ratios = {
            name: samples.ratio(run, reference)
            for name, (run, reference) in RATIOS.items()
            if run in samples.seconds
        }
        rows = [
            [f"{name}, ms", *(f"{1e3 * s:.1f}" for s in asdict(samples.spread(name)).values())]
            for name in timed
        ]
        rows += [
            [name, *(f"{value:.3f}" for value in asdict(spread).values())] for name, spread in ratios.items()
        ]
        rows += [[name, f"{number:,.0f}", "", ""] for name, number in memory.items()]
        title = f"{modules}: {options.rows} rows of {options.length} tokens"
        show(title, ("", "median", "quartiles", ""), rows)
        spreads = {name: asdict(samples.spread(name)) for name in timed}
        report = {"modules": modules, "seconds": spreads, "memory": memory}
        reports.append({**report, "ratios": {name: asdict(spread) for name, spread in ratios.items()}})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"options": vars(options), "reports": reports}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
