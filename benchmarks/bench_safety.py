"""What it costs that tenants are kept apart, bases are told apart and data is read carefully.

    python benchmarks/bench_safety.py --json out/bench_safety.json

Threads: calls of one wrapped bank, each forward and backward for one row of a task, on a BERT of MiniLM's shape with
one thread of torch: two threads beside one for the same number of calls, in turns, and 10,000 calls of eight threads on
a tiny model, each gradient compared with that of its own task. The fingerprint of a Llama of 8 billion numbers, in
memory and half-precision. A CSV of 100,000 columns.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import get_peft_model
from torch import Tensor, nn

from lotr import CoreBank, LotrConfig, Task
from lotr.bank.wrap import BankModel
from lotr.files.fingerprint import changed, fingerprint
from lotr.training.data.load import load_task
from records import begin, parser, progress, ratio, rounded, show, write
from shapes import SHAPES, build
from timing import interleaved

CALLS = 10_000
TENANTS = [f"t{n}" for n in range(8)]


class Tiny(nn.Module):
    """Two projections and a head, so that threads meet as often as they can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classifier = nn.Embedding(64, 16), nn.Linear(16, 3)
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids).mean(1)
        return SimpleNamespace(logits=self.classifier(self.query(x).tanh() * self.value(x)))


def wrapped(folder: Path, base: nn.Module) -> BankModel:
    """Return a bank of eight tasks on a base model, every task in memory and with gradients."""
    get_peft_model(copy.deepcopy(base), LotrConfig(r=4, target_modules=["query", "value"])).save_pretrained(
        folder / "basis"
    )
    bank = CoreBank.create(folder / "bank", basis=folder / "basis", dtype="float32")
    bank.add_many(Task(name, torch.randn(bank.layout.size)) for name in TENANTS)
    model = bank.wrap(base)
    for name in TENANTS:
        model.tasks.cache.training[name] = loaded = model.tasks.load(bank.get(name))
        loaded.numbers.requires_grad_()
    return model


def gradient(model: BankModel, name: str, ids: Tensor) -> Tensor:
    """Return the gradient of a task's own numbers after one call."""
    output = model(input_ids=ids, task_ids=[name])
    (output.logits if hasattr(output, "logits") else output[0]).square().sum().backward()
    numbers = model.tasks.cache.training[name].numbers
    grad, numbers.grad = numbers.grad, None
    assert grad is not None
    return grad


def wrong_gradients(model: BankModel, calls: int) -> int:
    """Return how many gradients of eight threads, each with its own task, are not those of one thread alone."""
    ids = torch.arange(4)[None]
    expected = {name: gradient(model, name, ids) for name in TENANTS}
    start = threading.Barrier(len(TENANTS))

    def tenant(name: str) -> int:
        start.wait()
        return sum(
            not torch.equal(gradient(model, name, ids), expected[name]) for _ in range(calls // len(TENANTS))
        )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(TENANTS)) as pool:
            return sum(pool.map(tenant, TENANTS))
    finally:
        sys.setswitchinterval(interval)


def seconds_of_fingerprint() -> float:
    """Return the seconds that a Llama of 8 billion numbers takes to be recorded and compared with the record."""
    with torch.device("meta"):
        model = SHAPES["llama-8b"].make().bfloat16()
    model.to_empty(device="cpu")  # pages that nobody has written take no memory
    started = time.perf_counter()
    recorded = fingerprint(model)
    seconds = time.perf_counter() - started
    assert recorded is not None and not changed(recorded, model)
    return seconds


def seconds_of_columns(folder: Path, columns: int = 100_000) -> float:
    """Return the seconds that a file with many columns takes."""
    names, values = (",".join(f"{word}{n}" for n in range(columns)) for word in ("column", ""))
    (folder / "wide.csv").write_text(f"text,label,{names}\n" + f"a,1,{values}\nb,0,{values}\n" * 5)
    started = time.perf_counter()
    assert load_task(str(folder / "wide.csv")).task.labels == ("0", "1")
    return time.perf_counter() - started


def main() -> None:
    """Print the table and write it as JSON."""
    options = parser(__doc__ or "", "safety").parse_args()
    options.threads, options.device = 1, "cpu"
    begin(options)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "tiny").mkdir()
        wrong = wrong_gradients(wrapped(folder / "tiny", Tiny()), CALLS)
        model = wrapped(folder, build("minilm", torch.device("cpu")))
        ids = torch.arange(32)[None]
        pool = ThreadPoolExecutor(2)

        def calls(name: str, number: int) -> None:
            for _ in range(number):
                gradient(model, name, ids)

        runs = {
            "one thread": lambda: calls("t0", 40),
            "two threads": lambda: list(pool.map(calls, TENANTS[:2], (20, 20))),
        }
        with progress("40 calls", len(runs) * (1 + options.rounds)) as bar:
            samples = interleaved(runs, options.rounds, tick=lambda: bar.advance(bar.task_ids[0]))
        row = {
            "calls": CALLS,
            "wrong": wrong,
            "two_threads_of_one": rounded(samples.ratio("two threads", "one thread")),
            "fingerprint_8b_seconds": round(seconds_of_fingerprint(), 2),
            "wide_csv_seconds": round(seconds_of_columns(folder), 2),
        }
    show(
        "What safety costs",
        ("what", "measured"),
        [
            [f"wrong of {CALLS:,} gradients, 8 threads", str(wrong)],
            ["time of 40 calls, two threads ÷ one", ratio(row["two_threads_of_one"])],
            ["fingerprint of 8 billion numbers, s", str(row["fingerprint_8b_seconds"])],
            ["CSV of 100,000 columns, s", str(row["wide_csv_seconds"])],
        ],
    )
    write(options.json, [row])


if __name__ == "__main__":
    main()
