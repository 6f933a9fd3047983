"""`lotr.compress`: many LoRAs become one bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import CoreBank, Task
from ..bank.cache import tasks_in
from ..bank.task import DTYPES, check_dtype
from ..errors import ConfigError
from ..files.adapter_folder import CONFIG, fingerprint, save_tensors, write_task
from ..files.atomic import check_apart, check_free, whole_folder, write_json
from ..math.update import side_by_side
from ..sharing.keys import core_key, group_keys
from ..sharing.plan import Group, Plan
from ..tuner.config import LotrConfig
from .base import bank_config, base_of, linear_shapes, load_base, with_ranks
from .fit import GroupFit, directions, is_settled, project, sweep
from .ranks import Curve, chosen_ranks
from .report import Outcome, report_of
from .sources import Source, find_adapters, open_source
from .stack import Entry, Stack, read_entry, weights_of

#: What is going on, how much of it is done, and how much there is.
Tick = Callable[[str, int, int], None]
_MEMORY = 1 << 30  # bytes of the sums of the groups that are fitted at once
#: What of an adapter's `task.json` the bank, or a task's own fields, know already.
_KNOWN = {"task", "labels", "base_model", "base_fingerprint", "weights_sha256"}


def compress(
    adapters: Sequence[str | Path],
    output: str | Path,
    base: str | nn.Module | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    max_bytes: int | str | None = None,
    modes: Sequence[str] = ("task",),
    core: str = "free",
    weights: str | Mapping[str, float] = "relative",
    dtype: str = "bfloat16",
    sweeps: int = 20,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Fit one bank to many adapters: shared factors, and a core a task and site, `Δ_{t,s} ≈ U C_{t,s} Vᵀ`.

    Args:
        adapters: Folders of PEFT LoRAs or of adapters of this library (also with other factors), globs, text files
            with a path a line, or hub ids; of any ranks, all trained on one base model.
        output: Folder of the new bank.
        base: The base model, or its name; default: the one that the adapters tell.
        rank: Rank of every group; where none of the three sizes is given, 16.
        max_error: Instead: the relative error to reach, in (0, 1); each group has the rank that this takes.
        max_bytes: Instead: most bytes of factors, cores and heads, a number or such as `"20MB"`; each group has the
            rank that this pays for.
        modes: Along what factors are shared: `task`, and also `layer`, `projection`.
        core: `free`, or `diagonal`.
        weights: `relative`: the relative error of every adapter counts alike; `absolute`: updates count as they are; or
            a factor by name, on top of `relative`.
        dtype: Type in which the bank keeps cores.
        sweeps: Most sweeps of HOOI.
        tolerance: A sweep that lowers the error by a smaller share than this is the last.
        overwrite: Replace a bank that is there.
        tick: Called as work is done.

    Returns:
        The report: errors by task and module, ranks, bytes before and after. It is in the bank too, as `compress.json`.

    Raises:
        ConfigError: A setting has no meaning, or nothing is to be compressed.
        CheckpointError: An adapter is damaged, no low-rank update, or of another base model; nothing is written.

    Source: Compress then Serve, https://arxiv.org/abs/2407.00066
    """
    begun, output = time.monotonic(), Path(output)
    tick = tick or (lambda what, done, of: None)
    size = _checked_size(rank, max_error, max_bytes)
    check_dtype(dtype)
    check_free(output, overwrite)
    places = find_adapters(adapters)
    for path in places.values():
        check_apart(output, "adapter", path)
    told, first = base_of(places)
    if base is None and told is None:
        raise ConfigError("No adapter tells its base model. Name it with --base.")
    name, model = (
        (str(told), base) if isinstance(base, nn.Module) else load_base(str(base or told), first.kind)
    )
    stack, task_types = _read(places, model, name, weights, tick)
    order = linear_shapes(model)
    modules = [module for module in order if any(module in entry.energies for entry in stack.entries)]
    config = bank_config(model, modules, modes, core, task_types)
    config.base_model_name_or_path = name
    fits = _directions(config.recorded_plan().groups, stack, tick)
    curves = {
        group.name: Curve(
            fits[group.name].energy,
            fits[group.name].kept,
            4 * sum(group.shape),
            len(stack) * len(group.sites) * DTYPES[dtype].itemsize,
        )
        for group in config.recorded_plan().groups
    }
    ranks = _ranks(curves, size, sum(entry.head_bytes for entry in stack.entries))
    config, plan = with_ranks(config, ranks)
    _fit(plan.groups, fits, stack, sweeps, tolerance, tick)
    factors = {group.name: fits[group.name].factors(max(group.rank)) for group in plan.groups}
    outcome = Outcome(stack, plan, curves, fits, dtype)
    with whole_folder(output, overwrite) as folder:
        _write(folder / "bank", config, plan, factors, model, outcome, tick)
        report = report_of(outcome, output, folder / "bank", time.monotonic() - begun)
        for file in (folder / "bank").iterdir():
            file.replace(folder / file.name)
        (folder / "bank").rmdir()
    return report


