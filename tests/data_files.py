"""Small files of data."""

from __future__ import annotations

from pathlib import Path

ROWS = [{"text": f"text {n}", "label": str(n % 2)} for n in range(20)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def write(folder: Path, name: str, content: str) -> str:
    """Write a file and return its path."""
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)
