"""The state of a training run on disk, as safetensors and JSON: optimiser, scheduler, random numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import CONFIG, WEIGHTS
from ..files.atomic import read_json, write_json

TENSORS, STATE, TRAINER_STATE = "training_state.safetensors", "training_state.json", "trainer_state.json"
#: What a report tells of the run so far and no other file knows.
PROGRESS = "progress.json"


def write_state(folder: Path, optimizer: Any, scheduler: Any, process: int = 0) -> None:
    """Write everything that a run needs to go on as if it had not stopped.

    Args:
        folder: Folder of the checkpoint.
        optimizer: Any torch optimiser whose state is tensors and numbers.
        scheduler: Its learning-rate scheduler.
        process: Rank of this process; each has random numbers of its own.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    plain = {str(i): _split(f"optimizer.{i}", values, tensors) for i, values in state["state"].items()}
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    drawn: Any = np.random.get_state()
    kind, keys, *rest = drawn
    content = {
        "optimizer": {"state": plain, "param_groups": state["param_groups"]},
        "scheduler": {
            k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list | bool)
        },
        "rng": {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]},
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _of(TENSORS, process))
    write_json(folder / _of(STATE, process), content)


def read_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Put a written state into a new optimiser and scheduler."""
    content, tensors = _read(folder, 0)
    saved = content["optimizer"]
    state = {int(i): _join(f"optimizer.{i}", values, tensors) for i, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    scheduler.load_state_dict(content["scheduler"])


def read_random(folder: Path, process: int = 0) -> None:
    """Restore the random numbers of this process, if they were written."""
    if not (folder / _of(STATE, process)).is_file():
        return
    content, tensors = _read(folder, process)
    version, inner, gauss = content["rng"]["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = content["rng"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def last_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is complete, or `None`.

    Checkpoints are renamed into place when they are whole; this looks all the same, because a disk may be
    copied halfway.
    """
    numbered = [
        (int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()
    ]
    for _, path in sorted(numbered, reverse=True):
        if all((path / name).is_file() for name in (WEIGHTS, CONFIG, TENSORS, STATE, TRAINER_STATE)):
            return path
    return None


def _of(name: str, process: int) -> str:
    return name if process == 0 else f"{process}.{name}"


def _split(prefix: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors among `values` to `tensors`; return the rest."""
    rest = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{name}"] = value.detach().cpu()
        else:
            rest[name] = value
    return rest


def _join(prefix: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
    return {**values, **own}


def _read(folder: Path, process: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = read_json(folder / _of(STATE, process), "the state of a run")
    try:
        return content, load_file(folder / _of(TENSORS, process))
    except Exception as error:
        raise CheckpointError(
            f"{folder / TENSORS} is truncated or damaged ({error}). Delete {folder} to go on from the one before."
        ) from None
