"""The short form of `make kill`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a compiler of C"
)
def test_commands_that_are_killed_at_a_file_operation_go_on_to_the_same_files() -> None:
    words = [sys.executable, str(Path(__file__).with_name("kill.py")), "8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sum(line.startswith("lotr ") for line in done.stdout.splitlines()) == 4