def _checked_size(
    rank: int | None, max_error: float | None, max_bytes: int | str | None
) -> tuple[str, float]:
    """Return which of the three sizes is given, and its value."""
    sizes = {"rank": rank, "max_error": max_error, "max_bytes": _in_bytes(max_bytes)}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given, and each decides the ranks. Give one of them.")
    (name, value), *_ = given.items() or [("rank", 16)]
    if name == "max_error" and not 0 < value < 1:
        raise ConfigError(f"max_error={value} is no relative error. Use a number between 0 and 1.")
    if name != "max_error" and value < 1:
        raise ConfigError(f"{name}={value} leaves nothing. Use a positive number.")
    return name, value


def _in_bytes(size: int | str | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    try:
        return int(size) if size.isdigit() else tasks_in(size, 1)
    except ConfigError:
        raise ConfigError(f"max_bytes={size!r} is not understood. Use 20000000, or '20MB'.") from None


def _read(
    places: Mapping[str, Path], model: nn.Module, base: str, weights: Any, tick: Tick
) -> tuple[Stack, set[str | None]]:
    """Read every adapter once and check it."""
    known = linear_shapes(model)
    entries: list[Entry] = []
    task_types: set[str | None] = set()
    for name, path in places.items():
        entry, source = read_entry(name, path, known, base)
        entries.append(entry)
        task_types.add(source.task_type)
        tick("Reading", len(entries), len(places))
    if not any(entry.energy for entry in entries):
        raise ConfigError("No adapter changes anything: all of their updates are zero. Train them first.")
    return Stack(tuple(entries), weights_of(entries, weights)), task_types


def _chunks(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Yield groups, as many at once as fit in memory."""
    chunk: list[Group] = []
    used = 0
    for group in groups:
        need = sum(8 * width * min(width, 2048) for width in group.shape)
        if chunk and used + need > _MEMORY:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += need
    yield chunk


def _directions(groups: Sequence[Group], stack: Stack, tick: Tick) -> dict[str, GroupFit]:
    fits: dict[str, GroupFit] = {}
    for chunk in _chunks(groups):
        batches = stack.batches(chunk, True, lambda done, of: tick("Directions", done, of))
        fits |= directions({group.name: group.shape for group in chunk}, batches)
    return fits


def _ranks(curves: dict[str, Curve], size: tuple[str, float], head_bytes: int) -> dict[str, int]:
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


def _fit(
    groups: Sequence[Group],
    fits: dict[str, GroupFit],
    stack: Stack,
    sweeps: int,
    tolerance: float,
    tick: Tick,
) -> None:
    for group in groups:
        fits[group.name].begin(max(group.rank))
    for chunk in _chunks(groups):
        batches = stack.batches(chunk, True, lambda done, of: tick("Fitting", done, of))
        for _ in range(sweeps):
            open_ones = {g.name: fits[g.name] for g in chunk if not is_settled(fits[g.name], tolerance)}
            if not open_ones:
                break
            sweep(open_ones, batches)


def _write(
    path: Path,
    config: LotrConfig,
    plan: Plan,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    model: nn.Module,
    outcome: Outcome,
    tick: Tick,
) -> None:
    """Write the bank: a basis of the factors, and a task an adapter."""
    basis = path.with_name("basis")
    basis.mkdir()
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        U, V = factors[group.name]
        keys = group_keys(group)
        tensors |= {keys["U"]: U.float().contiguous(), keys["V"]: V.T.float().contiguous()}
    save_tensors(tensors, basis)
    write_json(basis / CONFIG, config.to_dict())
    print_ = fingerprint(model, [target.path for target in plan.targets])
    write_task(basis, {"base_model": config.base_model_name_or_path, "base_fingerprint": print_})
    with CoreBank.create(path, basis, dtype=outcome.dtype) as bank:
        bank.add_many(_tasks(bank, plan, tensors, outcome, tick))
    for file in basis.iterdir():
        file.unlink()
    basis.rmdir()


def _tasks(
    bank: CoreBank, plan: Plan, tensors: Mapping[str, Tensor], outcome: Outcome, tick: Tick
) -> Iterator[Task]:
    """Yield every adapter as a task, and note what its projection lost."""
    stack = outcome.stack
    batches = stack.batches(plan.groups, False, lambda done, of: tick("Cores", done, of))
    at = 0
    for batch in batches():
        cores, lost = projected(plan, tensors, batch)
        n = len(next(iter(cores.values())))
        for t, entry in enumerate(stack.entries[at : at + n]):
            own = bank.layout.flatten({key: core[t] for key, core in cores.items()})
            rounded = own.to(DTYPES[bank.dtype]).double()
            outcome.add(
                entry,
                {module: float(loss[t]) for module, loss in lost.items()},
                float((rounded - own.double()).square().sum()),
            )
            yield task_of(open_source(entry.name, entry.path), own, outcome.error(entry.name))
        at += n


def projected(
    plan: Plan, tensors: Mapping[str, Tensor], batch: Mapping[str, list[tuple[Tensor, Tensor]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the cores of some tasks by their keys in an adapter's file, and what each module loses, `(n,)`.

    Args:
        plan: The plan of the bank.
        tensors: Orthonormal factors by key.
        batch: Updates of the tasks at every site of every group.
    """
    by_site: dict[Any, Tensor] = {}
    lost: dict[str, Tensor] = {}
    for group in plan.groups:
        keys = group_keys(group)
        U, V = tensors[keys["U"]].double(), tensors[keys["V"]].T.double()
        for site, (B, A) in zip(group.sites, batch[group.name], strict=True):
            by_site[site], left = project(B, A, U, V)
            lost[site.module] = lost.get(site.module, torch.zeros(())) + left
    cores = {
        core_key(part): torch.stack(
            [side_by_side(C, part.grid) for C in torch.stack([by_site[site] for site in part.sites], 1)]
        ).float()
        for parts in plan.parts.values()
        for part in parts
    }
    return cores, lost


def task_of(source: Source, numbers: Tensor, error: float) -> Task:
    """Return an adapter as a task, with its head and what its folder tells."""
    head = source.head()
    labels = tuple(source.record.get("labels", ()))
    kind = source.kind
    if head and not labels and kind == "classification":
        n = min(tensor.shape[0] for tensor in head.values() if tensor.dim())
        labels = tuple(f"LABEL_{label}" for label in range(n)) if n > 1 else ()
        kind = "classification" if n > 1 else "regression"
    recorded = {key: value for key, value in source.record.items() if key not in _KNOWN}
    metadata = {**recorded, "compressed_from": str(source.path), "error": round(error, 9)}
    return Task(source.name, numbers, head, labels, kind, metadata)
