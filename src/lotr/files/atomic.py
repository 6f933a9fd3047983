"""Files that are there whole or not at all, JSON, and the size of a safetensors file before it exists."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Args:
        folder: Where the files shall be.
        overwrite: Replace files of the same names in a folder that is not empty; otherwise it is refused.

    Yields:
        An empty folder beside `folder`.

    Raises:
        ConfigError: `folder` is a file, or is not empty.
    """
    check_free(folder, overwrite)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield made
        made.chmod(0o755)
        if folder.is_dir() and any(folder.iterdir()):
            move_into(made, folder)
        else:
            made.replace(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something.

    Raises:
        ConfigError: `folder` is a file, or is not empty and `overwrite` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; the output must be a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(
            f"The output folder {folder} is not empty. Choose another one, or replace it with --overwrite."
        )


def check_apart(output: Path, what: str, place: object, *beside: Path) -> None:
    """Refuse an output folder where something lies that is read.

    Args:
        output: The output folder.
        what: What is read, for the message.
        place: Where it is read from; `None` and hub ids are never in the way.
        beside: Further folders that are written; nothing that is read may lie inside of them.

    Raises:
        ConfigError: Writing would destroy what is read.
    """
    if not isinstance(place, (str, Path)) or not Path(place).exists():
        return
    read = Path(place).resolve()
    if read == output.resolve() or any(read.is_relative_to(folder.resolve()) for folder in beside):
        raise ConfigError(
            f"--output {output} is where the {what} {place} lies: it would be overwritten, and everything else that "
            "refers to it would break. Choose another output folder."
        )


def move_into(made: Path, folder: Path, last: str = "") -> None:
    """Move the files of one folder over those of another, one by one, and remove the first.

    Args:
        made: Folder with new files.
        folder: Folder that may hold other files; those stay.
        last: The file that is moved last; who finds it new knows that all are.
    """
    for file in sorted(made.iterdir(), key=lambda p: (p.name == last, p.name)):
        file.replace(folder / file.name)
    made.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing or is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}, so it is not {what}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: it nests too deeply.") from None
    except ValueError as error:  # no JSON, no text, or a number of thousands of digits
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object.")
    return content


def file_bytes(shapes: dict[str, tuple[int, ...]], width: int) -> int:
    """Return the size of a safetensors file before it exists.

    Args:
        shapes: Name and shape of every tensor.
        width: Bytes a number.

    Returns:
        Bytes: eight for the length of the header, the header padded to eight, the numbers.

    Example:
        >>> file_bytes({"a": (2, 3)}, width=4)
        120
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": f"F{8 * width}", "shape": shape, "data_offsets": [start, end]}
    written = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(written / 8) * 8 + end
