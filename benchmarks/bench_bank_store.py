"""A bank on disk at 100 and at 100,000 tasks: bytes, time to open, time to read one task, beside PEFT's `load_adapter`.

    python benchmarks/bench_bank_store.py --json out/bench_bank_store.json

The model has the shape of MiniLM (6 layers, 384 wide), adapted at query and value with rank 16: 3,072 numbers a task.
*Cold* means that the operating system has dropped the file from memory and that the bank was just opened; PEFT's files
are dropped in the same way. A reading of PEFT is one `load_adapter` of a LoRA of the same rank on the same modules.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import lotr
from lotr import CoreBank, LotrConfig, Task

DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ["query", "value"]
SHAPE = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=1000
)
console = Console(stderr=True)


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def forget(folder: Path) -> None:
    """Make the operating system drop the files of a folder from memory."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def centiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


def tasks(size: int, first: int, last: int) -> Iterator[Task]:
    for n in range(first, last):
        yield Task(f"task-{n:07d}", 0.1 * torch.randn(size))


def measure(folder: Path, basis: Path, n_tasks: int, reads: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Fill a bank and look at it."""
    bank = CoreBank.create(folder, basis, dtype=dtype)
    started = time.perf_counter()
    for first in track(range(0, n_tasks, 1000), f"Adding {n_tasks:,} tasks", console=console, transient=True):
        bank.add_many(tasks(bank.layout.size, first, min(first + 1000, n_tasks)))
    seconds = time.perf_counter() - started
    bank.close()
    names = list(CoreBank.open(folder).names())
    cold, warm = [], []
    for name in random.Random(0).choices(names, k=reads):
        forget(folder)
        with CoreBank.open(folder) as bank:
            cold.append(milliseconds(lambda bank=bank, name=name: bank.get(name)))
    with CoreBank.open(folder) as bank:
        for name in random.Random(1).choices(names, k=10 * reads):
            warm.append(milliseconds(lambda name=name: bank.get(name)))
        batch = random.Random(2).choices(names, k=64)
        found = bank.stats()
        return {
            "tasks": n_tasks,
            "dtype": dtype,
            "numbers": bank.layout.size,
            "bytes_of_numbers": found["bytes_of_numbers"],
            "bytes_of_tasks": found["bytes_of_tasks"],
            "over_the_numbers": found["over_the_numbers"],
            "folder_bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "rounding_error": found["worst_rounding_error"],
            "added_per_second": round(n_tasks / seconds),
            "open_ms": round(
                statistics.median(milliseconds(lambda: CoreBank.open(folder)) for _ in range(50)), 3
            ),
            "cold": centiles(cold),
            "warm": centiles(warm),
            "read_64_ms": round(
                statistics.median(milliseconds(lambda: bank.read(batch)) for _ in range(50)), 3
            ),
            "verify_seconds": round(milliseconds(lambda: bank.verify()) / 1000, 2),
        }


def peft_reads(folder: Path, reads: int) -> dict[str, Any]:
    """Load adapters one by one with PEFT, each from a folder of its own."""
    base = BertModel(SHAPE)
    model = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS))
    for n in range(reads):
        model.save_pretrained(folder / str(n))
    cold, warm = [], []
    for times, dropped in ((cold, True), (warm, False)):
        for n in range(reads):
            if dropped:
                forget(folder / str(n))
            times.append(milliseconds(lambda n=n: model.load_adapter(folder / str(n), "one")))
            model.delete_adapter("one")
    size = sum(file.stat().st_size for file in (folder / "0").iterdir())
    assert isinstance(model, PeftModel)
    return {"folder_bytes": size, "cold": centiles(cold), "warm": centiles(warm)}


def worked_out(n_tasks: int = 1_000_000) -> dict[str, Any]:
    """Return the bytes of many tasks on a model of 7B, from its shapes: a bank, and a LoRA of the same rank each."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # 32 layers, 4,096 wide
    plan = lotr.plan(model, LotrConfig(r=16, target_modules=["q_proj", "v_proj"]))
    numbers = 2 * plan.n_cores
    return {
        "tasks": n_tasks,
        "numbers": plan.n_cores,
        "bytes_of_numbers": numbers * n_tasks,
        "basis_bytes": 4 * plan.n_factors,
        "lora_numbers": 16 * plan.lora_per_rank,
        "bytes_of_loras": 2 * 16 * plan.lora_per_rank * n_tasks,
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument(
        "--reads", type=int, default=200, help="tasks that are read cold; ten times as many warm"
    )
    parser.add_argument(
        "--place", type=Path, help="folder on the disk to measure; default: the temporary one"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        basis = Path(place) / "basis"
        get_peft_model(BertModel(SHAPE), LotrConfig(r=16, target_modules=TARGETS)).save_pretrained(basis)
        rows = [measure(Path(place) / f"bank-{n}", basis, n, options.reads) for n in options.tasks]
        types = [measure(Path(place) / f"bank-{t}", basis, 1000, 20, t) for t in DTYPES]
        (Path(place) / "peft").mkdir()
        peft = peft_reads(Path(place) / "peft", options.reads)

    table = Table(
        title="MiniLM's query and value, rank 16, bfloat16; reads of one task in ms, p50 / p99",
        title_justify="left",
    )
    header = ("", "bytes a task", "÷ numbers", "open, ms", "cold read", "warm read")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(
            f"bank of {row['tasks']:,}",
            f"{row['bytes_of_tasks'] / row['tasks']:,.0f}",
            f"{row['over_the_numbers']:.3f}",
            f"{row['open_ms']:.2f}",
            *(f"{row[kind]['p50_ms']:.2f} / {row[kind]['p99_ms']:.2f}" for kind in ("cold", "warm")),
        )
    reads = (f"{peft[kind]['p50_ms']:.1f} / {peft[kind]['p99_ms']:.1f}" for kind in ("cold", "warm"))
    table.add_row("PEFT load_adapter", f"{peft['folder_bytes']:,}", "", "", *reads)
    large = worked_out()
    table.add_row("7B, numbers alone", f"{large['bytes_of_numbers'] / large['tasks']:,.0f}")
    table.add_row("7B as LoRA", f"{large['bytes_of_loras'] / large['tasks']:,.0f}")
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"banks": rows, "types": types, "peft_load_adapter": peft, "worked_out_7b": large}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
