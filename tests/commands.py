"""The command line, called in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lotr_cli.app import app


def lotr(*words: str | Path) -> Any:
    """Run a command in a wide terminal."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def refused(code: int, *words: str | Path) -> str:
    """Run a command that must fail, and return its message."""
    result = lotr(*words)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert "Unexpected" not in result.stderr, result.stderr
    return " ".join(result.stderr.split())
