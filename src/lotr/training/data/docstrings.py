"""A data set that every Python brings along: which module of the standard library does a docstring describe?

It makes `lotr train` runnable without a download. The texts are read from the user's own installation at
run time, so their number differs a little between Python versions; nothing of them is shipped.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError

MARK = "[module]"
"""What stands where a text named its own module.

Not a word such as "this": the texts are full of it, and a masked name should not be mistaken for prose.
"""

SHORTEST, LONGEST = 30, 400
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "_bundled"}
)
KINDS: dict[type[ast.AST], str] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "async function",
}
BLOCKS = ("body", "handlers", "orelse", "finalbody")

Row = dict[str, str]
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def load_docstrings(root: Path | None = None, packages: int = 16) -> dict[str, list[Row]]:
    """Read the first paragraphs of docstrings, labelled with the package that they come from.

    The package's and the module's own names are masked, a text occurs once, and its hash alone decides
    on its side of the split: about four in five train, the same ones on every machine.

    Args:
        root: Folder with Python sources. Default: the standard library of the running Python.
        packages: How many labels to keep: those with the most texts, ties broken by name.

    Returns:
        Rows under "train" and "test", each with "text", "label", "kind" (function, async function, class
        or module) and "module" (the dotted name).

    Raises:
        DataError: The folder holds no usable docstrings, or those of one package only.

    Example:
        >>> rows = load_docstrings(packages=2)
        >>> sorted(rows), sorted(rows["test"][0])
        (['test', 'train'], ['kind', 'label', 'module', 'text'])
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    rows = _once([row for file in _sources(root) for row in _rows(file, root)])
    sizes = Counter(row["label"] for row in rows)
    chosen = set(sorted(sizes, key=lambda label: (-sizes[label], label))[:packages])
    if len(chosen) < 2:
        raise DataError(
            f"The data set docstrings needs Python sources of two packages or more; {root} has "
            f"{len(sizes)} with usable docstrings. This Python may come without its .py files: "
            "use another installation, or a file of your own."
        )
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for row in rows:
        if row["label"] in chosen:
            splits[_split(row["text"])].append(row)
    return splits


def _sources(root: Path) -> list[Path]:
    # Path.rglob would also walk site-packages, which can be a hundred times as large
    files: list[Path] = []
    folders = [root] if root.is_dir() else []
    while folders:
        for entry in folders.pop().iterdir():
            if entry.suffix == ".py":
                files.append(entry)
            elif entry.name not in SKIPPED_FOLDERS and entry.is_dir() and not entry.is_symlink():
                folders.append(entry)
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _rows(file: Path, root: Path) -> Iterator[Row]:
    parts = file.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    tree = _parse(file)
    if tree is None or not parts:
        return
    label = _public(parts[0], root)
    own_names = re.compile(
        rf"\b(?:{'|'.join(re.escape(name) for name in {*parts[:1], label, parts[-1]})})\b", re.IGNORECASE
    )
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        text = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
        text = own_names.sub(MARK, text)
        if SHORTEST <= len(text) <= LONGEST:
            yield {"text": text, "label": label, "kind": KINDS[type(node)], "module": ".".join(parts)}


def _public(name: str, root: Path) -> str:
    """Return `decimal` for `_pydecimal`: the Python half of a module that users know by one name."""
    public = name.removeprefix("_py")
    return public if (root / f"{public}.py").is_file() else name


def _parse(file: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        # old sources have invalid escapes, which is not the reader's business
        warnings.simplefilter("ignore")
        try:
            return ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None


def _documented(tree: ast.Module) -> Iterator[Documented]:
    # only statements hold definitions; ast.walk would visit every expression and take twice as long
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Documented):
            yield node
        inner = [child for block in BLOCKS for child in getattr(node, block, ())]
        waiting.extend(reversed(inner))


def _once(rows: list[Row]) -> list[Row]:
    """Keep the first of equal texts, and none of a text that two labels claim."""
    claims: dict[str, set[str]] = {}
    for row in rows:
        claims.setdefault(row["text"].casefold(), set()).add(row["label"])
    kept: dict[str, Row] = {}
    for row in rows:
        text = row["text"].casefold()
        if len(claims[text]) == 1:
            kept.setdefault(text, row)
    return list(kept.values())


def _split(text: str) -> str:
    digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 5 == 0 else "train"
