"""How each command's result is shown, and how predictions are written."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotr.errors import ConfigError
from lotr.methods import METHODS

from .console import Report, table

if TYPE_CHECKING:
    from lotr import Plan
    from lotr.adapters.inspection import Inspection
    from lotr.training.output import RunReport


def trained(report: RunReport) -> Report:
    """Show the result of a training run."""
    rows = [
        *report.eval.items(),
        ("trained numbers, adapter", report.trained_numbers["adapter"]),
        ("trained numbers, head", report.trained_numbers["head"]),
        ("bytes on disk", report.adapter_bytes),
        ("steps", report.steps),
        ("seconds", report.seconds),
    ]
    line = f"The adapter, its curve and its card are in {report.settings.output}."
    return Report(report.to_dict(history=False), [table("", ("", "value"), rows), line])


def beside(adapter: str | Path, name: str) -> Path | None:
    """Return where the picture of an adapter goes that nobody named; nowhere, if its folder cannot be written."""
    folder = Path(adapter)
    return folder / name if folder.is_dir() and os.access(folder, os.W_OK) else None


def evaluated(adapter: str, data: str, scores: dict[str, Any], picture: Path | None) -> Report:
    """Show scores."""
    drawn = str(picture) if picture is not None and "confusion" in scores else None
    rows = [(name, value) for name, value in scores.items() if name not in ("confusion", "labels")]
    lines = [f"The confusion matrix is in {drawn}."] if drawn else []
    content = {"adapter": adapter, "data": data, **scores, "picture": drawn}
    return Report(content, [table(f"{adapter} on {data}", ("", "value"), rows), *lines])


def planned(model: str, plan: Plan, report: dict[str, Any]) -> Report:
    """Show a plan."""
    lines = [
        f"{report['method']} on {model}, rank {report['rank']}\n\n{plan}",
        f"LoRA at the same rank: {report['lora_same_rank']:,} numbers.",
        f"On disk: {report['bytes']:,} bytes without a head.",
    ]
    if "rank_choice" in report:
        lines.append(report["rank_choice"])
    if bank := report.get("bank"):
        lines.append(
            f"{bank['tasks']:,} LoRAs as one bank: {bank['bytes']:,} bytes, {bank['bytes_a_task']:,} of them a task; "
            f"heads and the store's 256 KiB come on top. LoRAs take {bank['bytes_of_loras_a_rank']:,} a rank in "
            "bfloat16."
        )
    return Report(report, lines)


def inspected(adapter: str, inspection: Inspection, picture: Path | None) -> Report:
    """Show what is inside an adapter."""
    header = ("group", "sites", "block", "rank", "factors", "cores")
    groups = [tuple(group[name] for name in header) for group in inspection.groups]
    split = [n for n in ("head", "expert") if any(getattr(s, n) is not None for s in inspection.sites)]
    place = ("layer", "projection", *split)
    values = [[getattr(site, name) for name in (*place, "norm", "rank")] for site in inspection.sites]
    rows = [["" if value is None else value for value in row] for row in values]
    names = (*place, "‖ΔW‖", "effective rank")
    title = "Updates, before the magnitude" if inspection.config.magnitude != "none" else "Updates"
    basis = f"{inspection.basis:,} more from its basis, " if inspection.basis else ""
    line = (
        f"{inspection.numbers:,} numbers in the adapter, {basis}{inspection.head:,} in the head, "
        f"{inspection.size:,} bytes.{f' The heat map is in {picture}.' if picture else ''}"
    )
    tables = table(f"{adapter}: groups", header, groups), table(title, names, rows)
    return Report({**inspection.to_dict(), "picture": str(picture)}, [*tables, line])


def methods() -> Report:
    """Show the table of methods: of each what it is for, which fields it sets, and where it differs from its paper."""
    rows, about = [], ("name", "title", "year", "url", "purpose", "differs")
    for row in METHODS.values():
        own = asdict(row) | {"modes": ",".join(row.modes) or "none"}
        sets = [
            f"{f.name}={own[f.name]}" for f in fields(row) if f.name not in about and own[f.name] != f.default
        ]
        differs = f"\n{row.differs}" if row.differs else ""
        rows.append((row.name, f"{row.purpose}\n{', '.join(sets)}. {row.year}, {row.url}{differs}"))
    content = {name: asdict(row) for name, row in METHODS.items()}
    return Report(content, [table("", ("method", "what it is"), rows)])


def properties(title: str, content: dict[str, Any]) -> Report:
    """Show what is known of a bank or a task, without what is empty."""
    known = [(key.replace("_", " "), value) for key, value in content.items() if value not in (None, {}, [])]
    return Report(content, [table(title, ("", "value"), known)])


def trained_tasks(report: dict[str, Any]) -> Report:
    """Show what became of the tasks of a run."""
    from lotr.training.metrics import MAIN

    rows = []
    for name, task in report["tasks"].items():
        metric = MAIN[task["task"]]
        rows.append((name, task["task"], task["rows"]["train"], metric, task[metric]))
    line = (
        f"{len(rows):,} tasks trained in {report['seconds']:.0f} s; each has {report['numbers_a_task']:,} numbers, "
        f"{report['bytes_a_task']:,} bytes beside its head."
    )
    header = ("task", "kind", "rows", "measured", "score")
    return Report(report, [table(report["bank"], header, rows), line])


def check_output(path: Path, overwrite: bool, data: str) -> None:
    """Refuse a file that cannot be written (ConfigError), before any work is done."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"--output {path} has no known type. Name a .csv or .jsonl file.")
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise ConfigError(f"--output {path} is the data. Choose another name.")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists. Choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: the folder {path.parent} does not exist. Make it first.")


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    # half a character is written as JSON escapes it
    try:
        with temporary.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            if path.suffix == ".csv":
                names = dict.fromkeys(name for row in rows for name in row)
                writer = csv.DictWriter(file, fieldnames=list(names))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
