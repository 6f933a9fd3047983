"""What the tasks of a bank have in common: the flat order of their numbers, and the folder that they are in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import BASIS_WEIGHTS, CONFIG
from ..files.atomic import read_json, whole_folder, write_json
from ..sharing.keys import file_shapes
from ..sharing.plan import Plan
from ..tuner.basis import check_basis
from ..tuner.saved_adapter import factors_of, hash_of, read_basis, read_saved
from .store import create_store
from .task import DTYPES, check_dtype

BANK, TASKS = "bank.json", "tasks.sqlite"
FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter's file, and its place `start:stop` in the flat order."""

    key: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where every number of a task's cores stands.

    Args:
        entries: The tensors, one behind the other, as an adapter's file names them.

    Example:
        >>> from lotr.sharing.blocks import Target
        >>> from lotr.sharing.make_plan import make_plan
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(6) for p in ("query", "value")]
        >>> Layout.of(make_plan([Target(path, (384, 384), (16, 16)) for path in paths], modes=("layer",))).size
        3072
    """

    entries: tuple[Entry, ...]

    @staticmethod
    def of(plan: Plan) -> Layout:
        """Return the layout of a plan: what a task on its factors has of its own, in the order of the plan.

        Raises:
            ConfigError: The plan's cores have no numbers, or its magnitude has some.
        """
        if plan.magnitude != "none":
            raise ConfigError(
                f"A bank cannot hold tasks with magnitude={plan.magnitude!r}, which rescales whole weights. Name an "
                'adapter with magnitude="none".'
            )
        entries: list[Entry] = []
        start = 0
        for key, shape in file_shapes(plan, factors=False).items():
            entries.append(Entry(key, shape, start, start + math.prod(shape)))
            start = entries[-1].stop
        if not entries:
            raise ConfigError(
                "A bank cannot hold tasks on a basis without cores (core='identity', or a head alone): nothing is "
                "left that a task has of its own. Name an adapter with cores, for example of method lotr."
            )
        return Layout(tuple(entries))

    @property
    def size(self) -> int:
        """Numbers of a task."""
        return self.entries[-1].stop

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (size,)
        """Return the numbers of an adapter in the flat order.

        Args:
            tensors: Tensors by key; those that are no cores are passed over.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        for entry in self.entries:
            shape = tuple(tensors[entry.key].shape) if entry.key in tensors else None
            if shape != entry.shape:
                what = "is missing" if shape is None else f"has shape {shape}"
                raise CheckpointError(
                    f"{entry.key!r} {what}, and a task of this bank has it with shape {entry.shape}. Tasks have the "
                    "modules, ranks and cores of the bank's basis; train on it with basis=."
                )
        return torch.cat([tensors[entry.key].flatten() for entry in self.entries])

    def unflatten(
        self,
        numbers: Tensor,  # (*n, size)
    ) -> dict[str, Tensor]:  # (*n, *shape) each
        """Return the tensors, by key, as views of the numbers."""
        return {e.key: numbers[..., e.start : e.stop].unflatten(-1, e.shape) for e in self.entries}

    def to_list(self) -> list[dict[str, Any]]:
        """Return key and shape of every entry, in order, for a reader that knows nothing of plans."""
        return [{"key": entry.key, "shape": list(entry.shape)} for entry in self.entries]


@dataclass(frozen=True)
class Description:
    """Content of `bank.json`.

    Args:
        base_model: Name or path of the base model, where the basis told one.
        base_fingerprint: Of the base model's adapted weights, where the basis told one.
        basis_hash: Of every number of the shared factors.
        dtype: Type in which tasks are kept.
        numbers: Numbers of a task.
        layout: Key and shape of every tensor of a task, in the order of its numbers.
        format: Version of the folder.
    """

    base_model: str | None
    base_fingerprint: str | None
    basis_hash: str
    dtype: str
    numbers: int
    layout: list[dict[str, Any]]
    format: int = FORMAT

    @staticmethod
    def read(folder: Path) -> Description:
        """Read the description of a bank.

        Raises:
            CheckpointError: There is no bank, it is damaged, or another version of the library made it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"Bank {folder} does not exist. `lotr bank create` makes one.")
        content = read_json(folder / BANK, "a bank")
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"The bank in {folder} has format {content.get('format')}, and this version of lotr reads format "
                f"{FORMAT} alone: use the version that wrote it, or make the bank anew with `lotr bank create`."
            )
        try:
            description = Description(**content)
        except TypeError as error:
            raise CheckpointError(f"{folder / BANK} is damaged: {error}. Restore it from a copy.") from None
        if description.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder / BANK} is damaged: dtype={description.dtype!r} is none. Restore it from a copy."
            )
        return description

    @property
    def task_bytes(self) -> int:
        """Bytes of the numbers of one task."""
        return self.numbers * DTYPES[self.dtype].itemsize


def create_folder(path: Path, basis: str | Path, dtype: str) -> None:
    """Make an empty bank: the basis, the description, and a file without tasks. See `CoreBank.create`."""
    check_dtype(dtype)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "a bank already; add tasks to it" if (path / BANK).is_file() else "not an empty folder"
        raise ConfigError(f"{path} is {what}, or choose another folder.")
    saved = read_saved(basis)
    adapter, config, plan = saved.folder, saved.config, saved.plan
    layout = Layout.of(plan)
    if config.bias != "none":
        raise ConfigError(
            f"{basis} has bias={config.bias!r}: its tasks train biases, which a bank does not hold."
        )
    factors = read_basis(config) if config.refers_to_basis else factors_of(adapter.tensors())
    check_basis(plan, factors, str(basis))
    description = Description(
        config.base_model_name_or_path or adapter.task.get("base_model"),
        adapter.task.get("base_fingerprint"),
        hash_of(factors),
        dtype,
        layout.size,
        layout.to_list(),
    )
    with whole_folder(path) as folder:
        save_file(dict(sorted(factors.items())), folder / BASIS_WEIGHTS, metadata={"format": "pt"})
        (folder / BASIS_WEIGHTS).chmod(0o644)
        alone = {"basis": None, "basis_hash": None, "inference_mode": True}
        write_json(folder / CONFIG, config.to_dict() | alone)
        write_json(folder / BANK, asdict(description))
        create_store(folder / TASKS, description.basis_hash, description.task_bytes)
