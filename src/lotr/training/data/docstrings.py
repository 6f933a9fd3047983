"""A data set that every Python brings along: which module of the standard library does a docstring describe?

It makes `lotr train` runnable without a download. The texts are read from the user's own installation at
run time, so their number differs a little between Python versions; nothing of them is shipped.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError

#: Stands where a text named its own module: no word such as "this", of which texts are full.
MARK = "[module]"
SHORTEST, LONGEST = 30, 400
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "_bundled"}
KINDS: dict[type[ast.AST], str] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "async function",
}

Row = dict[str, str]


def load_docstrings(root: Path | None = None, packages: int = 16) -> dict[str, list[Row]]:
    """Read the first paragraphs of docstrings, labelled with the package that they come from.

    The package's and the module's own names are masked, a text occurs once, and its hash alone decides
    on its side of the split: about four in five train, the same ones on every machine.

    Args:
        root: Folder with Python sources. Default: the standard library of the running Python.
        packages: How many labels to keep: those with the most texts, ties broken by name.

    Raises:
        DataError: The folder holds no usable docstrings, or those of one package only.

    Example:
        >>> rows = load_docstrings(packages=2)
        >>> sorted(rows), sorted(rows["test"][0])
        (['test', 'train'], ['kind', 'label', 'module', 'text'])
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    same: dict[str, list[Row]] = {}
    for file in _sources(root):
        for row in _rows(file, root):
            same.setdefault(row["text"].casefold(), []).append(row)
    # a text that two labels claim says nothing of either
    unique = {text: rows[0] for text, rows in same.items() if len({row["label"] for row in rows}) == 1}
    sizes = Counter(row["label"] for row in unique.values())
    largest = sorted(sizes, key=lambda label: (-sizes[label], label))[:packages]
    if len(largest) < 2:
        raise DataError(
            f"The data set docstrings needs Python sources of two packages or more; {root} has "
            f"{len(sizes)} with usable docstrings. This Python may come without its .py files: "
            "use another installation, or a file of your own."
        )
    return _split({text: row for text, row in unique.items() if row["label"] in largest})


def load_functions(root: Path | None = None) -> dict[str, list[Row]]:
    """Read names of functions and the first paragraphs of their docstrings, as `prompt` and `completion`.

    Split as `load_docstrings` splits; a text occurs once.

    Args:
        root: Folder with Python sources. Default: the standard library of the running Python.

    Example:
        >>> sorted(load_functions()["test"][0])
        ['completion', 'prompt']
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    rows: dict[str, Row] = {}
    for file in _sources(root):
        for node, text in _documented(file):
            if KINDS[type(node)].endswith("function") and SHORTEST <= len(text) <= LONGEST:
                rows.setdefault(text, {"prompt": node.name, "completion": text})
    return _split(rows)


def _split(rows: dict[str, Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for text, row in rows.items():
        digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()
        splits["test" if int.from_bytes(digest, "big") % 5 == 0 else "train"].append(row)
    return splits


def _sources(root: Path) -> list[Path]:
    # os.walk and not Path.rglob, which would also walk site-packages, a hundred times as large
    files: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _rows(file: Path, root: Path) -> Iterator[Row]:
    parts = file.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if not parts:
        return
    # _pydecimal is the Python half of a module that users know as decimal
    public = parts[0].removeprefix("_py")
    label = public if (root / f"{public}.py").is_file() else parts[0]
    names = "|".join(map(re.escape, {parts[0], label, parts[-1]}))
    own_names = re.compile(rf"\b(?:{names})\b", re.IGNORECASE)
    for node, paragraph in _documented(file):
        text = own_names.sub(MARK, paragraph)
        if SHORTEST <= len(text) <= LONGEST:
            yield {"text": text, "label": label, "kind": KINDS[type(node)], "module": ".".join(parts)}


def _documented(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield the definitions of a source file, each with the first paragraph of its docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old sources
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in _definitions(tree):
        paragraph = re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip(), maxsplit=1)[0]
        yield node, " ".join(paragraph.split())


def _definitions(node: ast.AST) -> Iterator[Any]:
    # only statements hold definitions; ast.walk would visit every expression and take twice as long
    if type(node) in KINDS:
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _definitions(child)
