"""Files that are there whole or not at all, folders that one run at a time writes, and JSON, which has a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked
    fcntl = None  # type: ignore[assignment]

#: Of a JSON file and of files beside it: a changed byte is noticed, not understood.
CHECKSUM = "checksum"
#: Of an adapter, a bank or a model: those of an earlier one would be read with the files of the new one.
_READ_TOGETHER = (
    *("adapter_*", "task.json", "settings.json", "metrics.json", "curve.png", "cores.png", "confusion.png"),
    *("bank.json", "basis.safetensors", "tasks.sqlite*", "compress.*", "config.json", "model*.safetensors*"),
)


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    What a killed process left of it goes when the next one begins. With `overwrite`, an adapter, a bank or a model is
    replaced in a folder that is not empty, and what else is there stays.

    Raises:
        ConfigError: `folder` is a file, or is not empty, or another process is writing it.
        CheckpointError: The disk is full.
    """
    folder = folder.resolve()
    made = unfinished(folder)
    check_free(folder, overwrite)
    with locked(made, folder):
        check_free(folder, overwrite)  # as the one that was writing left it
        for path in made.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield made
            if folder.is_dir() and (any(folder.iterdir()) or folder == Path.cwd()):
                move_into(made, folder)
            else:
                made.replace(folder)
        except BaseException as error:
            shutil.rmtree(made, ignore_errors=True)
            if _is_of_full_disk(error):
                raise CheckpointError(
                    f"{folder} cannot be written: the disk is full. Nothing is left of it; make room and try again."
                ) from error
            raise


def unfinished(folder: Path) -> Path:
    """Return where a folder is while it is made, or removed: under a hidden name beside it."""
    return folder.with_name(f".{folder.name}.new")


def remove_folder(folder: Path) -> None:
    """Remove a folder at once, and what a killed process left of it: it is there whole, or not at all."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(unfinished(folder))
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def _is_of_full_disk(error: BaseException) -> bool:
    """Whether a write ended for want of room; safetensors has the number in its text alone."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


@contextmanager
def locked(folder: Path, output: Path | None = None, waits: bool = False) -> Iterator[None]:
    """Keep a folder for one run at a time; it is made where it is missing, and goes again where it stays empty.

    The lock is on the open folder and no file: the system drops it with the process, however that ends. On a network's
    file system it may not be seen from other machines. `output` is what the user named, where that is another folder.
    With `waits` the next run begins when the one before has ended; else it is refused (ConfigError).
    """
    check_free(folder, overwrite=True)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _lock(folder, output or folder, waits)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is gone, or holds something
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path, output: Path, waits: bool) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"Another run is writing {output}. Wait until it has ended, or choose another output folder."
        ) from None
    except OSError:  # a file system without locks
        return descriptor
    if folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)  # the run before removed or renamed it at this moment
    return _lock(folder, output, waits)


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that is a file, or that holds something unless `overwrite` is set (ConfigError)."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; the output must be a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(
            f"The output folder {folder} is not empty. Choose another one, or replace it with --overwrite "
            "(overwrite=True)."
        )


def check_apart(output: Path, what: str, place: object, *beside: Path) -> None:
    """Refuse an output folder where `what` is read from lies, because writing would destroy it (ConfigError).

    `None` and hub ids are never in the way; nothing that is read may lie inside of folders `beside` the output either.
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
    """Replace what a folder holds by the files of another, one by one, and remove that one.

    Who finds the file `last` new knows that all are.
    """
    names = {file.name for file in made.iterdir()}
    for old in {file for pattern in _READ_TOGETHER for file in folder.glob(pattern)}:
        if old.name not in names and old.is_file():
            old.unlink()
    for name in sorted(names, key=lambda name: (name == last, name)):
        (made / name).replace(folder / name)
    made.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; CheckpointError where the file is missing, or holds none."""
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


def sealed(fields: Mapping[str, Any], *beside: Path) -> dict[str, Any]:
    """Return fields of a JSON file with a checksum of them, and of the bytes of files beside it.

    Example:
        >>> sealed({"r": 16})[CHECKSUM] == sealed({"r": 16, CHECKSUM: "old"})[CHECKSUM] != sealed({"r": 48})[CHECKSUM]
        True
    """
    plain = {key: value for key, value in fields.items() if key != CHECKSUM}
    digest = hashlib.sha256()
    for path in beside:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    # as it is read again: tuples are lists, and every key is text
    as_read = json.loads(json.dumps(plain, default=str))
    digest.update(json.dumps(as_read, sort_keys=True).encode())
    return {**plain, CHECKSUM: digest.hexdigest()}


def check_sealed(path: Path, fields: Mapping[str, Any], *beside: Path) -> None:
    """Refuse the fields of a JSON file, or files beside it, that are not those of its checksum; none is no error."""
    if CHECKSUM in fields and fields != sealed(fields, *beside):
        what = f"the checksum of {', '.join(file.name for file in (path, *beside))} differs"
        raise CheckpointError(
            f"{path.parent} is damaged, or was put together from different folders: {what}. Copy or download it again. "
            f"After a change by hand, take the line {CHECKSUM!r} out of {path.name}."
        )


def file_bytes(shapes: dict[str, tuple[int, ...]], width: int) -> int:
    """Return the bytes of a safetensors file before it exists, from its tensors' shapes and the bytes of a number.

    They are eight for the length of the header, the header padded to eight, and the numbers.

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
