"""Many tasks trained at once into a bank: settings in, tasks with their scores out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...bank import CoreBank, Task
from ...errors import ConfigError
from ...files.atomic import locked, remove_folder
from ...tuner.saved_adapter import hash_of, read_saved
from ..adapter import check_numbers
from ..base_model import load_tokenizer, locate, skeleton, text_length
from ..checkpoint import last_whole
from ..data import TaskData
from ..inference import measured
from ..output import options_to_resume, started_run, versions
from ..process import n_processes
from ..settings import read_options
from ..trained import CHECKPOINTS
from .served import OneTask, Served, base_of, load_served
from .settings import BankSettings
from .task_list import TaskSource, prepare
from .trainer import TaskTrainer, temperature_of

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
    named = read_options((settings.named() if settings is not None else {}) | options, kind=BankSettings)
    path = Path(str(named.get("output")))
    with locked(path) if path.is_dir() else nullcontext():
        if named.get("resume"):
            named = options_to_resume(named, BankSettings)
        settings = BankSettings(**named)
        _check(settings)
        with _opened_bank(settings, path) as bank:
            name = base_of(bank, settings.model)
            settings = replace(settings, max_length=text_length(skeleton(name)[0], name, settings.max_length))
            sources = (TaskSource(**source) for source in settings.tasks)
            prepared = prepare(sources, load_tokenizer(name), settings.max_length or 0, settings.seed)
            with started_run(path, settings, say):
                report = _run(settings, bank, name, prepared, say, callbacks)
        remove_folder(path / CHECKPOINTS)  # killed before this, the run can go on; behind it, nothing is left
        return report


def _check(settings: BankSettings) -> None:
    """Refuse settings that have no meaning."""
    if settings.output is None:
        raise ConfigError("--output is missing. `lotr bank train --help` shows examples.")
    if n_processes() > 1:
        raise ConfigError(
            "Tasks of a bank train in one process. Start it without torchrun or accelerate launch."
        )
    check_numbers(settings)
    temperature_of(settings.sampling, settings.temperature)


@contextmanager
def _opened_bank(settings: BankSettings, path: Path) -> Iterator[CoreBank]:
    """Open the bank, or make it where there is none; one whose run fails before its first checkpoint goes again.

    It is refused where its run would be passed over, or where it has another basis, or the tasks already.
    """
    if not settings.resume and last_whole(path / CHECKPOINTS) and not settings.replace:
        raise ConfigError(
            f"A run in {path} was not finished. Go on with it with --resume, or drop it with --replace; the bank keeps "
            "its tasks as of the last checkpoint."
        )
    if not settings.tasks:
        raise ConfigError("There are no tasks to train. Name them with --tasks.")
    if settings.resume or (path.is_dir() and any(path.iterdir())):
        with CoreBank.open(path, writable=True) as bank:
            if not settings.resume:  # inside, so that SQLite's log goes also where it is refused
                _check_new(bank, settings)
            yield bank
        return
    if settings.basis is None:
        raise ConfigError(
            f"{path} holds no bank yet. Make one of an adapter's factors: lotr bank create {path} --basis ADAPTER"
        )
    bank = CoreBank.create(path, settings.basis, dtype=settings.keep or "bfloat16")
    with locked(path):
        try:
            with bank:
                yield bank
        except BaseException:
            if last_whole(path / CHECKPOINTS) is None:
                remove_folder(path)
            raise


def _check_new(bank: CoreBank, settings: BankSettings) -> None:
    """Refuse another basis or type than the bank's, and tasks that it has."""
    basis = settings.basis  # named again by who starts a run again that was killed early
    if basis is not None and hash_of(read_saved(basis).factors()) != bank.description.basis_hash:
        raise ConfigError(f"{bank.path} is a bank and has another basis. Leave out --basis={basis}.")
    if settings.keep not in (None, bank.dtype):
        raise ConfigError(
            f"{bank.path} is a bank that keeps its tasks in {bank.dtype}. Leave out --keep={settings.keep}, or make a "
            "new bank."
        )
    taken = [source["name"] for source in settings.tasks if source["name"] in bank]
    if taken and not settings.replace:
        raise ConfigError(
            f"The bank in {bank.path} has a task {taken[0]!r} already. Choose another name, or use --replace."
        )


def _run(
    settings: BankSettings,
    bank: CoreBank,
    base: str,
    prepared: Mapping[str, TaskData],
    say: Callable[[str], None],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    parts = [data.train for data in prepared.values()]
    served = load_served(bank, base, next(iter(prepared.values())).task.task, len(prepared), settings.dtype)
    tasks = [_task(name, data, settings) for name, data in prepared.items()]
    served.begin(tasks, settings.seed)
    # the numbers themselves, and two moments of each
    memory = 3 * sum(parameter.nbytes for parameter in served.tensors().values())
    say(
        f"Tasks: {len(tasks)}, with {sum(map(len, parts))} rows to train on; {bank.layout.size:,} "
        f"numbers each, beside a head: {memory // len(tasks):,} bytes of memory a task while it trains."
    )
    started = time.perf_counter()
    trainer = TaskTrainer(settings, served, parts, tasks, callbacks)
    checkpoint = last_whole(bank.path / CHECKPOINTS) if settings.resume else None
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
    of = data.task
    metadata = {"max_length": of.max_length, "dtype": settings.dtype, "pairs": of.pairs}
    metadata |= {"columns": vars(of.columns), "rows": data.sizes}
    return Task(name, torch.empty(0), {}, of.labels, of.task, metadata)


def _measure(served: Served, prepared: Mapping[str, TaskData]) -> dict[str, Any]:
    """Measure every task as the bank has it, and keep the scores with it."""
    served.model.eval()
    served.rows.cache.training.clear()
    bank, collate = served.bank, served.collator()
    scores = {}
    for name, data in prepared.items():
        scores[name] = measured(OneTask(served, name, data.task), collate, data.task, data.eval)
        scores[name].pop("confusion", None)
    tasks = (replace(t, metadata={**t.metadata, "scores": scores[t.name]}) for t in map(bank.get, scores))
    bank.add_many(tasks, replace=True)
    served.rows.cache.store.database.close()  # SQLite takes its log away with the last connection that writes
    return {
        name: {"task": data.task.task, "labels": len(data.task.labels), **scores[name], "rows": data.sizes}
        for name, data in prepared.items()
    }
