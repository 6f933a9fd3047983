"""Batches whose rows have cores of their own on the same shared factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..math import update as delta
from ..math.update import LinearMap
from ..sharing.keys import core_key, group_keys
from ..sharing.plan import Part


@dataclass(frozen=True)
class Rows:
    """The numbers of the cores that each row of a batch uses.

    Args:
        numbers: Name in an adapter's file → numbers of every row, shape `(rows, *shape)`.
    """

    numbers: Mapping[str, Tensor]

    def core(self, part: Part) -> LinearMap:  # (m·rows, *n, b·r) -> (m·rows, *n, a·k)
        """Return the map that multiplies each row of a batch by its own cores of a part."""
        C = self._cores(part)  # (rows, a·k, b·r)
        return lambda h: by_row(h, C.to(h.device))

    def _cores(self, part: Part) -> Tensor:
        core = part.group.core
        if core.by_site:
            return self.numbers[core_key(part)]
        keys = group_keys(part.group)
        own = {name: self.numbers[keys[name]] for name in core.shapes}
        build = torch.vmap(lambda one: delta.side_by_side(core.block(one, part.region), part.grid))
        cores: Tensor = build(own)
        return cores


def by_row(
    h: Tensor,  # (m·rows, *n, q)
    C: Tensor,  # (rows, p, q)
) -> Tensor:  # (m·rows, *n, p)
    """Multiply each row of a batch by its own matrix, in one batched product.

    A batch may have every row several times in a run: beams of a search, or tokens laid out row after row.

    Raises:
        ConfigError: The batch is no multiple of the rows.

    Example:
        >>> by_row(torch.randn(6, 5, 3), torch.randn(2, 4, 3)).shape
        torch.Size([6, 5, 4])
    """
    rows = len(C)
    if h.shape[0] % rows:
        raise ConfigError(
            f"Every row of a batch needs a task: tasks are selected for {rows} rows, and the batch has {h.shape[0]}. "
            "Name one task a row, None for the base model."
        )
    return torch.bmm(h.reshape(rows, -1, h.shape[-1]), C.mT).reshape(*h.shape[:-1], C.shape[1])
