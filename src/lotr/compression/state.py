"""What an interrupted fit goes on from: the results of finished passes, in a hidden folder beside the output."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .fit import GroupFit

#: Seconds that a fit takes before anything is saved: what is done sooner is done again.
SAVE_AFTER = 10.0


class State:
    """The fits of groups on disk.

    Args:
        output: Folder of the bank to come.
        request: Hash of the adapters and of all settings: another request begins anew.
    """

    def __init__(self, output: Path, request: str) -> None:
        self.folder = output.resolve().with_name(f".{output.name}.fit")
        self.request, self._saved = request, time.monotonic()
        if self._told() != request:
            self.clear()

    def _told(self) -> str | None:
        file = self.folder / "request"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return (self.folder / "request").is_file()

    def load(self, groups: list[str]) -> dict[str, GroupFit] | None:
        """Return the fits of groups that are fitted together, or `None` when there are none yet."""
        file = self._file(groups)
        if not file.is_file():
            return None
        tensors = load_file(file)
        return {
            name: _fit({f.name: tensors[f"{name}/{f.name}"] for f in fields(GroupFit)}) for name in groups
        }

    def save(self, fits: Mapping[str, GroupFit], groups: list[str]) -> None:
        """Write the fits of groups, whole or not at all, unless the last time was a moment ago."""
        if time.monotonic() - self._saved < SAVE_AFTER:
            return
        tensors = {}
        for name in groups:
            for f in fields(GroupFit):
                value = getattr(fits[name], f.name)
                tensors[f"{name}/{f.name}"] = torch.as_tensor(value, dtype=torch.float64).contiguous().clone()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(groups)
        save_file(tensors, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        (self.folder / "request").write_text(self.request, encoding="utf-8")
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, groups: list[str]) -> Path:
        return self.folder / f"{hashlib.sha256(repr(groups).encode()).hexdigest()[:16]}.safetensors"


def _fit(tensors: dict[str, Any]) -> GroupFit:
    plain = {"energy": float(tensors.pop("energy")), "errors": tensors.pop("errors").tolist()}
    return GroupFit(**tensors, **plain)
