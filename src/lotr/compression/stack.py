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
Pairs = dict[str, tuple[Tensor, Tensor]]  # `B` `(n, out, q)` and `A` `(n, q, in)` of some tasks, by module
BATCH = 32 << 20  # bytes of the updates that are worked on at once, in float32
CACHE = 256 << 20  # bytes up to which the updates of all tasks are read once


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

    def bytes_a_task(self, groups: Sequence[Group]) -> int:
        """Return the bytes of one task's updates at the sites of some groups, in float32."""
        return sum(4 * self.rank * len(group.sites) * sum(group.shape) for group in groups)

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
    """Yields batches; updates that fit into the cache stay there after the first time, as the files have them."""

    def __init__(
        self, stack: Stack, groups: Sequence[Group], weighted: bool, tick: Callable[[int, int], None]
    ) -> None:
        self.stack, self.groups, self.tick = stack, tuple(groups), tick
        self.weights = torch.tensor(stack.weights if weighted else [1.0] * len(stack), dtype=torch.float64)
        self.shapes: dict[str, Shape] = {}  # of the part of each module that the groups cover
        for site in (site for group in self.groups for site in group.sites):
            out, width = self.shapes.get(site.module, (0, 0))
            (o, i), row, column = site.shape, site.row, site.column
            self.shapes[site.module] = max(out, row + o), max(width, column + i)
        self.size = max(1, min(64, BATCH // stack.bytes_a_task(self.groups)))
        self._cache: list[Pairs] | None = (
            [] if len(stack) * stack.bytes_a_task(self.groups) <= CACHE else None
        )
        self._is_cached = False

    def __call__(self) -> Iterator[Batch]:
        starts = range(0, len(self.stack), self.size)
        if self._is_cached and self._cache is not None:
            for at, pairs in zip(starts, self._cache, strict=True):
                yield self._batch(pairs, at)
            return
        cache = []
        for at in starts:
            pairs = self._read(at)
            yield self._batch(pairs, at)
            if self._cache is not None:
                cache.append(pairs)
            self.tick(min(at + self.size, len(self.stack)), len(self.stack))
        if self._cache is not None:
            self._cache, self._is_cached = cache, True

    def _read(self, at: int) -> Pairs:
        entries = self.stack.entries[at : at + self.size]
        n, q = len(entries), max(entry.rank for entry in entries)
        pairs = {m: (torch.zeros(n, out, q), torch.zeros(n, q, i)) for m, (out, i) in self.shapes.items()}
        for t, entry in enumerate(entries):
            with open_source(entry.name, entry.path).read() as read:
                for module in entry.energies.keys() & self.shapes.keys():
                    A, B = read(module)
                    (Bs, As), rank = pairs[module], len(A)
                    Bs[t, :, :rank], As[t, :rank] = B[: Bs.shape[1]], A[:, : As.shape[2]]
        return pairs

    def _batch(self, pairs: Pairs, at: int) -> Batch:
        weights = self.weights[at : at + self.size, None, None]
        return {
            group.name: [
                (
                    pairs[site.module][0][:, site.row : site.row + site.shape[0]].double() * weights,
                    pairs[site.module][1][:, :, site.column : site.column + site.shape[1]].double(),
                )
                for site in group.sites
            ]
            for group in self.groups
        }


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
