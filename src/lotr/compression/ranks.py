"""Which ranks each group has, from the energy that ranks keep and the size that was asked for."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..bank.cache import in_bytes
from ..bank.task import DTYPES
from ..errors import ConfigError
from ..sharing.blocks import Shape
from ..sharing.groups import Group
from .diagonal import kept_at_least
from .fit import GroupFit

T = TypeVar("T")
Ranks = Shape  # `(k, r)`, of the output factor and of the input factor


@dataclass(frozen=True)
class Curve:
    """What ranks buy in one group."""

    energy: float  # `Σ w² ‖Δ‖²`
    kept: Tensor  # (K, L), energy that the HOSVD keeps at ranks `(k + 1, r + 1)`; (n,) of diagonals, at rank `n + 1`
    factor_bytes: Shape  # of `U` and of `V`, a unit of rank
    core_bytes: int  # of the cores of all tasks at rank 1
    module: str = ""  # the first that has the group; groups that meet in one have one pair of ranks

    @property
    def is_diagonal(self) -> bool:
        """Whether both ranks are one, with which cores grow, and not with its square."""
        return self.kept.dim() == 1

    @property
    def most(self) -> Ranks:
        """The ranks at which nothing more is to be kept."""
        K, L = self.kept.shape[0], self.kept.shape[-1]
        return max(1, K), max(1, L)

    def at(self, ranks: Ranks) -> float:
        """Return the energy kept at some ranks."""
        if not self.kept.numel():
            return 0.0
        k, r = (min(rank, most) - 1 for rank, most in zip(ranks, self.most, strict=True))
        return float(self.kept[k] if self.is_diagonal else self.kept[k, r])

    def bytes(self, ranks: Ranks) -> int:
        """Return the bytes of factors and cores at some ranks."""
        (k, r), (of_U, of_V) = ranks, self.factor_bytes
        return of_U * k + of_V * r + self.core_bytes * (k if self.is_diagonal else k * r)

    def cut(self, ranks: Ranks) -> Ranks:
        """Return ranks that are no larger than they need to be."""
        return min(ranks[0], self.most[0]), min(ranks[1], self.most[1])

    def next(self, ranks: Ranks) -> set[Ranks]:
        """Return larger ranks: of one side or both, by one unit or several."""
        k, r = ranks
        steps = {(k + 1, r + 1), (k + 4, r + 4), (2 * k, 2 * r)}
        if not self.is_diagonal:
            steps |= {pair for up, across in steps for pair in ((up, r), (k, across))}
        return {self.cut(step) for step in steps} - {ranks}


def error_of(curves: Mapping[str, Curve], ranks: Mapping[str, Ranks]) -> float:
    """Return the relative error of all groups together."""
    energy = sum(curve.energy for curve in curves.values())
    kept = sum(curve.at(ranks[name]) for name, curve in curves.items())
    return max(1 - kept / energy, 0.0) ** 0.5 if energy else 0.0


def bytes_of(curves: Mapping[str, Curve], ranks: Mapping[str, Ranks]) -> int:
    """Return the bytes of all groups together."""
    return sum(curve.bytes(ranks[name]) for name, curve in curves.items())


def one_rank_for_all(curves: Mapping[str, Curve], heads: int) -> list[dict[str, float]]:
    """Return rank, bytes and error of at most 48 banks, each with one rank for all groups."""
    most = max(max(curve.most) for curve in curves.values())
    points = []
    for rank in sorted({round(most ** (n / 47)) for n in range(48)}):
        ranks = {name: curve.cut((rank, rank)) for name, curve in curves.items()}
        size, error = heads + bytes_of(curves, ranks), error_of(curves, ranks)
        points.append({"rank": rank, "bytes": size, "error": error})
    return points


def chosen_ranks(
    curves: Mapping[str, Curve], max_error: float | None = None, max_bytes: int | None = None
) -> dict[str, Ranks]:
    """Return the ranks that reach a relative error with few bytes, or that bytes pay for with little error.

    Every group begins at rank 1; the next units of rank go to the group and side where they keep most energy a byte.
    Groups that meet in a module, as experts with factors of their own do, go together.
    """
    members: dict[str, list[Curve]] = defaultdict(list)
    for name, curve in curves.items():
        members[curve.module or name].append(curve)
    together = _ranks({module: _sum(own) for module, own in members.items()}, max_error, max_bytes)
    return {name: together[curve.module or name] for name, curve in curves.items()}


def _sum(curves: Sequence[Curve]) -> Curve:
    """Return what ranks buy in groups that have one pair of them."""
    if len(curves) == 1:
        return curves[0]
    full = [curve.kept for curve in curves if curve.kept.numel()] or [curves[0].kept]
    shape = [max(sizes) for sizes in zip(*(kept.shape for kept in full), strict=True)]
    kept = torch.zeros(shape).double()
    for own in full:  # beyond its end a table goes on as it ends
        for side, size in enumerate(shape):
            own = own.index_select(side, torch.arange(size).clamp_max(own.shape[side] - 1))
        kept += own
    of_U, of_V = (sum(curve.factor_bytes[side] for curve in curves) for side in (0, 1))
    return Curve(
        sum(curve.energy for curve in curves), kept, (of_U, of_V), sum(curve.core_bytes for curve in curves)
    )


def _ranks(curves: Mapping[str, Curve], max_error: float | None, max_bytes: int | None) -> dict[str, Ranks]:
    ranks = dict.fromkeys(curves, (1, 1))
    total = sum(curve.energy for curve in curves.values())
    left, size = total - sum(curve.at((1, 1)) for curve in curves.values()), bytes_of(curves, ranks)
    goal = 0.0 if max_error is None else max_error * max_error * total
    most = math.inf if max_bytes is None else max_bytes
    queue: list[tuple[float, str, Ranks, int, float]] = []
    for name in curves:
        _offer(queue, name, curves[name], (1, 1), most - size)
    while queue and left > goal:
        _, name, pair, cost, gain = heapq.heappop(queue)
        if size + cost <= most:
            ranks[name], size, left = pair, size + cost, left - gain
        _offer(
            queue, name, curves[name], ranks[name], most - size
        )  # a smaller step, where this was too large
    return ranks


def _offer(queue: list[Any], name: str, curve: Curve, ranks: Ranks, room: float) -> None:
    """Queue the best next step of a group, of those that fit: the one that keeps most energy a byte."""
    steps = []
    for after in curve.next(ranks):
        cost, gain = curve.bytes(after) - curve.bytes(ranks), curve.at(after) - curve.at(ranks)
        if cost <= room:
            steps.append((-gain / cost, name, after, cost, gain))
    if steps:
        heapq.heappush(queue, min(steps))


def curves_of(
    groups: Sequence[Group],
    fits: Mapping[str, GroupFit],
    tasks: int,
    dtype: str,
    core: str,
    cluster: int = 0,
    clusters: int = 1,
) -> dict[str, Curve]:
    """Return what ranks buy in every group of a cluster of tasks, with diagonal cores or free ones.

    All clusters together have no more directions than a block has.
    """
    curves, width = {}, DTYPES[dtype].itemsize
    for group in groups:
        f, (o, i) = fits[group.name], group.shape
        most = max(1, o // clusters), max(1, i // clusters)
        kept = kept_at_least(f)[: min(most)] if core == "diagonal" else f.kept[: most[0], : most[1]]
        cores = width * tasks * len(group.sites)
        module = key_of(cluster, group.sites[0].module)
        curves[key_of(cluster, group.name)] = Curve(f.energy, kept, (width * o, width * i), cores, module)
    return curves


def key_of(cluster: int, name: str) -> str:
    """Return what a group or module of a cluster is called beside those of others."""
    return f"{cluster}/{name}"


def of_cluster(values: Mapping[str, T], cluster: int) -> dict[str, T]:
    """Return what is called by a cluster, under the names of its groups."""
    own = key_of(cluster, "")
    return {key.removeprefix(own): value for key, value in values.items() if key.startswith(own)}


def ranks_for(curves: dict[str, Curve], size: tuple[str, float], head_bytes: int) -> dict[str, Ranks]:
    """Return the ranks that a size means, which may be a rank, an error, or bytes with those of heads."""
    name, value = size
    if name == "rank":
        return {group: curve.cut((int(value), int(value))) for group, curve in curves.items()}
    if name == "max_error":
        return chosen_ranks(curves, max_error=value)
    least = head_bytes + bytes_of(curves, dict.fromkeys(curves, (1, 1)))
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
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}={value!r} is not a number.")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given, and each decides the ranks. Give one of them.")
    (name, value), *_ = given.items() or [("rank", 16)]
    if name == "max_error" and not 0 < value < 1:
        raise ConfigError(f"max_error={value} is no relative error. Use a number between 0 and 1.")
    if name != "max_error" and value < 1:
        raise ConfigError(f"{name}={value} leaves nothing. Use a positive number.")
    return name, value
