"""The passes of a fit over all adapters: groups a few at a time, as memory allows, and what is done is kept."""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..sharing.groups import Group
from . import diagonal, fit
from .fit import GroupFit
from .stack import Stack, Tick

#: Seconds that a fit takes before anything is saved: what is done sooner is done again.
SAVE_AFTER = 10.0
_SUMS = 1 << 30  # bytes of the sums of the groups that are fitted at once


class State:
    """What an interrupted fit goes on from: the fits after the last pass, in a hidden folder beside the output.

    The request tells the adapters and all settings: another one begins anew.
    """

    def __init__(self, output: Path, request: str) -> None:
        self.folder = output.resolve().with_name(f".{output.name}.fit")
        self.request, self._saved = _hash(request), time.monotonic()

    def of(self, stack: Stack) -> State:
        """Return the state of the fit of some of the adapters."""
        part = copy.copy(self)
        part.request = f"{self.request}-{_hash(repr([entry.name for entry in stack.entries]))}"
        return part

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.folder.glob(f"{self.request}-*.safetensors"))

    def load(self, groups: list[str]) -> dict[str, GroupFit] | None:
        """Return the fits of groups that are fitted together, or `None` when there are none yet, or damaged ones."""
        file = self._file(groups)
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
        except SafetensorError:
            return None
        fits: dict[str, Any] = {name: {} for name in groups}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition(".")
            fits[name][field] = tensor.tolist() if field in ("energy", "errors") else tensor
        return {name: GroupFit(**fields) for name, fields in fits.items()}

    def save(self, fits: Mapping[str, GroupFit], groups: list[str]) -> None:
        """Write the fits of groups, whole or not at all, unless the last time was a moment ago."""
        if time.monotonic() - self._saved < SAVE_AFTER:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(groups)
        fields = ((f"{name}.{field}", value) for name in groups for field, value in vars(fits[name]).items())
        # a copy each, for file and storage; a group's name has no dot
        tensors = {
            key: torch.as_tensor(value, dtype=torch.float64).contiguous().clone() for key, value in fields
        }
        written = file.with_suffix(".tmp")
        try:
            save_file(tensors, written)
            written.replace(file)
        finally:
            written.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, groups: list[str]) -> Path:
        return self.folder / f"{self.request}-{_hash(repr(groups))}.safetensors"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chunks(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Yield groups, as many at once as have their sums in memory: every pass opens each adapter once a chunk."""
    chunk: list[Group] = []
    held = 0
    for group in groups:
        sums = sum(8 * width * min(width, 2048) for width in group.shape)
        if chunk and held + sums > _SUMS:
            yield chunk
            chunk, held = [], 0
        chunk.append(group)
        held += sums
    yield chunk


def find_directions(groups: Sequence[Group], stack: Stack, state: State, tick: Tick) -> dict[str, GroupFit]:
    """Return the HOSVD of all groups."""
    fits: dict[str, GroupFit] = {}
    for chunk in chunks(groups):
        names = [group.name for group in chunk]
        known = state.load(names)
        if known is None:
            total = stack.total(chunk, "Directions", tick)
            known = fit.directions({group.name: group.shape for group in chunk}, total)
            state.save(known, names)
        fits |= known
    return fits


def run_sweeps(
    groups: Sequence[Group],
    fits: dict[str, GroupFit],
    stack: Stack,
    state: State | None,
    most: int,
    tolerance: float,
    tick: Tick,
) -> None:
    """Sweep the fits, which are changed, until nothing is gained or `most` times, from the HOSVD or an earlier run.

    A sweep that lowers a group's error by a smaller share than `tolerance` is its last.
    """
    kind: ModuleType = fit if groups[0].core.by_site else diagonal
    for chunk in chunks(groups):
        names = [group.name for group in chunk]
        total = stack.total(chunk, "Fitting", tick)
        new = {group.name: group.rank for group in chunk if not fits[group.name].errors}
        if new:
            kind.begin({name: fits[name] for name in new}, new, total)
        for name in new:
            fits[name].turn_back()
        while unsettled := {
            name: fits[name]
            for name in names
            if len(fits[name].errors) <= most and not fit.is_settled(fits[name], tolerance)
        }:
            kind.sweep(unsettled, total)
            if state is not None:
                state.save(fits, names)
