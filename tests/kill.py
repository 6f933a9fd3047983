"""Kills commands at their file operations and lets them go on: `python tests/kill.py 200 [seed]`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run `killed_commands.py` in a process that `kill.c` is loaded into."""
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "kill.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, HERE / "kill.c", "-ldl"], check=True)
        loaded = {**os.environ, "LD_PRELOAD": str(shim), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, HERE / "killed_commands.py", *sys.argv[1:]], env=loaded
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
