"""The flat order of a task's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..sharing.keys import file_shapes
from ..sharing.plan import Plan


@dataclass(frozen=True)
class Layout:
    """Where every number of a task's cores stands.

    Args:
        shapes: The tensors by key, one behind the other, as an adapter's file names them.
        supports: Of each cluster of tasks, where those numbers stand that its tasks have; all others are zero.

    Example:
        >>> from lotr.sharing.blocks import Target
        >>> from lotr.sharing.make_plan import make_plan
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(6) for p in ("query", "value")]
        >>> Layout.of(make_plan([Target(path, (384, 384), (16, 16)) for path in paths], modes=("layer",))).size
        3072
    """

    shapes: Mapping[str, tuple[int, ...]]
    supports: tuple[Tensor, ...] = ()  # (n,) each

    @staticmethod
    def of(plan: Plan) -> Layout:
        """Return the layout of a plan: what a task on its factors has of its own, in the order of the plan."""
        if plan.magnitude != "none":
            raise ConfigError(
                f"A bank cannot hold tasks with magnitude={plan.magnitude!r}, which rescales whole weights. Name an "
                'adapter with magnitude="none".'
            )
        shapes = file_shapes(plan, factors=False)
        if not shapes:
            raise ConfigError(
                "A bank cannot hold tasks on a basis without cores (core='identity', or a head alone): nothing is "
                "left that a task has of its own. Name an adapter with cores, for example of method lotr."
            )
        return Layout(shapes)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of every tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """Numbers of a task."""
        return sum(self.sizes)

    @property
    def kept(self) -> int:
        """The most numbers that are kept of a task of a cluster."""
        return max((len(support) for support in self.supports), default=self.size)

    def cut(
        self,
        numbers: Tensor,  # (size,)
    ) -> tuple[int | None, Tensor]:  # (n,)
        """Return the first cluster beside whose numbers all are zero, with these; `None` and all without one."""
        own = int(numbers.count_nonzero())
        for cluster, support in enumerate(self.supports):
            if int(numbers[support].count_nonzero()) == own:
                return cluster, numbers[support]
        return None, numbers

    def fill(
        self,
        cluster: int | None,
        numbers: Tensor,  # (n,)
    ) -> Tensor:  # (size,)
        """Return all numbers of a task from what `cut` kept of them."""
        if cluster is None:
            return numbers
        at = self.supports[cluster].to(numbers.device)
        return numbers.new_zeros(self.size).index_copy_(0, at, numbers)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (size,)
        """Return the numbers of an adapter's tensors by key in the flat order; those that are no cores are left out."""
        for key, expected in self.shapes.items():
            shape = tuple(tensors[key].shape) if key in tensors else None
            if shape != expected:
                what = "is missing" if shape is None else f"has shape {shape}"
                raise CheckpointError(
                    f"{key!r} {what}, and a task of this bank has it with shape {expected}. Tasks have the modules, "
                    "ranks and cores of the bank's basis; train on it with basis=."
                )
        return torch.cat([tensors[key].flatten() for key in self.shapes])

    def unflatten(
        self,
        numbers: Tensor,  # (*n, size)
    ) -> dict[str, Tensor]:  # (*n, *shape) each
        """Return the tensors, by key, as views of the numbers."""
        parts = zip(self.shapes.items(), numbers.split(self.sizes, -1), strict=True)
        return {key: part.unflatten(-1, shape) for (key, shape), part in parts}

    def to_list(self) -> list[dict[str, Any]]:
        """Return key and shape of every tensor, in order, for a reader that knows nothing of plans."""
        return [{"key": key, "shape": list(shape)} for key, shape in self.shapes.items()]
