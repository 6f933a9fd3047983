"""All adapters as one stack of updates: checked once, then read as often as the fit needs, a few tasks at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, near
from ..sharing.blocks import Site
from ..sharing.groups import Group
from .base import check_same_base
from .fit import Batch, Shape, Total
from .sources import Source, has_exchanged_experts, open_source

Tick = Callable[[str, int, int], None]  # what is done, how many, of how many
Spread = Callable[["Stack", Sequence[Group], str, Tick], Total]
#: `B` `(n, out, q)` and `A` `(n, q, in)` of some tasks, by module and number of the expert.
Pairs = dict[tuple[str, int | None], tuple[Tensor, Tensor]]
BATCH = 32 << 20  # bytes of the updates that are worked on at once, in float32
CACHE = 256 << 20  # bytes up to which the updates of all tasks are read once


@dataclass(frozen=True)
class Entry:
    """What the first reading tells of one adapter."""

    name: str  # of its task
    path: Path
    energies: dict[str, float]  # `‖Δ‖²` of every module that it changes
    rank: int  # the largest of its updates
    bytes: int  # of its weights file
    head_bytes: int
    exchanged: bool = False  # whether `A` and `B` of its experts have each other's place

    def open(self) -> Source:
        """Open the adapter."""
        source = open_source(self.path)
        return source.exchanged() if self.exchanged else source

    @property
    def energy(self) -> float:
        """`‖Δ‖²` of all modules together."""
        return sum(self.energies.values())

    def error(self, lost: Mapping[str, float]) -> float:
        """Return the relative error that losing `lost`, by module, is."""
        return (sum(lost.values()) / self.energy) ** 0.5 if self.energy else 0.0


def read_entry(
    name: str,
    path: Path,
    known: Mapping[str, tuple[int, ...]],
    base: str | None,
    told: str | None = None,
    in_bank: bool = False,
) -> tuple[Entry, Source]:
    """Read an adapter whole, and check it.

    Args:
        name: Of its task.
        path: Its folder.
        known: Paths and shapes `(*experts, out, in)` of the weights of the base model, or of those that a bank adapts.
        base: Name of the base model.
        told: What most adapters call it.
        in_bank: Whether `known` are those of a bank.
    """
    source = open_source(path)
    check_same_base(source, told)
    exchanged = has_exchanged_experts(source, known)
    source = source.exchanged() if exchanged else source
    for module, shape in source.shapes.items():
        if re.search(r"\.experts\.\d+\.", module) and any(len(weight) == 3 for weight in known.values()):
            raise CheckpointError(
                f"{path} changes {module!r}, a module of its own as experts were in transformers 4; now they are one "
                "parameter. Bring it into that form once: PeftModel.from_pretrained(model, …).save_pretrained(…)."
            )
        if module not in known and in_bank:
            raise CheckpointError(
                f"{path} changes {module!r}, for which the bank has no factors. Fit a new bank with all adapters, or "
                "leave this one out."
            )
        if module not in known:
            raise CheckpointError(
                f"{path} changes {module!r}, which is no linear module of the base model {base!r}, nor a stack of "
                f"experts. {near(module, known)} It was trained on {source.base_model!r} as {source.task_type}: name "
                "that model with --base, and compress adapters of other models into banks of their own."
            )
        if shape != known[module]:
            raise CheckpointError(
                f"{path} changes a weight of shape {shape} at {module!r}, and that of the base model {base!r} has "
                f"{known[module]}: it was trained on another one, {source.base_model!r}. Leave it out, or name "
                "that model with --base."
            )
    energies, rank = {}, 1
    with source.reader() as read:
        for module in source.shapes:
            A, B = (matrix.double() for matrix in read(module))
            energies[module] = max(float(((A @ A.mT) * (B.mT @ B)).sum()), 0.0)
            rank = max(rank, A.shape[-2])
    head_bytes = sum(tensor.numel() * tensor.element_size() for tensor in source.head().values())
    return Entry(name, path, energies, rank, source.folder.size, head_bytes, exchanged), source


@dataclass(frozen=True)
class Stack:
    """The updates of all adapters."""

    entries: tuple[Entry, ...]  # in the order of their names
    weights: tuple[float, ...]  # what the update of each is multiplied by in the fit
    spread: Spread | None = None  # runs the passes elsewhere

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def head_bytes(self) -> int:
        """Bytes of the heads of all adapters."""
        return sum(entry.head_bytes for entry in self.entries)

    def part(self, numbers: Iterable[int]) -> Stack:
        """Return some of the adapters."""
        numbers = list(numbers)
        entries = tuple(self.entries[n] for n in numbers)
        return replace(self, entries=entries, weights=tuple(self.weights[n] for n in numbers))

    def bytes_a_task(self, groups: Sequence[Group]) -> int:
        """Return the bytes of one task's updates at the sites of some groups, in float32."""
        rank = max(entry.rank for entry in self.entries)
        return sum(4 * rank * len(group.sites) * sum(group.shape) for group in groups)

    def total(self, groups: Sequence[Group], what: str, tick: Tick) -> Total:
        """Return what runs passes over the weighted updates at the sites of some groups."""
        if self.spread is not None:
            return self.spread(self, groups, what, tick)
        batches = self.batches(groups, what, tick)
        return lambda add_up: add_up(batches())

    def batches(self, groups: Sequence[Group], what: str, tick: Tick) -> Callable[[], Iterator[Batch]]:
        """Return a function that yields the weighted updates at the sites of some groups, a few tasks at a time.

        Updates of all tasks that fit into the cache together stay there after the first time, as the files have them.
        """
        size = max(1, min(64, BATCH // self.bytes_a_task(groups)))
        is_small = len(self) * self.bytes_a_task(groups) <= CACHE
        cache: dict[int, Pairs] = {}

        def batches() -> Iterator[Batch]:
            for at in range(0, len(self), size):
                pairs = cache.get(at)
                if pairs is None:
                    pairs = _read(self.entries[at : at + size], groups)
                    if is_small:
                        cache[at] = pairs
                    tick(what, min(at + size, len(self)), len(self))
                weights = torch.tensor(self.weights[at : at + size], dtype=torch.float64)[:, None, None]
                yield {group.name: [_at(site, pairs, weights) for site in group.sites] for group in groups}

        return batches

    def files(self) -> list[tuple[str, str, list[tuple[int, int]]]]:
        """Return names and places of all adapters, and sizes and times of their files."""
        files = []
        for entry in self.entries:
            stats = [file.stat() for file in sorted(entry.path.glob("adapter_*.*"))]
            files.append((entry.name, str(entry.path), [(s.st_size, s.st_mtime_ns) for s in stats]))
        return files


def _read(entries: Sequence[Entry], groups: Sequence[Group]) -> Pairs:
    """Read the updates of some adapters at the modules of some groups; smaller ranks are filled up with zeros."""
    shapes: dict[tuple[str, int | None], Shape] = {}  # of the part of each matrix that the groups cover
    for site in (site for group in groups for site in group.sites):
        out, width = shapes.get((site.module, site.expert), (0, 0))
        (o, i), (row, column) = site.shape, _corner(site)
        shapes[site.module, site.expert] = max(out, row + o), max(width, column + i)
    experts: dict[str, list[int | None]] = defaultdict(list)
    for module, expert in shapes:
        experts[module].append(expert)
    n, q = len(entries), max(entry.rank for entry in entries)
    pairs = {m: (torch.zeros(n, out, q), torch.zeros(n, q, i)) for m, (out, i) in shapes.items()}
    for t, entry in enumerate(entries):
        with entry.open().reader() as read:
            for module in entry.energies.keys() & experts.keys():
                numbers = [expert for expert in experts[module] if expert is not None]
                first = min(numbers, default=0)
                matrices = read(module, slice(first, max(numbers) + 1)) if numbers else read(module)
                for expert in experts[module]:
                    A, B = matrices if expert is None else (side[expert - first] for side in matrices)
                    (Bs, As), rank = pairs[module, expert], len(A)
                    Bs[t, :, :rank], As[t, :rank] = B[: Bs.shape[1]], A[:, : As.shape[2]]
    return pairs


def _corner(site: Site) -> tuple[int, int]:
    """Return first row and column of a site in its matrix, which may be that of one expert."""
    return site.row - (site.expert or 0) * site.shape[0], site.column


def _at(site: Site, pairs: Pairs, weights: Tensor) -> tuple[Tensor, Tensor]:  # (n, o, q), (n, q, i)
    (Bs, As), (o, i), (row, column) = pairs[site.module, site.expert], site.shape, _corner(site)
    B, A = Bs[:, row : row + o], As[:, :, column : column + i]
    return B.double() * weights, A.double()


def weights_of(entries: Sequence[Entry], weights: str | Mapping[str, float]) -> tuple[float, ...]:
    """Return what each update is multiplied by; relative: one over its norm. See `compress`."""
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
