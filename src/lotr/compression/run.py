"""`lotr.compress`: many LoRAs become one bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank.basis import TASKS
from ..bank.task import DTYPES
from ..errors import ConfigError, Interrupted, near
from ..files.adapter_folder import read_adapter
from ..files.atomic import check_apart, check_free, move_into, whole_folder, write_json
from ..training.settings import read_names
from ..tuner.config import LotrConfig
from .base import bank_config, check_sharing, load_base, weight_shapes, with_ranks
from .clusters import split
from .fit import GroupFit
from .passes import State, run_sweeps
from .ranks import Curve, Ranks, checked_size, chosen_ranks, of_cluster
from .ray import cluster
from .report import PICTURE, REPORT, Report, draw, error_of_fits, report_of
from .scores import measure_adapters, measure_bank
from .sources import find_adapters, open_source
from .stack import Entry, Stack, Tick, read_entry, weights_of
from .tasks import Fitted, write_bank

#: Fits among which the smallest that reaches an error is looked for.
_TRIALS = 7


def compress(
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    base: str | nn.Module | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    max_bytes: int | str | None = None,
    modes: Sequence[str] = ("task",),
    core: str = "free",
    clusters: int | str = 1,
    weights: str | Mapping[str, float] = "relative",
    dtype: str = "bfloat16",
    sweeps: int = 50,
    tolerance: float = 1e-4,
    evaluate: str | Path | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    tick: Tick | None = None,
) -> Report:
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
        modes: Along what factors are shared: `task`, and also `layer`, `projection`, `expert`; experts share along
            `expert` wherever layers share.
        core: `free`, or `diagonal`.
        clusters: Group the adapters by their subspaces into so many clusters, each with factors of its own; or `auto`:
            as many, up to 8, as lose least in the bytes of one basis, or take fewest for the error.
        weights: `relative`: the relative error of every adapter counts alike; `absolute`: updates count as they are; or
            a factor by name, on top of `relative`.
        dtype: Type in which the bank keeps factors and cores.
        sweeps: Most sweeps of HOOI.
        tolerance: A sweep that lowers the error by a smaller share than this is the last.
        evaluate: List of tasks (YAML) whose adapters are measured on their own data, before and after.
        ray: Run the passes of the fit on a Ray cluster: `local`, or its address; workers read the adapters themselves.
        overwrite: Replace a bank that is there.
        tick: Called as work is done.

    Returns:
        The report: errors by task and module, ranks, bytes before and after. It is in the bank too, as `compress.json`.

    Raises:
        ConfigError: A setting has no meaning, or nothing is to be compressed.
        CheckpointError: An adapter is damaged, no low-rank update, or of another base model; nothing is written.
        DataError: Data to measure on does not fit an adapter's task; nothing is written.

    Source: Compress then Serve, https://arxiv.org/abs/2407.00066
    """
    begun, output = time.monotonic(), Path(output)
    adapters = [adapters] if isinstance(adapters, str | Path) else adapters
    modes = (read_names(modes) or ()) if isinstance(modes, str) else modes
    tick = tick or (lambda what, done, of: None)
    size = checked_size(rank, max_error, max_bytes)
    check_sharing(modes, core, weights, clusters)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not a type of a bank's numbers. {near(dtype, DTYPES)}")
    check_free(output, overwrite)
    places = find_adapters(adapters)
    for path in places.values():
        check_apart(output, "adapter", path)
        if overwrite:
            check_apart(output, "basis", read_adapter(path).config.get("basis"))
    with whole_folder(output, overwrite) as folder:  # from the start: nobody else writes it meanwhile
        first = [open_source(path) for path in list(places.values())[:16]]
        name, model, trained_on = load_base(base, first)
        check_apart(output, "base model", name)
        shapes = weight_shapes(model)
        stack, task_types = _read(places, shapes, name, trained_on, weights, tick)
        named = None if isinstance(base, nn.Module) else base
        before = [] if evaluate is None else measure_adapters(evaluate, places, named, tick)
        changed = {module for entry in stack.entries for module in entry.energies}
        adapted = {module: shape for module, shape in shapes.items() if module in changed}
        config = bank_config(model, adapted, modes, core, task_types)
        config.base_model_name_or_path = name
        request = (stack.files(), size, str(clusters), config.to_dict(), weights, dtype, sweeps, tolerance)
        state = State(output, repr(request))
        try:
            with cluster(ray) as spread:
                stack = replace(stack, spread=spread)
                groups = config.recorded_plan().groups
                found = split(stack, groups, core, clusters, size, dtype, state, tick)
                run = partial(_run, found.stacks, config, state, most=sweeps, tolerance=tolerance, tick=tick)
                if core == "diagonal" and max_error is not None:
                    fitted = _smallest(found.fits, found.curves[core], max_error, DTYPES[dtype], run)
                else:
                    fitted = run(found.ranks(core), found.fits)
            lost = write_bank(folder / "bank", config, model, fitted, stack, dtype, tick)
            told: Any = {
                "bank": str(output),
                "base_model": name,
                "trained_on": trained_on,
                "bytes_after": sum(file.stat().st_size for file in (folder / "bank").iterdir()),
                "seconds": round(time.monotonic() - begun, 3),
            }
            scores = measure_bank(before, folder / "bank", named, tick) if before else {}
            report = report_of(stack, fitted, found.curves, core, lost, max_error, dtype, scores, **told)
            move_into(folder / "bank", folder)
            write_json(folder / REPORT, asdict(report))
            draw(report, folder / PICTURE)
            for log in ("-wal", "-shm"):  # of a bank that is replaced
                (output / f"{TASKS}{log}").unlink(missing_ok=True)
            state.clear()  # before the bank is at its place: a finished one would keep the command from coming back
        except KeyboardInterrupt:
            if not state.exists:
                raise
            raise Interrupted(
                f"Stopped. The same command goes on from the last pass; {state.folder} keeps it."
            ) from None
    return report


