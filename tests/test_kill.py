"""The short form of `make kill`; `python tests/test_kill.py 200 [seed]` is the long one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `killed_commands.py` in a process that `kill.c` is loaded into."""
    with tempfile.TemporaryDirectory() as folder:
        shim = str(Path(folder) / "kill.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, HERE / "kill.c", "-ldl"], check=True)
        loaded = {**os.environ, "LD_PRELOAD": shim, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, HERE / "killed_commands.py", *words]
        return subprocess.run(command, env=loaded, text=True, **options)


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a compiler of C"
)
def test_commands_that_are_killed_at_a_file_operation_go_on_to_the_same_files() -> None:
    done = run("8", capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sum(line.startswith("lotr ") for line in done.stdout.splitlines()) == 4


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]).returncode)
