"""Which rank each group has, from the energy that every rank keeps and the size that was asked for."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.cache import in_bytes
from ..bank.task import DTYPES
from ..errors import ConfigError
from ..sharing.groups import Group
from .diagonal import kept_at_least
from .fit import GroupFit


@dataclass(frozen=True)
class Curve:
    """What rank buys in one group."""

    energy: float  # `Σ w² ‖Δ‖²`
    kept: Tensor  # (most,), energy kept at rank `n + 1`
    factor_bytes: int  # of the factors, a unit of rank
    core_bytes: int  # of the cores of all tasks at rank 1
    diagonal: bool = False  # such cores grow with the rank, and not with its square
    module: str = ""  # the first that has the group; groups that meet in one have one rank

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


def one_rank_for_all(curves: Mapping[str, Curve], heads: int) -> list[dict[str, float]]:
    """Return rank, bytes and error of at most 48 banks, each with one rank for all groups."""
    most = max(curve.most for curve in curves.values())
    points = []
    for rank in sorted({round(most ** (n / 47)) for n in range(48)}):
        ranks = {name: min(rank, curve.most) for name, curve in curves.items()}
        size, error = heads + bytes_of(curves, ranks), error_of(curves, ranks)
        points.append({"rank": rank, "bytes": size, "error": error})
    return points


def chosen_ranks(
    curves: Mapping[str, Curve], max_error: float | None = None, max_bytes: int | None = None
) -> dict[str, int]:
    """Return the ranks that reach a relative error with few bytes, or that bytes pay for with little error.

    Every group begins at rank 1; the next unit of rank goes to the group where it keeps most energy a byte. Groups
    that meet in a module, as experts with factors of their own do, go together.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for name, curve in curves.items():
        members[curve.module or name].append(name)
    together = _ranks(
        {key: _sum([curves[name] for name in own]) for key, own in members.items()}, max_error, max_bytes
    )
    return {name: together[curve.module or name] for name, curve in curves.items()}


def _sum(curves: Sequence[Curve]) -> Curve:
    """Return what rank buys in groups that have one rank."""
    if len(curves) == 1:
        return curves[0]
    most, full = max(len(curve.kept) for curve in curves), [curve.kept for curve in curves if len(curve.kept)]
    return Curve(
        sum(curve.energy for curve in curves),
        sum((torch.cat([kept, kept[-1:].expand(most - len(kept))]) for kept in full), torch.zeros(most)),
        sum(curve.factor_bytes for curve in curves),
        sum(curve.core_bytes for curve in curves),
        curves[0].diagonal,
    )


def _ranks(curves: Mapping[str, Curve], max_error: float | None, max_bytes: int | None) -> dict[str, int]:
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


def curves_of(
    groups: Sequence[Group], fits: Mapping[str, GroupFit], tasks: int, dtype: str, core: str
) -> dict[str, Curve]:
    """Return what rank buys in every group, with diagonal cores or free ones."""
    curves, width, is_diagonal = {}, DTYPES[dtype].itemsize, core == "diagonal"
    for group in groups:
        f = fits[group.name]
        kept = kept_at_least(f)[: min(group.shape)] if is_diagonal else f.kept
        cores = width * tasks * len(group.sites)
        module = group.sites[0].module
        curves[group.name] = Curve(f.energy, kept, width * sum(group.shape), cores, is_diagonal, module)
    return curves


def ranks_for(curves: dict[str, Curve], size: tuple[str, float], head_bytes: int) -> dict[str, int]:
    """Return the ranks that a size means, which may be a rank, an error, or bytes with those of heads."""
    name, value = size
    if name == "rank":
        return {group: min(int(value), curve.most) for group, curve in curves.items()}
    if name == "max_error":
        return chosen_ranks(curves, max_error=value)
    least = head_bytes + sum(curve.bytes(1) for curve in curves.values())
    if least > value:
        raise ConfigError(
            f"max_bytes={int(value):,} is less than a bank of rank 1 takes, {least:,} bytes ({head_bytes:,} of them in "
            "heads). Allow more, or share along layers too (modes: task, layer)."
        )
    return chosen_ranks(curves, max_bytes=int(value) - head_bytes)


def checked_size(rank: int | None, max_error: float | None, max_bytes: int | str | None) -> tuple[str, float]:
    """Return which of the three sizes is given, and its value."""
    if isinstance(max_bytes, str):
        number = int(max_bytes) if max_bytes.isdecimal() else in_bytes(max_bytes.strip())
        if number is None:
            raise ConfigError(f"max_bytes={max_bytes!r} is not understood. Use 20000000, or '20MB'.")
        max_bytes = number
    sizes = {"rank": rank, "max_error": max_error, "max_bytes": max_bytes}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given, and each decides the ranks. Give one of them.")
    (name, value), *_ = given.items() or [("rank", 16)]
    if name == "max_error" and not 0 < value < 1:
        raise ConfigError(f"max_error={value} is no relative error. Use a number between 0 and 1.")
    if name != "max_error" and value < 1:
        raise ConfigError(f"{name}={value} leaves nothing. Use a positive number.")
    return name, value
