"""How each command's result is shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import out, print_json, print_table

if TYPE_CHECKING:
    from lotr.adapters.inspection import Inspection


def said(report: dict[str, Any], line: str, as_json: bool) -> None:
    """Show a result that fits one line."""
    if as_json:
        print_json(report)
    else:
        out.print(line, highlight=False, soft_wrap=True)


def trained(report: dict[str, Any], folder: str | None, as_json: bool) -> None:
    """Show the result of a training run."""
    if as_json:
        return print_json(report)
    numbers = report["trained_numbers"]
    rows = [(name, value) for name, value in report["eval"].items()]
    rows += [
        ("trained numbers, adapter", numbers["adapter"]),
        ("trained numbers, head", numbers["head"]),
        ("bytes on disk", report["adapter_bytes"]),
        ("steps", report["steps"]),
        ("seconds", report["seconds"]),
    ]
    print_table("", ("", "value"), rows)
    out.print(f"The adapter, its curve and its card are in {folder}.", highlight=False, soft_wrap=True)
    return None


def evaluated(
    adapter: str, data: str, scores: dict[str, Any], labels: list[str], drawn: Path | None, as_json: bool
) -> None:
    """Show scores."""
    if as_json:
        picture = None if drawn is None else str(drawn)
        return print_json({"adapter": adapter, "data": data, **scores, "labels": labels, "picture": picture})
    print_table(
        f"{adapter} on {data}", ("", "value"), [(k, v) for k, v in scores.items() if k != "confusion"]
    )
    if drawn is not None:
        out.print(f"The confusion matrix is in {drawn}.", highlight=False, soft_wrap=True)
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
    if "budget" in report:
        lines.append(report["said"])
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)
    return None


def inspected(adapter: str, found: Inspection, drawn: Path, as_json: bool) -> None:
    """Show what is inside an adapter."""
    if as_json:
        return print_json({**found.to_dict(), "picture": str(drawn)})
    header = ("group", "sites", "block", "rank", "factors", "cores")
    print_table(
        f"{adapter}: groups", header, [tuple(group[name] for name in header) for group in found.groups]
    )
    heads = any(site.head is not None for site in found.sites)
    rows = [
        (s.layer, s.projection, *((s.head if s.head is not None else "",) if heads else ()), s.norm, s.rank)
        for s in found.sites
    ]
    names = ("layer", "projection", *(("head",) if heads else ()), "‖ΔW‖", "effective rank")
    print_table(
        "Updates, before the magnitude" if found.config.magnitude != "none" else "Updates", names, rows
    )
    out.print(
        f"{found.numbers:,} numbers in the adapter, "
        + (f"{found.basis:,} more from its basis, " if found.basis else "")
        + f"{found.head:,} in the head, {found.size:,} bytes. "
        f"The heat map is in {drawn}.",
        highlight=False,
        soft_wrap=True,
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
        scale += f", starts at {row.init}" if row.init != "orthonormal" else ""
        scale += ", trains cores" if row.trainable == "cores" else ""
        rows.append(
            (row.name, f"{row.purpose}\n{along}, {row.core} core{cuts}{scale}. {row.year}, {row.url}")
        )
    print_table("", ("method", "what it is"), rows)
    return None
