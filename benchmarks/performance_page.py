"""Table of docs/performance.md, from the records of the benchmarks.

python benchmarks/performance_page.py --data out/bench                                # prints it
python benchmarks/performance_page.py --data docs/data --page docs/performance.md     # writes it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from records import fill, markdown

Record = dict[str, Any]
SIZES = {
    ("minilm", 32, 64): "MiniLM",
    ("minilm", 1, 128): "MiniLM, one text",
    ("bert-base", 8, 128): "BERT-base",
    ("gpt2", 2, 256): "GPT-2",
    ("llama-half", 1, 128): "Llama, 1,024 wide",
}
#: Rows of the table: what it says, record, method, and what it is a ratio to.
TIMES = (
    ("training step", "train_step", "lotr"),
    ("… cores alone", "train_step", "lotr_cores"),
    ("… DoRA's norms", "train_step", "lotr_per_output"),
    ("… without oneDNN", "train_step", "lotr_without_onednn"),
    ("PEFT's DoRA", "train_step", "peft_dora"),
    ("PEFT's VeRA", "train_step", "peft_vera"),
    ("inference", "inference", "lotr"),
    ("… without oneDNN", "inference", "lotr_without_onednn"),
    ("inference, merged", "inference", "lotr_merged"),
)


def tables(data: Path) -> dict[str, list[str]]:
    """Return what stands between the marks of the page, by name."""
    names = ("train_step", "inference", "memory", "start", "experts_time", "experts_memory")
    paths = {name: data / f"{name}.json" for name in names}
    records = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    return {
        "times": times(records),
        "compiled": compiled(records),
        "start": start(records["start"]) if "start" in records else [],
        "memory": memory(records["memory"]) if "memory" in records else [],
        "experts": experts(records) if "experts_memory" in records else [],
        "machine": [line for name, record in records.items() for line in machine(name, record)],
    }


def times(records: dict[str, Record]) -> list[str]:
    """Return steps and forward passes as ratios to LoRA's and to the frozen model's, a column a model."""
    rows, measured = [], {_size(r) for name in records for r in records[name]["rows"] if "shape" in r}
    sizes = [size for size in SIZES if size in measured]
    for text, name, method in TIMES:
        found = {_size(r): r for r in _rows(records, name) if r["method"] == method}
        cells = [
            f"{_median(found[size], 'of_lora')} / {_median(found[size], 'of_frozen')}"
            if size in found
            else ""
            for size in sizes
        ]
        if found:
            rows.append([text, *cells])
    return markdown(("of LoRA's / of the frozen model's time", *(SIZES[size] for size in sizes)), rows)


def _rows(records: dict[str, Record], name: str) -> list[Record]:
    return records[name]["rows"] if name in records else []


def _size(row: Record) -> tuple[str, int, int]:
    return row["shape"], row["batch"], row["length"]


def _median(row: Record, name: str) -> str:
    return f"{row[name]['median']:.2f}" if row.get(name) else ""


def compiled(records: dict[str, Record]) -> list[str]:
    """Return what `torch.compile` does for the frozen model, LoRA and LoTR."""
    rows = []
    for text, name in (("training step", "train_step"), ("inference", "inference")):
        of = {row["method"]: row for row in _rows(records, name) if _size(row) == next(iter(SIZES))}
        if "lotr_compiled" in of:
            seconds = {method: row["seconds"]["median"] for method, row in of.items()}
            ratios = [seconds[f"{m}_compiled"] / seconds[m] for m in ("frozen", "peft_lora", "lotr")]
            ratios.append(seconds["lotr_compiled"] / seconds["peft_lora_compiled"])
            rows.append([text, *(f"{ratio:.2f}" for ratio in ratios)])
    header = ("MiniLM, compiled / eager", "frozen model", "LoRA", "LoTR", "LoTR / LoRA, both compiled")
    return markdown(header, rows) if rows else []


def start(record: Record) -> list[str]:
    """Return what is done once, as ratios to LoRA, and LoRA's milliseconds."""
    rows = {(row["action"], row["method"]): row for row in record["rows"]}
    lines = []
    for action in ("wrap", "save", "load", "merge", "unmerge"):
        lora = f"{1e3 * rows[action, 'peft_lora']['seconds']['median']:.0f}"
        methods = ("lotr", "lotr_cores", "lotr_per_output", "peft_dora")
        cells = [_spread(rows[action, method]["of_lora"]) for method in methods]
        lines.append([action, lora, *cells])
    return markdown(("", "LoRA, ms", "LoTR", "cores alone", "with norms", "PEFT's DoRA"), lines)


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def memory(record: Record) -> list[str]:
    """Return what a step takes beyond the frozen model, as a share of what LoRA's takes."""
    rows = []
    for size in dict.fromkeys(_size(row) for row in record["rows"]):
        of = {row["method"]: row for row in record["rows"] if _size(row) == size}
        title = next(title for known, title in SIZES.items() if known[0] == size[0])
        for method, text in (("lotr", "LoTR"), ("lotr_cores", "cores alone")):
            if method in of:
                shares = of[method]["of_lora"]
                cells = [
                    f"{shares[m]:.2f}" if m in shares else "" for m in ("saved", "allocated", "resident")
                ]
                rows.append([f"{title}, {size[1]} × {size[2]}, {text}", *cells])
    header = ("of LoRA's, beyond the frozen model", "kept for backward", "peak, allocator", "peak, process")
    return markdown(header, rows)


def experts(records: dict[str, Record]) -> list[str]:
    """Return time and memory of a step of adapters on experts, a column a model."""
    of = {
        name: {(row["shape"], row["method"]): row for row in records[name]["rows"]}
        for name in ("experts_time", "experts_memory")
    }
    shapes = list(dict.fromkeys(shape for shape, _ in of["experts_time"]))
    time = [of["experts_time"][shape, "lotr"] for shape in shapes]
    memory = [of["experts_memory"][shape, "lotr"] for shape in shapes]
    numbers = [
        (of["experts_time"][shape, "peft_lora"]["trained"], row["trained"])
        for shape, row in zip(shapes, time, strict=True)
    ]
    lines = [["training step, of LoRA's / of the frozen model's time"]]
    lines[0] += [f"{_median(row, 'of_lora')} / {_median(row, 'of_frozen')}" for row in time]
    for measure, text in (("saved", "kept for backward"), ("allocated", "peak, allocator")):
        lines.append(
            [
                f"{text}, of LoRA's beyond the frozen model",
                *(f"{row['of_lora'][measure]:.2f}" for row in memory),
            ]
        )
    lines.append(["trained numbers, LoRA / LoTR", *(f"{lora:,} / {ours:,}" for lora, ours in numbers)])
    return markdown(("rank 16 on the experts", *shapes), lines)


def machine(name: str, record: Record) -> list[str]:
    """Return date, machine, versions and command of a record."""
    told = record["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in told["versions"].items())
    noise = max((row.get("disturbed") or 0 for row in record["rows"]), default=0)
    busy = f" Other programs disturbed up to {noise} measurements of a setting." if noise else ""
    where = f"{told['processor']}, {told['threads']} threads, {told['numbers']}"
    return [f"- `{name}`: {record['date']}, {where}; {versions}. `{record['command']}`.{busy}"]


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("docs/data"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    for name, lines in tables(options.data).items():
        if options.page is None:
            print(f"\n<!-- {name} -->", *lines, sep="\n")
        else:
            fill(options.page, name, lines)


if __name__ == "__main__":
    main()
