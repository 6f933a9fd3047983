"""The direction of imports: mathematics ← torch; the tuner ← peft; the command line ← typer."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lotr"
MATHEMATICS = ["errors", "methods", "math", "sharing"]
HOSTS = {"peft", "transformers", "accelerate", "datasets", "typer", "rich", "safetensors", "matplotlib"}

LOAD_ALONE = """
import sys, types
package = types.ModuleType("lotr")
package.__path__ = [sys.argv[1]]
sys.modules["lotr"] = package
for name in sys.argv[2:]:
    __import__("lotr." + name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def _imported(path: Path) -> set[str]:
    """Return the names of the packages that a file imports, its own as `lotr.<module>`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def _files(*names: str) -> list[Path]:
    paths = [SOURCE / name for name in names]
    return [f for p in paths for f in (p.rglob("*.py") if p.is_dir() else [p.with_suffix(".py")])]


def test_the_mathematical_files_load_with_torch_alone_in_a_fresh_process() -> None:
    files = [path.relative_to(SOURCE).with_suffix("") for path in _files(*MATHEMATICS)]
    command = [sys.executable, "-c", LOAD_ALONE, str(SOURCE), *(".".join(file.parts) for file in files)]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "torch" in loaded and not loaded & HOSTS


@pytest.mark.parametrize("path", _files(*MATHEMATICS), ids=lambda path: path.name)
def test_mathematics_imports_torch_and_the_standard_library_only(path: Path) -> None:
    assert _imported(path) <= {"torch"} | set(sys.stdlib_module_names)


def test_only_the_tuner_and_what_uses_it_import_peft() -> None:
    # the two files outside the tuner read and write PEFT's own formats
    allowed = {"tuner", "training", "__main__.py", "files", "adapters"}
    # of a bank, only what puts it on a model; its files know no model
    wraps = {Path("bank/wrap.py"), Path("bank/bank.py")}
    offenders = [
        path.relative_to(SOURCE)
        for path in SOURCE.rglob("*.py")
        if "peft" in _imported(path) and path.relative_to(SOURCE).parts[0] not in allowed
    ]
    assert set(offenders) <= wraps


def test_only_the_command_line_imports_its_library() -> None:
    offenders = [path for path in SOURCE.rglob("*.py") if {"typer", "rich"} & _imported(path)]
    assert not offenders


def test_every_name_in_the_reference_exists() -> None:
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert pydoc.locate(name) is not None, f"docs/api.md names {name}, which does not exist"
