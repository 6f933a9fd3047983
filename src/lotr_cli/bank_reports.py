"""What the commands of `lotr bank` show."""

from __future__ import annotations

from typing import Any

from .console import print_json, print_table
from .reports import said


def table(title: str, report: dict[str, Any], as_json: bool) -> None:
    """Show a report as a table of what it tells, or as JSON."""
    if as_json:
        print_json(report)
    else:
        rows = [
            (key.replace("_", " "), _plain(value))
            for key, value in report.items()
            if value not in (None, {}, [])
        ]
        print_table(title, ("", "value"), rows)


def trained(report: dict[str, Any], as_json: bool) -> None:
    """Show what became of the tasks of a run."""
    if as_json:
        return print_json(report)
    rows = [
        (name, task["task"], task["rows"]["train"], *_score(task)) for name, task in report["tasks"].items()
    ]
    print_table(report["bank"], ("task", "kind", "rows", "measured", "score"), rows)
    return said(
        {},
        f"{len(rows):,} tasks trained in {report['seconds']:.0f} s; each has {report['numbers_a_task']:,} numbers, "
        f"{report['bytes_a_task']:,} bytes beside its head.",
        as_json=False,
    )


def _score(task: dict[str, Any]) -> tuple[str, float]:
    name = next(name for name in ("accuracy", "pearson", "loss") if name in task)
    return name, task[name]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else value
