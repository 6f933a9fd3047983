"""Many tasks trained at once into a bank: settings in, tasks with their scores out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...bank import CoreBank, Task
from ...errors import ConfigError
from ...files.atomic import locked, remove_folder, write_json
from ..base_model import load_tokenizer, locate, skeleton, text_length
from ..checkpoint import last_whole
from ..data import TaskData
from ..output import SETTINGS, versions
from .begin import RUN, base_of_basis, check, check_new, new_bank, open_bank, settings_to_resume
from .served import Served, base_of, load_served
from .settings import BankSettings
from .task_list import TaskSource, prepare
from .trainer import TASKS, TaskTrainer

if TYPE_CHECKING:
    from transformers import TrainerCallback


def train_bank(
    settings: BankSettings | None = None,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train tasks at once on a basis that stays as it is, and keep them in a bank.

    All tasks of a run are in memory. At every checkpoint the bank has all of them as they are then, in one transaction;
    a run that was stopped or killed goes on from there with `resume`.

    Args:
        settings: What to train on what.
        say: Called with lines for the user.
        callbacks: More callbacks for the Trainer, for example a progress bar.
        options: Settings by name, instead of `settings` or over them; with `resume`, each counts or is refused.

    Returns:
        The scores of every task, as the bank has it, with counts and cost.

    Raises:
        ConfigError: A setting has no meaning, a task exists already, or there is no run to go on with.
        DataError: The data of a task cannot be used.
        CheckpointError: The bank or the base model is not the right one.
        TrainingError: The loss of a task is not finite.
        Interrupted: The user stopped the run.
    """
    named = {**(settings.named() if settings is not None else {}), **options}
    settings = BankSettings(**named)
    check(settings)
    path = Path(str(settings.output))
    with ExitStack() as stack:
        if path.is_dir():
            stack.enter_context(locked(path))
        settings = settings_to_resume(named, path) if settings.resume else settings
        bank = open_bank(settings, path)
        if bank is not None:
            stack.enter_context(bank)  # closed also where it is refused, so that SQLite's log goes
            check_new(bank, settings)
        name = base_of(bank, settings.model) if bank is not None else base_of_basis(settings)
        settings = replace(settings, max_length=text_length(skeleton(name)[0], name, settings.max_length))
        sources = (TaskSource(**source) for source in settings.tasks)
        prepared = prepare(sources, load_tokenizer(name), settings.max_length or 0, settings.seed)
        if bank is None:
            bank = stack.enter_context(new_bank(path, settings))
        if not settings.resume:
            remove_folder(path / RUN)
        with bank:
            report = _run(settings, bank, name, prepared, say, callbacks)
        remove_folder(path / RUN)  # killed before this, the run can go on; behind it, nothing is left to do
        return report


def _run(
    settings: BankSettings,
    bank: CoreBank,
    base: str,
    prepared: Mapping[str, TaskData],
    say: Callable[[str], None],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    parts = [data.train for data in prepared.values()]
    served = load_served(bank, base, next(iter(prepared.values())).task, len(prepared), settings.dtype)
    tasks = [_task(name, data, settings) for name, data in prepared.items()]
    served.begin(tasks, settings.seed)
    # the numbers themselves, and two moments of each
    memory = 3 * sum(parameter.nbytes for parameter in served.tensors().values())
    each = memory // len(tasks)
    say(
        f"Tasks: {len(tasks)}, with {sum(map(len, parts))} rows to train on; {bank.layout.size:,} "
        f"numbers each, beside a head: {each:,} bytes of memory a task while it trains."
    )
    _check_memory(memory, each)
    folder = bank.path / RUN
    folder.mkdir(exist_ok=True)
    write_json(folder / SETTINGS, settings.to_dict())
    started = time.perf_counter()
    trainer = TaskTrainer(folder, settings, served, parts, tasks, callbacks)
    checkpoint = last_whole(folder, (TASKS,)) if settings.resume else None
    trainer.run(checkpoint, say, f"lotr bank train --resume --output {bank.path}")
    seconds = time.perf_counter() - started
    return {
        "bank": str(bank.path),
        "model": locate(base)[1],
        "tasks": _measure(served, prepared),
        "numbers_a_task": bank.layout.size,
        "bytes_a_task": bank.task_bytes,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "settings": settings.to_dict(),
        "versions": versions(),
    }


def _task(name: str, data: TaskData, settings: BankSettings) -> Task:
    """Return a task without numbers, as its record tells of it."""
    of_data = {"pairs": data.pairs, "columns": vars(data.columns), "rows": data.sizes}
    metadata = {"max_length": settings.max_length, "dtype": settings.dtype, **of_data}
    return Task(name, torch.empty(0), {}, data.labels, data.task, metadata)


def _check_memory(needed: int, each: int) -> None:
    """Refuse tasks that do not fit into the memory of the device beside each other."""
    if torch.cuda.is_available():
        there = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # nothing tells
        return
    if needed > there:
        raise ConfigError(
            f"All tasks of a run are in memory: these need {needed:,} bytes, {each:,} a task, and there are {there:,}. "
            "Train them in several runs; the bank keeps the tasks of all."
        )


def _measure(served: Served, prepared: Mapping[str, TaskData]) -> dict[str, Any]:
    """Measure every task as the bank has it, and keep the scores with it."""
    bank = served.bank
    scores = served.scores({name: data.eval for name, data in prepared.items()})
    measured = (
        replace(task, metadata={**task.metadata, "scores": scores[task.name]})
        for task in map(bank.get, scores)
    )
    bank.add_many(measured, replace=True)
    served.rows.cache.store.database.close()  # SQLite takes its log away with the last connection that writes
    return {
        name: {"task": data.task, "labels": len(data.labels), **scores[name], "rows": data.sizes}
        for name, data in prepared.items()
    }