def _run(
    stacks: Sequence[Stack],
    config: LotrConfig,
    state: State,
    ranks: Mapping[str, Ranks],
    fits: dict[str, GroupFit],
    keep: bool = True,
    **how: Any,
) -> list[Fitted]:
    """Sweep the fits of all clusters, from where they are, at some ranks."""
    fitted: list[Fitted] = []
    for c, stack in enumerate(stacks):
        _, plan = with_ranks(config, of_cluster(ranks, c))
        own = of_cluster(fits, c)
        run_sweeps(plan.groups, own, stack, state.of(stack) if keep else None, **how)
        fitted.append((plan, own))
    return fitted


def _smallest(
    fits: dict[str, GroupFit],
    curves: dict[str, Curve],
    max_error: float,
    dtype: torch.dtype,
    run: Callable[..., list[Fitted]],
) -> list[Fitted]:
    """Return the smallest diagonals that reach an error, rounding included.

    What diagonals of some rank keep is known when they were fitted; the curve tells what they keep at least.
    """
    goal = max(max_error**2 - (torch.finfo(dtype).eps / 2) ** 2, 0.0) ** 0.5

    def fitted(aim: float) -> list[Fitted]:
        trial = {name: replace(of_group) for name, of_group in fits.items()}
        return run(chosen_ranks(curves, max_error=aim), trial, keep=False)

    best, reached, missed = None, goal or max_error, 1.0
    for _ in range(_TRIALS if goal else 0):
        aim = (reached * missed) ** 0.5
        trial = fitted(aim)
        if error_of_fits(trial) <= goal:
            best, reached = trial, aim
        else:
            missed = aim
    return best or fitted(reached)


def _read(
    places: Mapping[str, Path],
    known: Mapping[str, tuple[int, ...]],
    base: str | None,
    trained_on: str | None,
    weights: Any,
    tick: Tick,
) -> tuple[Stack, set[str | None]]:
    """Read every adapter once and check it."""
    entries: list[Entry] = []
    task_types: set[str | None] = set()
    for name, path in places.items():
        entry, source = read_entry(name, path, known, base, trained_on)
        entries.append(entry)
        task_types.add(source.task_type)
        tick("Reading", len(entries), len(places))
    if not any(entry.energy for entry in entries):
        raise ConfigError("No adapter changes anything: all of their updates are zero. Train them first.")
    return Stack(tuple(entries), weights_of(entries, weights)), task_types
