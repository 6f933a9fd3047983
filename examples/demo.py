"""Fine-tune the packaged MiniLM on docstrings three ways and compare: a bare head, LoRA, LoTR.

Each method is one `lotr train` with the same data, steps and seed; then the saved LoTR adapter is evaluated in
a process of its own, which has to reach the same score. Run by `make demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

METHODS = {
    "head": [],
    "peft_lora": ["--rank", "16"],
    "lotr": ["--rank", "16"],
}


def lotr(*words: str) -> dict[str, object]:
    """Run the command line in a new process and return its JSON report."""
    command = [sys.executable, "-m", "lotr", *words, "--json"]
    print(f"$ lotr {' '.join(words)}", file=sys.stderr, flush=True)
    # the hub is not needed: the model is packaged and the data is Python's own library
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    started = time.perf_counter()
    out: Path = options.output

    reports = {}
    for method, words in METHODS.items():
        reports[method] = lotr(
            *("train", "--model", "minilm", "--train", "docstrings", "--method", method, *words),
            *("--epochs", options.epochs, "--batch-size", "16", "--max-length", "64"),
            *("--eval-steps", "95", "--seed", options.seed),
            *("--output", str(out / method), "--overwrite"),
        )

    adapter = out / "lotr"
    again = lotr("evaluate", str(adapter), "--data", "docstrings")
    same = again["accuracy"] == reports["lotr"]["accuracy"]
    inspected = lotr("inspect", str(adapter))

    table = Table(title="MiniLM on docstrings: 16 classes", title_justify="left")
    for name in ("method", "adapter numbers", "head numbers", "bytes on disk", "accuracy", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, report in reports.items():
        numbers, size = report["trained_numbers"], report["adapter_bytes"]
        cells = f"{numbers['adapter']:,}", f"{numbers['head']:,}", f"{size:,}"
        table.add_row(method, *cells, f"{report['accuracy']:.4f}", f"{report['seconds']:.1f}")
    console = Console()
    console.print(table)

    for what, path in {
        "training curve": adapter / "curve.png",
        "confusion matrix": again["picture"],
        "updates by layer": inspected["picture"],
    }.items():
        console.print(f"{what}: {path}", highlight=False)
    console.print(
        f"The saved adapter, loaded in a fresh process: accuracy {again['accuracy']:.4f}, "
        f"{'the same' if same else 'NOT THE SAME'}. {time.perf_counter() - started:.0f} seconds in all.",
        highlight=False,
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
