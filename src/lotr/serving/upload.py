"""Tasks that come over HTTP. A name is data: it never becomes a path."""

from __future__ import annotations

import io
import lzma
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..bank import CoreBank
from ..errors import LotrError
from ..files.adapter_folder import CONFIG, TASK, WEIGHTS
from .problems import Problem

#: What reading a damaged zip file raises, by what it was packed with.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, OSError),
)


def add_archive(bank: CoreBank, name: str, archive: bytes, replace: bool, most: int) -> float:
    """Add a task that `lotr bank export` wrote, from a zip file of its folder; returns the error of rounding.

    Nothing of the archive but three files of known names is read, of at most so many bytes, unpacked.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            _unpack(archive, Path(folder), most)
        except _DAMAGED as error:
            raise Problem(400, f"This is no zip file of an exported task: {error}.") from None
        with CoreBank.open(bank.path, writable=True) as writable:
            if name in writable and not replace:
                raise Problem(409, f"There is a task {name!r} already. Send it to ?replace=true.", "task")
            try:
                task = writable.from_adapter(name, folder)
            except LotrError as error:  # of what was sent, and not of the bank
                raise Problem(400, str(error).replace(folder, name), code="task_damaged") from None
            return writable.add(task, replace=replace)


def _unpack(archive: bytes, folder: Path, most: int) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        members = {PurePosixPath(info.filename).name: info for info in file.infolist()}
        if sum(members[name].file_size for name in (WEIGHTS, CONFIG, TASK) if name in members) > most:
            raise Problem(413, f"The task is longer than {most:,} bytes.", code="too_large")
        for name in (WEIGHTS, CONFIG, TASK):
            if name in members:
                (folder / name).write_bytes(file.read(members[name]))
