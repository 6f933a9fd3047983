"""Adapters become tasks of a bank: the cores that fit their updates best on its factors, and what those lose."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bank import CoreBank, Task
from ..bank.basis import create_folder
from ..bank.heads import NAMES
from ..bank.layout import Layout
from ..bank.task import DTYPES, kind_and_labels
from ..bank.transfer import KNOWN
from ..files.adapter_folder import save_tensors, write_config, write_task
from ..files.fingerprint import fingerprint
from ..math.update import side_by_side
from ..sharing.blocks import Site
from ..sharing.groups import Group
from ..sharing.keys import core_key, group_keys
from ..sharing.plan import Plan
from ..tuner.config import LotrConfig
from .base import with_ranks
from .diagonal import diagonals
from .fit import Batch, GroupFit, project
from .sources import open_source
from .stack import Entry, Stack, Tick

#: Plan and fits of a cluster.
Fitted = tuple[Plan, Mapping[str, GroupFit]]


class Lost(NamedTuple):
    """What a task loses."""

    modules: dict[str, float]  # `‖Δ − U C Vᵀ‖²` of each
    cluster: int  # on whose factors it is


def write_bank(
    path: Path,
    config: LotrConfig,
    model: nn.Module,
    clusters: Sequence[Fitted],
    stack: Stack,
    dtype: str,
    tick: Tick,
) -> dict[str, Lost]:
    """Write a bank: a basis of the factors, and a task an adapter; return what every task loses."""
    ranks = [{group.name: group.rank for group in plan.groups} for plan, _ in clusters]
    config, plan = with_ranks(config, {name: _sum(own[name] for own in ranks) for name in ranks[0]})
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        own = [
            fits[group.name].factors(of[group.name]) for of, (_, fits) in zip(ranks, clusters, strict=True)
        ]
        U, V = (torch.cat(side, 1).to(DTYPES[dtype]) for side in zip(*own, strict=True))
        keys = group_keys(group)
        tensors |= {keys["U"]: U.contiguous(), keys["V"]: V.T.contiguous()}
    with tempfile.TemporaryDirectory(dir=path.parent) as basis:
        save_tensors(tensors, Path(basis))
        write_config(Path(basis), config.to_dict())
        sample = fingerprint(model, NAMES)
        write_task(Path(basis), {"base_model": config.base_model_name_or_path, "base_fingerprint": sample})
        create_folder(path, basis, dtype, ranks if len(ranks) > 1 else ())
    with CoreBank.open(path, writable=True) as bank:
        return add_tasks(bank, stack, tick)


def _sum(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    k, r = (sum(side) for side in zip(*ranks, strict=True))
    return k, r


def add_tasks(bank: CoreBank, stack: Stack, tick: Tick, replaces: bool = False) -> dict[str, Lost]:
    """Add every adapter as a task of the cluster that keeps most of it, all or none; return what each loses."""
    lost: dict[str, Lost] = {}
    basis, dtype = bank.basis, DTYPES[bank.dtype]
    factors = basis.factors()
    projections = [
        Projection(cluster.plan, cluster.factors(factors), basis.config.scaling, dtype)
        for cluster in basis.clusters or [basis.whole]
    ]

    def tasks() -> Iterator[Task]:
        entries = iter(stack.entries)
        plain = replace(stack, weights=(1.0,) * len(stack))
        for batch in plain.batches(bank.plan.groups, "Cores", tick)():
            done = [projection(batch) for projection in projections]
            nearest = torch.stack(
                [torch.stack([*of_modules.values()]).sum(0) for _, of_modules in done]
            ).argmin(0)
            for t, c in enumerate(nearest.tolist()):
                entry, (numbers, of_modules) = next(entries), done[c]
                own = projections[c].layout.flatten({key: tensor[t] for key, tensor in numbers.items()})
                modules = {module: float(of_tasks[t]) for module, of_tasks in of_modules.items()}
                lost[entry.name] = Lost(modules, c)
                numbers_of_bank = bank.layout.fill(c if basis.clusters else None, own)
                yield _task_of(entry, numbers_of_bank, entry.error(modules))

    bank.add_many(tasks(), replace=replaces)
    return lost


def _task_of(entry: Entry, numbers: Tensor, error: float) -> Task:
    """Return an adapter as a task, with its head and what its folder tells."""
    source = open_source(entry.path)
    record, head = source.folder.task, source.head()
    kind, labels = kind_and_labels(record, head, source.task_type)
    recorded = {key: value for key, value in record.items() if key not in KNOWN}
    metadata = {**recorded, "compressed_from": str(entry.path), "error": round(error, 9)}
    return Task(entry.name, numbers, head, labels, kind, metadata)


class Projection:
    """The factors of a bank, orthonormal or not, on which updates become cores, which are kept in a type.

    These are free, or one diagonal a site.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], scaling: float, dtype: torch.dtype) -> None:
        self.plan, self.layout, self.scaling, self.dtype = plan, Layout.of(plan), scaling, dtype
        self.bases: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in plan.groups:
            keys = group_keys(group)
            factors = tensors[keys["U"]].double(), tensors[keys["V"]].double().T
            self.bases[group.name] = [tuple(torch.linalg.qr(factor)) for factor in factors]

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the numbers of some tasks by key, in float32, and what each module loses, `(n,)`.

        What is lost is `‖Δ − σ U C Vᵀ‖²`, rounding included.
        """
        numbers: dict[str, Tensor] = {}
        lost: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        by_site: dict[Site, Tensor] = {}
        for group in self.plan.groups:
            for site, (B, A) in zip(group.sites, batch[group.name], strict=True):
                by_site[site], of_site = self._site(group, B, A)
                lost[site.module] = lost[site.module] + of_site
            if not group.core.by_site:  # one diagonal, or one a position along the only mode
                own = [by_site[site] for site in sorted(group.sites, key=group.index.__getitem__)]
                name = next(iter(group.core.shapes))
                numbers[group_keys(group)[name]] = torch.stack(own, 1) if group.core.sizes else own[0]
        for part in (part for parts in self.plan.parts.values() for part in parts):
            if part.group.core.by_site:
                cores = torch.stack([by_site[site] for site in part.sites], 1)
                numbers[core_key(part)] = torch.stack([side_by_side(C, part.grid) for C in cores])
        return {key: tensor.float() for key, tensor in numbers.items()}, dict(lost)

    def _site(self, group: Group, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best numbers of one site, rounded, and what they lose."""
        (Q_U, R_U), (Q_V, R_V) = self.bases[group.name]
        inside, beside = project(B, A, Q_U, Q_V)
        if group.core.by_site:
            own = torch.linalg.pinv(R_U) @ inside @ torch.linalg.pinv(R_V).T / self.scaling
        else:
            own = diagonals(Q_U @ R_U, Q_V @ R_V, B, A) / self.scaling
        own = own.to(self.dtype).double()
        cores = own if group.core.by_site else torch.diag_embed(own)
        return own, beside + (inside - self.scaling * R_U @ cores @ R_V.T).square().sum((1, 2))
