"""Which rank each group has, from the energy that every rank keeps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """What rank buys in one group.

    Args:
        energy: `Σ w² ‖Δ‖²`.
        kept: Energy kept at rank `n + 1`, shape `(most,)`.
        factor_bytes: Bytes of the factors, a unit of rank.
        core_bytes: Bytes of the cores of all tasks at rank 1.
        diagonal: Whether cores are diagonal: they grow with the rank, and not with its square.
    """

    energy: float
    kept: Tensor
    factor_bytes: int
    core_bytes: int
    diagonal: bool = False

    @property
    def most(self) -> int:
        """The rank at which nothing more is to be kept."""
        return max(1, len(self.kept))

    def at(self, rank: int) -> float:
        """Return the energy kept at a rank."""
        return float(self.kept[min(rank, len(self.kept)) - 1]) if len(self.kept) and rank else 0.0

    def bytes(self, rank: int) -> int:
        """Return the bytes of factors and cores at a rank."""
        return self.factor_bytes * rank + self.core_bytes * (rank if self.diagonal else rank * rank)


def error_of(curves: Mapping[str, Curve], ranks: Mapping[str, int]) -> float:
    """Return the relative error of all groups together."""
    energy = sum(curve.energy for curve in curves.values())
    kept = sum(curve.at(ranks[name]) for name, curve in curves.items())
    return max(1 - kept / energy, 0.0) ** 0.5 if energy else 0.0


def bytes_of(curves: Mapping[str, Curve], ranks: Mapping[str, int]) -> int:
    """Return the bytes of all groups together."""
    return sum(curve.bytes(ranks[name]) for name, curve in curves.items())


def chosen_ranks(
    curves: Mapping[str, Curve],
    max_error: float | None = None,
    max_bytes: int | None = None,
) -> dict[str, int]:
    """Return the ranks that reach an error with few bytes, or that a number of bytes pays for with little error.

    Every group begins at rank 1; the next unit of rank goes to the group where it keeps most energy a byte.

    Args:
        curves: By group.
        max_error: Relative error to reach.
        max_bytes: Bytes not to exceed.
    """
    ranks = dict.fromkeys(curves, 1)
    total = sum(curve.energy for curve in curves.values())
    left, size = total - sum(curve.at(1) for curve in curves.values()), bytes_of(curves, ranks)
    queue = [_offer(name, curve, 1) for name, curve in curves.items() if curve.most > 1]
    heapq.heapify(queue)
    goal = 0.0 if max_error is None else max_error * max_error * total
    while queue and left > goal:
        _, name, rank, cost, gain = heapq.heappop(queue)
        if max_bytes is not None and size + cost > max_bytes:
            continue  # another group may have a step that still fits
        ranks[name], size, left = rank, size + cost, left - gain
        if rank < curves[name].most:
            heapq.heappush(queue, _offer(name, curves[name], rank))
    return ranks


def _offer(name: str, curve: Curve, rank: int) -> tuple[float, str, int, int, float]:
    """Return the best next step of a group: of one unit of rank or several, the one that keeps most energy a byte."""
    steps = []
    for after in {rank + 1, min(rank + 4, curve.most), min(2 * rank, curve.most)} - {rank}:
        cost, gain = curve.bytes(after) - curve.bytes(rank), curve.at(after) - curve.at(rank)
        steps.append((-gain / cost, name, after, cost, gain))
    return min(steps)
