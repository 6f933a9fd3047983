"""Serve a bank that is made on the spot, ask all of its tasks at once, and print answers and throughput.

A short LoTR on docstrings gives the basis; four tasks are trained on it at once: which module of a package does a text
describe? `lotr serve` starts on the bank, 32 clients send the texts that were held out, and the server is stopped. It
takes about a minute on two cores. Run by `make demo-serve`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is packaged and the data is Python's own library

from demo_bank import labelled, write
from rich.console import Console
from rich.table import Table

import lotr
from lotr.training.data.docstrings import load_docstrings
from lotr.training.tasks.run import train_bank
from lotr.training.tasks.settings import BankSettings

PACKAGES = ("tkinter", "email", "asyncio", "xml")


@contextmanager
def served(bank: Path) -> Iterator[int]:
    """Start `lotr serve` and give its port; it finishes what it has begun, and ends."""
    words = ["serve", str(bank), "--port", "0", "--max-batch", "32"]
    command = [sys.executable, "-m", "lotr", *words]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if told := re.search(r'"listening", "url": "(http://[^:]+:(\d+))"', line):
                    break
            else:
                raise SystemExit("The server did not start.")
            print(f"Listening at {told[1]}", flush=True)
            pool.submit(process.stderr.read)  # its log must be read, or it would wait for that
            yield int(told[2])
        finally:
            process.terminate()


def ask(port: int, task: str, text: str) -> dict[str, Any]:
    """Send one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"text": text, "truncate": True})
    path = f"/v1/tasks/{quote(task, safe='')}/predict"
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    prediction: dict[str, Any] = answer["predictions"][0]
    return prediction


def main() -> None:
    """Make the bank, serve it, ask."""
    warnings.filterwarnings("ignore")  # what the libraries underneath plan to rename is no news here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo-serve"))
    parser.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args()
    out, rows = options.output, load_docstrings(packages=80)
    tasks = {f"module of {name}": labelled(rows, "module", "label", (name,)) for name in PACKAGES}
    sources = write(tasks, out / "tasks")
    shared = {"max_length": 32, "batch_size": 8}
    print("A short LoTR on the rows of one task, for the basis …", flush=True)
    first = sources[next(iter(tasks))]["train"]
    basis = {**shared, "epochs": 1.0, "eval_steps": 10**6, "overwrite": True}
    lotr.train(model="minilm", train=first, output=str(out / "basis"), say=lambda line: None, **basis)
    print(f"{len(tasks)} tasks on this basis at once …", flush=True)
    bank = Path(tempfile.mkdtemp(dir=out)) / "bank"
    named = tuple({"name": name, "train": source["train"]} for name, source in sources.items())
    told = BankSettings(
        output=str(bank), basis=str(out / "basis"), tasks=named, epochs=options.epochs, **shared
    )
    train_bank(told, say=lambda line: None)

    asked = [(name, row) for name, task in tasks.items() for row in task["test"]]
    with served(bank) as port, ThreadPoolExecutor(32) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda one: ask(port, one[0], one[1]["text"]), asked))
        seconds = time.perf_counter() - began
    table = Table(title="A few answers", title_justify="left")
    for name in ("task", "text", "answer", "probability", "right"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    right = [answer["label"] == row["label"] for (_, row), answer in zip(asked, answers, strict=True)]
    for n in range(0, len(asked), max(1, len(asked) // 12)):
        (name, row), answer = asked[n], answers[n]
        score = f"{answer['scores'][answer['label']]:.2f}"
        table.add_row(name, row["text"][:40], answer["label"], score, "yes" if right[n] else row["label"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(
        f"{len(asked)} requests for {len(tasks)} tasks by 32 clients: {len(asked) / seconds:.0f} a second, "
        f"{sum(right) / len(right):.0%} right."
    )
    print(f"The bank stays: lotr serve {bank}")


if __name__ == "__main__":
    main()
