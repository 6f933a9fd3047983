"""`lotr compress ADAPTER`: one adapter of this library with smaller ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..bank.head_form import n_outputs
from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import check_replaceable, write_adapter
from ..files.atomic import check_apart, whole_folder
from ..tuner.saved_adapter import read_saved
from ..tuner.truncate import truncate
from .base import load_base
from .ranks import checked_size
from .sources import open_source


def cut(
    adapter: str | Path,
    output: str | Path,
    base: str | nn.Module | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a saved adapter with free cores at smaller ranks, as near to it as these allow; see `lotr.truncate`.

    Returns ranks before and after, the energy kept of each group, and bytes.
    """
    from peft import PeftModel

    saved, output = read_saved(adapter), Path(output)
    check_replaceable(output, overwrite)
    check_apart(output, "adapter", saved.path)
    check_apart(output, "basis", saved.config.basis)
    if rank is None and max_error is None:
        raise ConfigError("One adapter is cut to a rank or to an error: give one of --rank and --max-error.")
    checked_size(rank, max_error, None)
    source = open_source(saved.path)
    head = source.head()
    name, bare, _ = load_base(base, [source], n_outputs(head) if head else 2, "float32")
    check_apart(output, "base model", name)
    try:
        model = PeftModel.from_pretrained(bare, str(saved.path), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} does not fit the base model {name!r}: {error}") from error
    # each side keeps its half of what may be lost
    groups = truncate(model, rank=rank, energy=None if max_error is None else 1 - max_error**2 / 2)
    with whole_folder(output, overwrite) as folder:
        write_adapter(model, folder, task=saved.folder.task or None, base=name)
    return {
        "output": str(output),
        "groups": [vars(group) for group in groups],
        "bytes_before": saved.folder.size,
        "bytes_after": read_saved(output).folder.size,
    }
