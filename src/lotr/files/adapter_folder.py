"""What is on disk: how an adapter folder is written, and how it is checked when read.

Files are written under a temporary name and renamed, so a folder is there whole or not at all. Only
safetensors and JSON; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigError, near
from .atomic import check_free, check_sealed, read_json, sealed, write_json

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG, TASK = "adapter_model.safetensors", "adapter_config.json", "task.json"
#: Of a bank: what it is, and instead of `WEIGHTS`, for it can be named as a basis, factors alone.
BANK, BASIS_WEIGHTS = "bank.json", "basis.safetensors"
_SETS = ("target_modules", "exclude_modules")


def is_bank(folder: Path) -> bool:
    """Whether a folder is a bank, also one that has lost a file."""
    return (folder / BANK).is_file() or (folder / BASIS_WEIGHTS).is_file()


def check_replaceable(folder: Path, overwrite: bool = False) -> None:
    """Refuse an output folder for an adapter or a model that is not free, or a bank, whose tasks would go."""
    if is_bank(folder):
        raise ConfigError(
            f"{folder} is a bank, and neither an adapter nor a model replaces it. Choose another output folder."
        )
    check_free(folder, overwrite)


def save_tensors(tensors: dict[str, Tensor], folder: Path, name: str = WEIGHTS) -> None:
    """Write the weights file of an adapter; who may read the folder may read it too."""
    path = folder / name
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_adapter(
    model: PeftModel, folder: Path, task: dict[str, Any] | None = None, base: str | None = None
) -> None:
    """Write the default adapter of a PEFT model into an empty folder, and what evaluation needs beside it.

    `base` is recorded as the base model, instead of where it was loaded from.
    """
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / WEIGHTS).chmod(0o644)
    config = read_json(folder / CONFIG, "an adapter's configuration")
    # PEFT's own methods write sets, which have another order in every process
    lists = {key: sorted(config[key]) for key in _SETS if isinstance(config.get(key), list)}
    recorded = {"base_model_name_or_path": base} if base else {}
    write_config(folder, config | lists | recorded)
    if task is not None:
        write_task(folder, task)


def write_config(folder: Path, fields: dict[str, Any]) -> None:
    """Write a configuration; one of this library has a checksum of itself, which other methods do not know."""
    write_json(folder / CONFIG, sealed(fields) if fields["peft_type"] == "LOTR" else fields)


def write_task(folder: Path, task: dict[str, Any]) -> None:
    """Write what evaluation needs, with a checksum of it and of the configuration and the weights beside it."""
    write_json(folder / TASK, sealed(task, folder / WEIGHTS, folder / CONFIG))


def check_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuse numbers that are NaN or infinite (CheckpointError, which names the first tensor that holds one)."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            odd = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{place}: {odd} of the {tensor.numel()} numbers of {key!r} are not finite. Its training diverged, or "
                "the file is damaged; take an earlier checkpoint."
            )


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, checked."""

    path: Path
    config: dict[str, Any]  # content of `adapter_config.json`
    task: dict[str, Any] = field(default_factory=dict)  # content of `task.json`, empty when there is none

    @property
    def is_lotr(self) -> bool:
        """Whether the adapter is one of this library."""
        return self.config.get("peft_type") == "LOTR"

    @property
    def is_bank(self) -> bool:
        """Whether it is a bank, which has the factors of its basis in a file of their own."""
        return is_bank(self.path)

    def check_one(self) -> None:
        """Refuse a bank where one adapter is needed (CheckpointError)."""
        if self.is_bank:
            raise CheckpointError(
                f"{self.path} is a bank of tasks, not an adapter. `lotr predict {self.path} --task NAME` answers with "
                f"one of them, `lotr bank export {self.path} NAME --output FOLDER` writes it as an adapter, and other "
                f"adapters join with `lotr bank add` or `lotr compress {self.path} --add ADAPTER`."
            )

    @property
    def weights(self) -> Path:
        """The weights file; of a bank, the one with the factors of its basis."""
        return self.path / (BASIS_WEIGHTS if self.is_bank else WEIGHTS)

    @property
    def size(self) -> int:
        """Bytes of the weights file."""
        return self.weights.stat().st_size

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors; CheckpointError where the file is damaged, or a number is not finite."""
        return read_tensors(self.weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shapes alone; CheckpointError where the file is damaged."""
        with opened(self.weights) as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_adapter(path: str | Path) -> AdapterFolder:
    """Open an adapter folder, or download that of a hub id, and check that it is whole; tensors are read on demand.

    Raises:
        CheckpointError: The folder, one of its files, or a field of its configuration is missing or damaged.
    """
    folder = _folder(path)
    config = read_json(folder / CONFIG, "an adapter's configuration")
    if "peft_type" not in config:
        raise CheckpointError(
            f"{folder / CONFIG} has no field peft_type, so it is not the configuration of an adapter."
        )
    task = read_json(folder / TASK, "an adapter's task") if (folder / TASK).is_file() else {}
    adapter = AdapterFolder(folder, config, task)
    if not adapter.weights.is_file():
        way = (
            "Copy the bank again"
            if adapter.is_bank
            else "Pickled weights are never read; save it as safetensors"
        )
        raise CheckpointError(f"{folder} holds no {adapter.weights.name}. {way}.")
    adapter.shapes()
    check_sealed(folder / TASK, task, folder / WEIGHTS, folder / CONFIG)
    return adapter


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; one that is cut off or changed is refused by name."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}). Copy or download it again; nothing of it was loaded."
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, whole and finite, or refuse it."""
    with opened(path):
        # `get_tensor` of safetensors 0.8 never frees two small objects a tensor, which a server would gather
        tensors = load(path.read_bytes())
    check_finite(tensors, str(path))
    return tensors


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | PathLike):
        raise ConfigError(
            f"An adapter is named by its folder or hub id, and this is a {type(path).__name__}. Save it first: "
            "model.save_pretrained(folder)."
        )
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}.")
    looks_local = folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1
    if looks_local or folder.parent.is_dir():
        around = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"Adapter folder {path} does not exist. {near(folder.name, around)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=[WEIGHTS, CONFIG, TASK, "README.md"]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"Adapter {str(path)!r} is no local folder, and the hub does not give it: {reason}"
        ) from error
