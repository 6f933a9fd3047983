"""One task of a bank: its numbers, its head, what is known of it, and how that becomes a record of plain values."""

from __future__ import annotations

import hashlib
import json
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import check_finite
from .head_form import check_head, labels_of
from .layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What PEFT's words for kinds of tasks are here, where a head does not say more; and the other way round.
KINDS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}
TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
#: What SQLite gives for the fields of `Record`: a file from elsewhere can have anything in any column.
_COLUMNS = (str, str, float, float, str, bytes, bytes, bytes)
_LATEST = 1e11  # seconds since 1970; years have four digits
#: How a row of a batch without a task is written: PEFT's name, or `None`.
BASE = "__base__"
_LONGEST_NAME = 200
#: Unicode's categories of characters that no table can show: controls, marks of direction and of no width, halves.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True, eq=False)
class Task:
    """What a task has of its own; everything else is in the basis and in the base model.

    Args:
        name: Any text of up to 200 characters, all of which can be seen.
        numbers: All numbers of its cores in the order of `Layout`, shape `(size,)`.
        head: Modules trained in full, by their key in an adapter's file.
        labels: Names of the classes, for classification.
        task: `"classification"`, `"regression"` or `"causal-lm"`; `None` where nobody said.
        metadata: Anything that JSON can hold.

    Raises:
        ConfigError: The name is empty or too long, or has characters that cannot be seen.

    Example:
        >>> import torch
        >>> Task("reviews", torch.zeros(3072), labels=("bad", "good")).numbers.shape
        torch.Size([3072])
    """

    name: str
    numbers: Tensor
    head: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    task: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> str:
    """Return the name of a task. Names are data: separators of paths, quotes and any script are allowed.

    Example:
        >>> check_name("../reviews'; DROP TABLE task")
        "../reviews'; DROP TABLE task"
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"A task cannot be called {name!r}: a name is text that is not empty.")
    if len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"A task cannot be called {name[:40]!r}…: the name has {len(name):,} characters, and the longest have "
            f"{_LONGEST_NAME}. Keep what it tells in the metadata."
        )
    if name == BASE:
        raise ConfigError(f"A task cannot be called {BASE!r}: rows of that name are rows without a task.")
    bad = [character for character in name if unicodedata.category(character) in _UNSEEN]
    if bad:
        raise ConfigError(
            f"A task cannot be called {name!r}: {bad[0]!r} is a control character, turns the direction of text, has "
            "no width, or is half a character: no table could show it. Leave it out."
        )
    return name


def kind_and_labels(
    record: Mapping[str, Any], head: Mapping[str, Tensor], task_type: str | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """Return what kind of task an adapter is for, `None` where nothing tells it, and the names of its classes.

    Args:
        record: Content of `task.json`, empty where there is none.
        head: Whose outputs are called `0`, `1` and so on where they have no names.
        task_type: In PEFT's words.
    """
    kind = record.get("task") or KINDS.get(str(task_type))
    labels = tuple(record.get("labels", ()))
    if kind == "classification" and not labels:
        labels = labels_of(head) if head else ()
        of_head = ("classification" if labels else "regression") if head else None
        kind = of_head or record.get("task")
    return kind, labels


@dataclass(frozen=True)
class Record:
    """A task as it is kept; docs/file_format.md describes the columns."""

    name: str
    dtype: str
    created: float
    error: float
    about: str
    numbers: bytes
    head: bytes
    checksum: bytes = b""

    def sealed(self) -> Record:
        """Return the record with its checksum."""
        return replace(self, checksum=self._digest())

    @property
    def is_whole(self) -> bool:
        """Whether every byte is the one that was written, and every column holds what it should."""
        values = zip(astuple(self), _COLUMNS, strict=True)
        typed = all(isinstance(value, kind) for value, kind in values) and abs(self.created) < _LATEST
        return typed and self.checksum == self._digest()

    def _digest(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for column in fields(self)[:-1]:
            value = getattr(self, column.name)
            plain = value if isinstance(value, bytes) else str(value).encode()
            digest.update(len(plain).to_bytes(8, "little") + plain)
        return digest.digest()


def to_record(task: Task, layout: Layout, dtype: str) -> Record:
    """Return a task as it is kept; ConfigError where it does not fit the bank or its type."""
    if tuple(task.numbers.shape) != (layout.size,):
        raise ConfigError(
            f"Task {task.name!r} has numbers of shape {tuple(task.numbers.shape)}, and a task of this bank has "
            f"({layout.size},). Train it on the bank's basis, with the bank's rank."
        )
    cluster, numbers = layout.cut(task.numbers.detach().float().cpu())
    about: dict[str, Any] = {"task": task.task, "labels": list(task.labels), "metadata": dict(task.metadata)}
    about |= {} if cluster is None else {"cluster": cluster}
    try:
        check_head(task.head, task.labels, task.task)
        rounded, head = _rounded(numbers, dtype), {key: _rounded(p, dtype) for key, p in task.head.items()}
        text = json.dumps(
            {key: value for key, value in about.items() if value or value == 0},
            ensure_ascii=False,
            allow_nan=False,
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"Task {task.name!r} cannot be kept: {error}") from None
    norm = float(torch.linalg.norm(numbers.double()))
    lost = float(torch.linalg.norm(rounded.double() - numbers.double())) / norm if norm else 0.0
    blob = rounded.contiguous().view(torch.uint8).numpy().tobytes()
    return Record(task.name, dtype, time.time(), lost, text, blob, save(head) if head else b"")


def _rounded(numbers: Tensor, dtype: str) -> Tensor:
    if not numbers.is_floating_point():
        return numbers.detach().cpu().contiguous()
    odd = int((~torch.isfinite(numbers)).sum())
    if odd:
        raise ConfigError(
            f"{odd} of its {numbers.numel()} numbers are not finite. Train it with a lower rate."
        )
    rounded = numbers.detach().cpu().contiguous().to(DTYPES[dtype])
    if torch.isinf(rounded).any():
        raise ConfigError(
            f"{float(numbers.abs().max()):.3g} is too large for {dtype}, whose largest number is "
            f"{torch.finfo(rounded.dtype).max:.3g}. Make the bank with dtype='bfloat16'."
        )
    return rounded


def to_task(record: Record, layout: Layout) -> Task:
    """Return the task of a record, its numbers in float32; CheckpointError where it is none of a bank's."""
    try:
        about, cluster = _about(record.about, len(layout.supports))
    except ValueError as error:
        raise _unusable(record.name, error) from None
    dtype, size = DTYPES.get(record.dtype), layout.size if cluster is None else len(layout.supports[cluster])
    if dtype is None or len(record.numbers) != size * dtype.itemsize:
        raise CheckpointError(
            f"Task {record.name!r} has {len(record.numbers)} bytes of {record.dtype}, and a task of this bank has "
            f"{size} numbers: another program wrote it. Remove it, or write it again."
        )
    numbers = layout.fill(cluster, torch.frombuffer(bytearray(record.numbers), dtype=dtype).float())
    try:
        tensors = load(record.head) if record.head else {}
        head = {key: p.float() if p.is_floating_point() else p for key, p in tensors.items()}
        check_finite({"numbers": numbers, **head}, f"Task {record.name!r}")
        task = Task(record.name, numbers, head, **about)
        check_head(task.head, task.labels, task.task)
    except (SafetensorError, TypeError, ValueError) as error:
        raise _unusable(record.name, error) from None
    return task


def _unusable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"Task {name!r} cannot be used: {error} Remove it, or write it again.")


def _about(text: str, clusters: int) -> tuple[dict[str, Any], int | None]:
    """Read what a record tells of its task, as fields of `Task`, and which of the clusters it is of."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("what is told of it nests too deeply.") from None
    if not isinstance(content, dict):
        raise ValueError("what is told of it is no JSON object.")
    kind, labels, metadata = content.get("task"), content.get("labels", []), content.get("metadata", {})
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not texts or not isinstance(kind, str | None) or not isinstance(metadata, dict):
        raise ValueError(
            "its kind is no text, its labels are no list of texts, or its metadata is no object."
        )
    cluster = content.get("cluster")
    if cluster is not None and (not isinstance(cluster, int) or cluster not in range(clusters)):
        raise ValueError(f"it is of cluster {str(cluster)[:40]}, and the bank has {clusters}.")
    return {"task": kind, "labels": tuple(labels), "metadata": metadata}, cluster
