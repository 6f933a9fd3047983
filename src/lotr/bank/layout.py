"""The flat order of a task's numbers, and which core each of them belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..math.update import one_by_one
from ..sharing.keys import core_key, file_shapes
from ..sharing.plan import Plan

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter's file, and its place `start:stop` in the flat order."""

    key: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where every number of a task's cores stands.

    Args:
        entries: The tensors, one behind the other, as an adapter's file names them.
        core_of: Number of the core that each number belongs to, shape `(size,)`. A matrix that is no core (a factor
            of a decomposed core) counts as one.

    Example:
        >>> from lotr.blocks import Target
        >>> from lotr.grouping import make_plan
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(6) for p in ("query", "value")]
        >>> layout = Layout.of(make_plan([Target(path, (384, 384), (16, 16)) for path in paths], modes=("layer",)))
        >>> layout.size, layout.n_cores
        (3072, 12)
    """

    entries: tuple[Entry, ...]
    core_of: Tensor = field(compare=False, repr=False)

    @staticmethod
    def of(plan: Plan) -> Layout:
        """Return the layout of a plan: what a task on its factors has of its own, in the order of the plan.

        Raises:
            ConfigError: The plan's cores have no numbers, or its magnitude has some.
        """
        if plan.magnitude != "none":
            raise ConfigError(
                f"A bank cannot hold tasks with magnitude={plan.magnitude!r}, which rescales whole weights. Name an "
                'adapter with magnitude="none".'
            )
        grids = {core_key(part): part.grid for parts in plan.parts.values() for part in parts}
        entries: list[Entry] = []
        cores: list[Tensor] = []
        at = known = 0
        for key, shape in file_shapes(plan, factors=False).items():
            entries.append(Entry(key, shape, at, at + math.prod(shape)))
            cores.append(known + _cores_in(shape, grids.get(key)))
            at, known = entries[-1].stop, int(cores[-1].max()) + 1
        if not entries:
            raise ConfigError(
                "A bank cannot hold tasks on a basis without cores (core='identity', or a head alone): nothing is "
                "left that a task has of its own. Name an adapter with cores, for example of method lotr."
            )
        return Layout(tuple(entries), torch.cat(cores))

    @property
    def size(self) -> int:
        """Numbers of a task."""
        return self.entries[-1].stop

    @property
    def n_cores(self) -> int:
        """Cores (and factors of cores) of a task."""
        return int(self.core_of[-1]) + 1

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (size,)
        """Return the numbers of an adapter in the flat order.

        Args:
            tensors: Tensors by key; those that are no cores are passed over.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        for entry in self.entries:
            found = tuple(tensors[entry.key].shape) if entry.key in tensors else None
            if found != entry.shape:
                what = "is missing" if found is None else f"has shape {found}"
                raise CheckpointError(
                    f"{entry.key!r} {what}, and a task of this bank has it with shape {entry.shape}. Tasks have the "
                    "modules, ranks and cores of the bank's basis; train on it with basis=."
                )
        return torch.cat([tensors[entry.key].flatten() for entry in self.entries])

    def unflatten(
        self,
        numbers: Tensor,  # (*n, size)
    ) -> dict[str, Tensor]:  # (*n, *shape) each
        """Return the tensors, by key, as views of the numbers."""
        return {e.key: numbers[..., e.start : e.stop].unflatten(-1, e.shape) for e in self.entries}

    def to_list(self) -> list[dict[str, Any]]:
        """Return key and shape of every entry, in order, for a reader that knows nothing of plans."""
        return [{"key": entry.key, "shape": list(entry.shape)} for entry in self.entries]


def _cores_in(shape: Shape, grid: tuple[int, int] | None) -> Tensor:  # (numbers,)
    """Return which core of a tensor each of its numbers belongs to, counted from zero."""
    places = torch.arange(math.prod(shape)).reshape(shape)
    # a part's cores lie side by side; a stack of matrices is one core a matrix
    cores = one_by_one(places, grid) if grid else places.reshape(-1, *shape[-2:])
    found = torch.empty(places.numel(), dtype=torch.long)
    found[cores.flatten(1)] = torch.arange(len(cores))[:, None]
    return found
