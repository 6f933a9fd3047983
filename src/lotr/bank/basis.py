"""What all tasks of a bank have in common, and the folder that they are in: `bank.json`, factors, configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, near
from ..files.adapter_folder import BANK, BASIS_WEIGHTS, CONFIG, save_tensors, write_config
from ..files.atomic import CHECKSUM, check_sealed, read_json, sealed, whole_folder, write_json
from ..files.fingerprint import difference
from ..tuner.basis import check_basis
from ..tuner.config import LotrConfig
from ..tuner.saved_adapter import hash_of, read_basis, read_saved
from .clusters import Cluster, Ranks, clusters_of
from .store import create_store
from .task import DTYPES

TASKS = "tasks.sqlite"
FORMAT = 2
_KINDS = {"dtype": str, "numbers": int, "basis_hash": str, "clusters": list} | dict.fromkeys(
    ("base_model", "base_fingerprint"), str | None
)


@dataclass(frozen=True)
class Description:
    """Content of `bank.json`, whose fields docs/file_format.md describes."""

    base_model: str | None
    base_fingerprint: str | None
    basis_hash: str
    dtype: str
    numbers: int
    layout: list[dict[str, Any]]
    clusters: list[dict[str, Any]] = field(default_factory=list)  # ranks by group
    format: int = FORMAT

    @staticmethod
    def read(folder: Path) -> Description:
        """Read the description of a bank."""
        if not folder.is_dir():
            raise CheckpointError(f"Bank {folder} does not exist. `lotr bank create` makes one.")
        content = read_json(folder / BANK, "a bank")
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"The bank in {folder} has format {content.get('format')}, and this version of lotr reads format "
                f"{FORMAT} alone: use the version that wrote it, or make the bank anew with `lotr bank create`."
            )
        read_json(folder / CONFIG, "a bank")
        check_sealed(folder / BANK, content, folder / CONFIG)
        try:
            description = Description(**{key: value for key, value in content.items() if key != CHECKSUM})
        except TypeError as error:
            raise CheckpointError(f"{folder / BANK} is damaged: {error}. Restore it from a copy.") from None
        for name, kind in _KINDS.items():
            value = getattr(description, name)
            if not isinstance(value, kind) or (name == "dtype" and value not in DTYPES):
                raise CheckpointError(
                    f"{folder / BANK} is damaged: {name}={str(value)[:80]!r} does not fit. Restore it from a copy."
                )
        return description

    def bytes_of(self, numbers: int) -> int:
        """Return the bytes of some numbers of a task."""
        return numbers * DTYPES[self.dtype].itemsize


class Basis:
    """The shared factors of the bank in a folder, and what they are for."""

    def __init__(self, path: Path) -> None:
        self.path, self.description = path, Description.read(path)
        saved = read_saved(path)
        self._config, self.plan = saved.config, saved.plan
        try:
            self.clusters, self.layout = clusters_of(saved.config, saved.plan, self.description.clusters)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / BANK} is damaged: its clusters do not fit: {error!r}. Restore it from a copy."
            ) from None
        none = {group.name: (0, 0) for group in self.plan.groups}
        self.whole = Cluster(saved.config, saved.plan, none)
        self.task_bytes = self.description.bytes_of(self.layout.kept)
        if (self.description.numbers, self.description.layout) != (self.layout.size, self.layout.to_list()):
            raise CheckpointError(
                f"{path}: bank.json tells of {self.description.numbers} numbers a task, and adapter_config.json beside "
                f"it of {self.layout.size}, or of the same in another order. They were put together from different "
                "banks."
            )

    @property
    def config(self) -> LotrConfig:
        """Configuration of a new task on this basis, for `get_peft_model`: its factors are the bank's."""
        config = copy.copy(self._config)
        config.basis, config.basis_hash = str(self.path.resolve()), self.description.basis_hash
        config.trainable, config.inference_mode = "cores", False
        return config

    def factors(self) -> dict[str, Tensor]:
        """Return `U` and `V` (transposed) of every group, by their key in an adapter's file."""
        return read_basis(self.config)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a bare base model whose weights are others than those that the basis was made for."""
        name, expected = self.description.base_model, self.description.base_fingerprint
        try:
            for target in self.plan.targets:
                model.get_parameter(target.path) if target.experts else model.get_submodule(target.path)
        except AttributeError as error:
            raise CheckpointError(
                f"The bank in {self.path} is for {name!r}, and this model has another structure: {error}."
            ) from None
        if differs := difference(expected, model):
            raise CheckpointError(
                f"The weights of this model are not those that the bank in {self.path} is for ({name!r}): {differs}. "
                "Load the right base model."
            )


def structure_of(modes: Sequence[str], core: str) -> tuple[tuple[str, ...], str]:
    """Return modes and core of a basis whose tasks share along `modes`, `task` among them or not.

    Cores are `free`, or `diagonal`: of those, one a site.
    """
    shared = tuple(mode for mode in modes if mode != "task")
    if core == "diagonal" and {"layer", "projection"} <= set(shared):
        shared = ("site",)  # along two modes a diagonal would be a product
    return shared, "cp" if core == "diagonal" else core


def create_folder(path: Path, basis: str | Path, dtype: str, clusters: Sequence[Ranks] = ()) -> None:
    """Make an empty bank: the basis, the description, and a file without tasks. See `CoreBank.create`.

    `clusters` has the ranks of each cluster by group, those of the basis together.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not a type of a bank's numbers. {near(dtype, DTYPES)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = (
            "is a bank already: add tasks to it, or" if (path / BANK).is_file() else "is not an empty folder:"
        )
        raise ConfigError(f"{path} {what} choose another folder.")
    saved = read_saved(basis)
    config, record = saved.config, saved.folder.task
    _, layout = clusters_of(config, saved.plan, clusters)
    if config.bias != "none":
        raise ConfigError(
            f"{basis} has bias={config.bias!r}: its tasks train biases, which a bank does not hold."
        )
    factors = saved.factors()
    check_basis(saved.plan, factors, str(basis))
    description = Description(
        config.base_model_name_or_path or record.get("base_model"),
        record.get("base_fingerprint"),
        hash_of(factors),
        dtype,
        layout.size,
        layout.to_list(),
        [dict(ranks) for ranks in clusters],
    )
    with whole_folder(path) as folder:
        save_tensors(factors, folder, BASIS_WEIGHTS)
        alone = {"basis": None, "basis_hash": None, "inference_mode": True}
        write_config(folder, config.to_dict() | alone)
        write_json(folder / BANK, sealed(asdict(description), folder / CONFIG))
        create_store(folder / TASKS, description.basis_hash, description.bytes_of(layout.kept))
