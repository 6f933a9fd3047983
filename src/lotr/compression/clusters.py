"""Adapters grouped by their subspaces: each goes where the factors of the others keep most of it.

Lloyd's iterations, with a basis of a few directions a group in the place of a mean. They run on a sample of the
adapters, whose first clusters begin at single adapters far from each other; then every adapter chooses.

Source: k-plane clustering (Bradley & Mangasarian, 2000); clusters of LoRAs in Compress then Serve (arXiv 2407.00066).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..sharing.groups import Group
from .base import CORES
from .fit import WIDEST, Batch, GroupFit, Sums, moments_of
from .passes import State, chunks, find_directions
from .ranks import (
    Curve,
    Ranks,
    bytes_of,
    chosen_ranks,
    curves_of,
    error_of,
    key_of,
    of_cluster,
    ranks_for,
)
from .stack import Stack, Tick

#: `U` `(o, k)` and `V` `(i, r)` by group.
Basis = Mapping[str, tuple[Tensor, Tensor]]
MOST = 8  # clusters that `auto` tries
_SAMPLE = 256  # adapters among which the clusters are found
_SWEEPS = 20  # of Lloyd's iterations, at most


@dataclass(frozen=True)
class Split:
    """Adapters in clusters, and the HOSVD of each; fits and curves are called by cluster and group."""

    stacks: list[Stack]
    fits: dict[str, GroupFit]
    curves: dict[str, dict[str, Curve]]  # by core
    size: tuple[str, float]  # that decides the ranks

    def ranks(self, core: str) -> dict[str, Ranks]:
        """Return the ranks of all groups."""
        return ranks_for(self.curves[core], self.size, sum(stack.head_bytes for stack in self.stacks))


def split(
    stack: Stack,
    groups: Sequence[Group],
    core: str,
    clusters: int | str,
    size: tuple[str, float],
    dtype: str,
    state: State,
    tick: Tick,
) -> Split:
    """Return the adapters in as many clusters as are asked for, or as pay."""

    def fitted(stacks: list[Stack]) -> Split:
        fits, curves = dict[str, GroupFit](), {kind: dict[str, Curve]() for kind in CORES}
        for c, own in enumerate(stacks):
            found = find_directions(groups, own, state.of(own), tick)
            fits |= {key_of(c, name): of_group for name, of_group in found.items()}
            for kind in CORES:
                curves[kind] |= curves_of(groups, found, len(own), dtype, kind, c, len(stacks))
        return Split(stacks, fits, curves, size)

    whole = fitted([stack])
    if str(clusters) == "1":
        return whole
    ranks = whole.ranks(core)
    of_all = of_cluster(ranks, 0)

    def in_clusters(count: int) -> list[Stack]:
        by = 1 if size[0] == "rank" and clusters != "auto" else count  # what one basis needs is shared out
        few = {name: (max(1, k // by), max(1, r // by)) for name, (k, r) in of_all.items()}
        return _grouped(stack, groups, few, count, tick)

    if clusters != "auto":
        return fitted(in_clusters(int(clusters)))
    room = bytes_of(whole.curves[core], ranks)

    def cost(split: Split) -> float:
        """Return the bytes that the error takes, or the error that the bytes of one basis leave."""
        curves, (name, value) = split.curves[core], size
        by = {"max_error": value} if name == "max_error" else {"max_bytes": room}
        chosen = chosen_ranks(curves, **by)
        if bytes_of(curves, chosen) > room or (name == "max_error" and error_of(curves, chosen) > value):
            return math.inf
        return bytes_of(curves, chosen) if name == "max_error" else error_of(curves, chosen)

    best, tried = whole, 1
    while tried < min(len(best.stacks) + 2, MOST, len(stack) // 2):  # two more than there are
        tried += 1
        trial = fitted(in_clusters(tried))
        if cost(trial) < cost(best):
            best = trial if size[0] != "rank" else replace(trial, size=("max_bytes", room + stack.head_bytes))
    return best


def _grouped(
    stack: Stack, groups: Sequence[Group], ranks: Mapping[str, Ranks], count: int, tick: Tick
) -> list[Stack]:
    """Split adapters into at most `count` clusters; the factors that attract them have some ranks."""
    trained = [n for n, entry in enumerate(stack.entries) if entry.energy]
    sample = stack.part(trained[:: max(1, len(trained) // _SAMPLE)])
    kept = partial(_kept, groups=groups, tick=tick)
    basis_of = partial(_basis, groups=groups, ranks=ranks, tick=tick)
    first = int(kept(sample, [basis_of(sample)])[:, 0].argmax())  # the most usual one
    bases = [basis_of(sample.part([first]))]
    shares = kept(sample, bases)
    while len(bases) < min(count, len(sample)):
        bases.append(basis_of(sample.part([int(shares.amax(1).argmin())])))
        shares = torch.cat([shares, kept(sample, bases[-1:])], 1)
    own = shares.argmax(1)
    for _ in range(_SWEEPS):
        bases = [basis_of(sample.part((own == c).nonzero()[:, 0].tolist())) for c in own.unique().tolist()]
        before, own = own, kept(sample, bases).argmax(1)
        if own.equal(before):
            break
    if len(sample) < len(stack):
        own = kept(stack, bases).argmax(1)
    return [stack.part((own == c).nonzero()[:, 0].tolist()) for c in own.unique().tolist()]


def _basis(stack: Stack, groups: Sequence[Group], ranks: Mapping[str, Ranks], tick: Tick) -> Basis:
    """Return the leading directions of some adapters."""
    basis = {}
    for chunk in chunks(groups):
        total = stack.total(chunk, "Clusters", tick)
        shapes = {group.name: group.shape for group in chunk}
        for name, moments in total(partial(moments_of, shapes, WIDEST)).items():
            basis[name] = tuple(
                moment.leading(rank)[0] for moment, rank in zip(moments[:2], ranks[name], strict=True)
            )
    return basis


def _kept(
    stack: Stack, bases: Sequence[Basis], groups: Sequence[Group], tick: Tick
) -> Tensor:  # (n, clusters)
    """Return the share that each basis keeps of the energy of each adapter; of one that is zero, all."""
    kept = torch.zeros(len(stack), len(bases), dtype=torch.float64)
    for chunk in chunks(groups):
        total = stack.total(chunk, "Clusters", tick)
        kept += torch.stack(total(partial(_energies, bases, [group.name for group in chunk]))["kept"][0])
    whole = [w * w * entry.energy for w, entry in zip(stack.weights, stack.entries, strict=True)]
    return (kept / torch.tensor(whole, dtype=torch.float64)[:, None]).nan_to_num(nan=1.0)


def _energies(bases: Sequence[Basis], names: Sequence[str], batches: Iterable[Batch]) -> Sums:
    """Return `Σ ‖Uᵀ B A V‖²` of every adapter and basis, in the order of the adapters."""
    rows: list[Any] = []
    for batch in batches:
        of_bases = []
        for basis in bases:
            sites = ((site, *basis[name]) for name in names for site in batch[name])
            energies = [(U.T @ B @ (A @ V)).square().sum((1, 2)) for (B, A), U, V in sites]
            of_bases.append(torch.stack(energies).sum(0))
        rows += torch.stack(of_bases, 1).unbind()
    return {"kept": [rows]}
