"""All adapters as one stack of updates: checked once, then read as often as the fit needs, a few tasks at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, near
from ..sharing.plan import Group
from .fit import Batch
from .sources import Source, open_source

Tick = Callable[[str, int, int], None]  # what is done, how many, of how many
Shape = tuple[int, int]
_BATCH = 64 << 20  # bytes of the updates in memory
_CACHE = 256 << 20  # bytes up to which the updates of all tasks are read once


@dataclass(frozen=True)
class Entry:
    """What the first reading tells of one adapter.

    Args:
        name: Name of its task.
        path: Its folder.
        energies: `‖Δ‖²` of every module that it changes.
        rank: Largest rank of its updates.
        bytes: Bytes of its weights file.
        head_bytes: Bytes of its head.
    """

    name: str
    path: Path
    energies: dict[str, float]
    rank: int
    bytes: int
    head_bytes: int

    @property
    def energy(self) -> float:
        """`‖Δ‖²` of all modules together."""
        return sum(self.energies.values())


def read_entry(name: str, path: Path, known: Mapping[str, Shape], base: str) -> tuple[Entry, Source]:
    """Read an adapter whole, and check it against the base model.

    Args:
        name: Name of its task.
        path: Its folder.
        known: Path of every linear module of the base model → its `(out, in)`.
        base: Name of the base model, for messages.

    Raises:
        CheckpointError: It is damaged, not finite, no low-rank update, or of another base model.
    """
    source = open_source(name, path)
    for module, shape in source.shapes.items():
        if module not in known:
            raise CheckpointError(
                f"{path} changes {module!r}, which is no linear module of the base model {base!r}. "
                f"{near(module, known)} It was trained on {source.base_model!r} as {source.task_type}: name that model "
                "with --base, and compress adapters of other models into banks of their own."
            )
        if shape != known[module]:
            raise CheckpointError(
                f"{path} changes a weight of shape {shape} at {module!r}, and that of the base model {base!r} has "
                f"{known[module]}: it was trained on another one, {source.base_model!r}. Leave it out, or name that "
                "model with --base."
            )
    energies, rank = {}, 1
    with source.read() as read:
        for module in source.shapes:
            A, B = (matrix.double() for matrix in read(module))
            energies[module] = max(float(((A @ A.T) * (B.T @ B)).sum()), 0.0)
            rank = max(rank, len(A))
    head_bytes = sum(tensor.numel() * tensor.element_size() for tensor in source.head().values())
    return Entry(name, path, energies, rank, source.bytes, head_bytes), source


@dataclass(frozen=True)
class Stack:
    """The updates of all adapters.

    Args:
        entries: One an adapter, in the order of their names.
        weights: What the update of each is multiplied by in the fit.
    """

    entries: tuple[Entry, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def rank(self) -> int:
        """Largest rank of any update."""
        return max(entry.rank for entry in self.entries)

    def batches(self, groups: Sequence[Group], weighted: bool, tick: Callable[[int, int], None]) -> _Batches:
        """Return a function that yields the updates at the sites of some groups, a few tasks at a time.

        Args:
            groups: The groups.
            weighted: Whether the weights are multiplied in.
            tick: Called as tasks are done.
        """
        return _Batches(self, groups, weighted, tick)

    def digest(self) -> str:
        """Return a hash of names, places, sizes and times of all files."""
        digest = hashlib.sha256()
        for entry in self.entries:
            stats = [file.stat() for file in sorted(entry.path.glob("adapter_*.*"))]
            digest.update(
                repr((entry.name, str(entry.path), [(s.st_size, s.st_mtime_ns) for s in stats])).encode()
            )
        return digest.hexdigest()


class _Batches:
    """Yields batches; those of a small stack stay in memory after the first time."""

    def __init__(
        self, stack: Stack, groups: Sequence[Group], weighted: bool, tick: Callable[[int, int], None]
    ) -> None:
        self.stack, self.groups, self.tick = stack, tuple(groups), tick
        self.weights = stack.weights if weighted else (1.0,) * len(stack)
        self.modules = tuple(dict.fromkeys(site.module for group in self.groups for site in group.sites))
        a_task = sum(8 * stack.rank * sum(site.shape) for group in self.groups for site in group.sites)
        self.size = max(1, min(64, _BATCH // a_task))
        self._cache: list[Batch] | None = [] if a_task * len(stack) <= _CACHE else None
        self._cached = False

    def __call__(self) -> Iterator[Batch]:
        if self._cached and self._cache is not None:
            yield from self._cache
            return
        for at in range(0, len(self.stack), self.size):
            batch = self._read(slice(at, at + self.size))
            if self._cache is not None:
                self._cache.append(batch)
            yield batch
            self.tick(min(at + self.size, len(self.stack)), len(self.stack))
        self._cached = True

    def _read(self, tasks: slice) -> Batch:
        entries, weights = self.stack.entries[tasks], self.weights[tasks]
        pairs: dict[str, list[tuple[Tensor, Tensor] | None]] = {module: [] for module in self.modules}
        for entry, weight in zip(entries, weights, strict=True):
            with open_source(entry.name, entry.path).read() as read:
                for module in self.modules:
                    if module in entry.energies:
                        A, B = read(module)
                        pairs[module].append((weight * B.double(), A.double()))
                    else:
                        pairs[module].append(None)
        shapes = {site.module: site.shape for group in self.groups for site in group.sites}
        whole = {module: _padded(of_module) for module, of_module in pairs.items() if any(of_module)}
        n = len(entries)
        return {
            group.name: [
                _cut(whole[site.module], site.row, site.column, site.shape)
                if site.module in whole
                else (
                    torch.zeros(n, shapes[site.module][0], 1).double(),
                    torch.zeros(n, 1, shapes[site.module][1]).double(),
                )
                for site in group.sites
            ]
            for group in self.groups
        }


def _padded(
    pairs: Sequence[tuple[Tensor, Tensor] | None],
) -> tuple[Tensor, Tensor]:  # (n, out, q), (n, q, in)
    """Put the matrices of a module together, with zeros up to the largest rank, and where a task has none."""
    q = max(pair[0].shape[1] for pair in pairs if pair is not None)
    out, width = next((len(B), A.shape[1]) for B, A in (pair for pair in pairs if pair is not None))
    Bs = torch.zeros(len(pairs), out, q, dtype=torch.float64)
    As = torch.zeros(len(pairs), q, width, dtype=torch.float64)
    for n, pair in enumerate(pairs):
        if pair is not None:
            B, A = pair
            Bs[n, :, : B.shape[1]], As[n, : len(A)] = B, A
    return Bs, As


def _cut(pair: tuple[Tensor, Tensor], row: int, column: int, shape: Shape) -> tuple[Tensor, Tensor]:
    B, A = pair
    return B[:, row : row + shape[0]], A[:, :, column : column + shape[1]]


def weights_of(entries: Sequence[Entry], weights: str | Mapping[str, float]) -> tuple[float, ...]:
    """Return what each update is multiplied by.

    Args:
        entries: The adapters.
        weights: `"relative"`: one over its norm, so that every adapter's relative error counts alike; `"absolute"`:
            one; or a number by name on top of `"relative"`, one where none is given.

    Raises:
        ConfigError: A weight is no positive number, or names no adapter.
    """
    if isinstance(weights, str) and weights not in ("relative", "absolute"):
        raise ConfigError(f"weights={weights!r} is none. {near(weights, ('relative', 'absolute'))}")
    own = {} if isinstance(weights, str) else dict(weights)
    names = {entry.name for entry in entries}
    for name, weight in own.items():
        if name not in names:
            raise ConfigError(f"weights name {name!r}, which is no adapter. {near(name, names)}")
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"weights[{name!r}]={weight} is no weight. Use a positive number, or leave it out."
            )
    if weights == "absolute":
        return (1.0,) * len(entries)
    return tuple(own.get(entry.name, 1.0) / (entry.energy**0.5 or 1.0) for entry in entries)
