"""How each command's result is shown, and how predictions are written."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import print_json, print_line, print_table
from .light import load

if TYPE_CHECKING:
    from lotr.adapters.inspection import Inspection
    from lotr.training.report import RunReport


def said(report: dict[str, Any], line: str, as_json: bool) -> None:
    """Show a result that fits one line."""
    if as_json:
        print_json(report)
    else:
        print_line(line)


def trained(report: RunReport, as_json: bool) -> None:
    """Show the result of a training run."""
    if as_json:
        return print_json(report.to_dict(history=False))
    rows = [
        *report.eval.items(),
        ("trained numbers, adapter", report.trained_numbers["adapter"]),
        ("trained numbers, head", report.trained_numbers["head"]),
        ("bytes on disk", report.adapter_bytes),
        ("steps", report.steps),
        ("seconds", report.seconds),
    ]
    print_table("", ("", "value"), rows)
    print_line(f"The adapter, its curve and its card are in {report.settings.output}.")
    return None


def evaluated(adapter: str, data: str, scores: dict[str, Any], picture: Path | None, as_json: bool) -> None:
    """Show scores."""
    drawn = picture if "confusion" in scores else None
    if as_json:
        shown = None if drawn is None else str(drawn)
        return print_json({"adapter": adapter, "data": data, **scores, "picture": shown})
    rows = [(name, value) for name, value in scores.items() if name not in ("confusion", "labels")]
    print_table(f"{adapter} on {data}", ("", "value"), rows)
    if drawn is not None:
        print_line(f"The confusion matrix is in {drawn}.")
    return None


def planned(model: str, report: dict[str, Any], as_json: bool) -> None:
    """Show a plan."""
    if as_json:
        return print_json(report)
    header = ("group", "projections", "sites", "block", "core", "factors", "cores", "total")
    rows = [tuple(group[name] for name in header) for group in report["groups"]]
    modes = ", ".join(report["groups"][0]["modes"]) or "nothing"
    print_table(f"{report['method']} on {model}, rank {report['rank']}, shared along {modes}", header, rows)
    rank = report["equal_lora_rank"]
    smaller = " (no LoRA is as small)" if rank < 1 else ""
    parts = [f"{report['core_numbers']:,} in cores"]
    if report["trains"] == "all":
        parts.insert(0, f"{report['factor_numbers']:,} in factors")
    if report["magnitude_numbers"]:
        parts.append(f"{report['magnitude_numbers']:,} in magnitudes")
    lines = [
        f"Trained numbers: {report['trained_numbers']:,} for {report['sites']} sites in {report['modules']} modules: "
        f"{', '.join(parts)}.",
        f"LoRA with as many numbers: rank {rank:.3g}{smaller}. "
        f"LoRA at the same rank: {report['lora_same_rank']:,} numbers.",
        f"On disk: {report['bytes']:,} bytes without a head.",
    ]
    if report["cut_ranks"]:
        lines.append(report["cut_ranks"])
    if "budget" in report:
        lines.append(report["said"])
    print_line("\n".join(lines))
    return None


def inspected(adapter: str, inspection: Inspection, picture: Path, as_json: bool) -> None:
    """Show what is inside an adapter."""
    if as_json:
        return print_json({**inspection.to_dict(), "picture": str(picture)})
    header = ("group", "sites", "block", "rank", "factors", "cores")
    print_table(
        f"{adapter}: groups", header, [tuple(group[name] for name in header) for group in inspection.groups]
    )
    heads = any(site.head is not None for site in inspection.sites)
    rows = [
        (s.layer, s.projection, *((s.head if s.head is not None else "",) if heads else ()), s.norm, s.rank)
        for s in inspection.sites
    ]
    names = ("layer", "projection", *(("head",) if heads else ()), "‖ΔW‖", "effective rank")
    print_table(
        "Updates, before the magnitude" if inspection.config.magnitude != "none" else "Updates", names, rows
    )
    basis = f"{inspection.basis:,} more from its basis, " if inspection.basis else ""
    print_line(
        f"{inspection.numbers:,} numbers in the adapter, {basis}{inspection.head:,} in the head, "
        f"{inspection.size:,} bytes. The heat map is in {picture}."
    )
    return None


def listed(methods: dict[str, Any], as_json: bool) -> None:
    """Show the table of methods."""
    if as_json:
        return print_json({name: asdict(row) for name, row in methods.items()})
    rows = []
    for row in methods.values():
        along = f"Shared along {', '.join(row.modes)}" if row.modes else "Nothing shared"
        cuts = "" if row.blocks == "none" else f", cut by {row.blocks}"
        scale = "" if row.magnitude == "none" else f", magnitude {row.magnitude}"
        scale += f", starts {row.init}" if row.init != "orthonormal" else ""
        scale += f", σ = {row.alpha:g} / r" if row.alpha else ""
        scale += ", trains cores" if row.trainable == "cores" else ""
        differs = f"\n{row.differs}" if row.differs else ""
        rows.append(
            (
                row.name,
                f"{row.purpose}\n{along}, {row.core} core{cuts}{scale}. {row.year}, {row.url}{differs}",
            )
        )
    print_table("", ("method", "what it is"), rows)
    return None


def check_output(path: Path, overwrite: bool, data: str) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        ConfigError: The type is not known, the file exists or is the data, or its folder does not exist.
    """
    ConfigError = load("lotr.errors").ConfigError
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
    with temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    temporary.replace(path)
