"""Bytes on disk of an adapter for a model of BERT-base's shape, beside PEFT's LoRA of the same rank.

    python benchmarks/bench_size.py --json out/bench_size.json

Every figure is the size of a file that `save_pretrained` wrote; 100 tasks are 100 such files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from lotr import LotrConfig

WEIGHTS = "adapter_model.safetensors"


def measure(name: str, config: PeftConfig, folder: Path) -> dict[str, object]:
    """Save a fresh adapter and look at the file."""
    torch.manual_seed(0)
    model = get_peft_model(BertModel(BertConfig()), config)
    trained, _ = model.get_nb_trainable_parameters()
    model.save_pretrained(folder / name)
    file = folder / name / WEIGHTS
    tensors = load_file(file)
    size = file.stat().st_size
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    allowed = 4096 + 100 * len(tensors)
    assert held == 4 * trained, "a number is missing from the file, or is there twice"
    assert size - held <= allowed, "the file is larger than its numbers and a header"
    return {
        "method": name,
        "numbers": trained,
        "bytes": size,
        "100 tasks, MB": round(100 * size / 1e6, 2),
        "beyond the numbers": size - held,
        "allowed": allowed,
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    targets = ["query", "value"]
    configs = {
        "LoRA": LoraConfig(r=options.rank, target_modules=targets),
        "lotr": LotrConfig(r=options.rank, target_modules=targets),
        "lotr_joint": LotrConfig(r=options.rank, method="lotr_joint", target_modules=targets),
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, config, Path(folder)) for name, config in configs.items()]

    table = Table(title=f"12 layers, 768 wide, query and value, rank {options.rank}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
