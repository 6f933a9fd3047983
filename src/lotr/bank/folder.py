"""A bank's folder: the basis, what the bank is for, and an empty file of tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import BASIS_WEIGHTS, CONFIG, fingerprint
from ..files.atomic import read_json, whole_folder, write_json
from ..tuner.basis import check_basis
from ..tuner.config import LotrConfig
from ..tuner.saved_adapter import hash_of, read_saved
from . import database
from .codec import check_dtype, n_bytes
from .layout import Layout
from .pages import page_size

BANK, TASKS = "bank.json", "tasks.sqlite"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """Content of `bank.json`.

    Args:
        base_model: Name or path of the base model, where the basis told one.
        base_fingerprint: Of the base model's adapted weights, where the basis told one.
        basis_hash: Of every number of the shared factors.
        dtype: Type in which new tasks are kept.
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
            CheckpointError: There is no bank, it is damaged, or a newer version of the library made it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"Bank {folder} does not exist. `lotr bank create` makes one.")
        said = read_json(folder / BANK, "a bank")
        version = said.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"The bank in {folder} has format {version}, and this version of lotr reads up to {FORMAT}. Nothing "
                "was changed; upgrade lotr."
            )
        try:
            return Description(**said)
        except TypeError as error:
            raise CheckpointError(f"{folder / BANK} is damaged: {error}. Restore it from a copy.") from None

    def check_base(self, model: nn.Module, modules: list[str], folder: Path) -> None:
        """Refuse a base model whose adapted weights are others than those that the basis was made for.

        Raises:
            CheckpointError: The message names both.
        """
        try:
            found = fingerprint(model, modules)
        except AttributeError as error:
            raise CheckpointError(
                f"The bank in {folder} is for {self.base_model!r}, and this model has another structure: {error}."
            ) from None
        if self.base_fingerprint and found and self.base_fingerprint != found:
            raise CheckpointError(
                f"The weights of this model are not those that the bank in {folder} is for ({self.base_model!r}): "
                f"fingerprint {found}, not {self.base_fingerprint}. Load the right base model."
            )


def create(path: Path, basis: str | Path, dtype: str) -> None:
    """Make an empty bank; the folder is there whole or not at all.

    Args:
        path: Folder to make.
        basis: Folder or hub id of a LoTR adapter with cores, without a magnitude.
        dtype: Type in which tasks are kept, one of `DTYPES`.

    Raises:
        ConfigError: The folder is not free, the type is not known, or the adapter cannot be a basis.
        CheckpointError: The adapter is damaged.
    """
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
    factors = saved.factors()
    check_basis(plan, factors, str(basis))
    base = config.base_model_name_or_path or adapter.task.get("base_model")
    digest = hash_of(factors)
    fingerprint = adapter.task.get("base_fingerprint")
    described = Description(base, fingerprint, digest, dtype, layout.size, layout.to_list())
    with whole_folder(path) as made:
        save_file(dict(sorted(factors.items())), made / BASIS_WEIGHTS, metadata={"format": "pt"})
        (made / BASIS_WEIGHTS).chmod(0o644)
        write_json(made / CONFIG, _standing_alone(config))
        write_json(made / BANK, asdict(described))
        database.create(made / TASKS, digest, page_size(n_bytes(layout, dtype)))


def _standing_alone(config: LotrConfig) -> dict[str, Any]:
    return config.to_dict() | {"basis": None, "basis_hash": None, "inference_mode": True}
