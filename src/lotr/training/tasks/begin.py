"""How a run of a bank's tasks begins: what it refuses, which bank it opens or makes, and what it goes on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...bank import CoreBank
from ...bank.layout import Layout
from ...errors import ConfigError
from ...files.atomic import locked, read_json, remove_folder, unfinished
from ...tuner.saved_adapter import hash_of, read_saved
from ..adapter import check_numbers
from ..checkpoint import last_whole
from ..output import SETTINGS, check_same_run
from ..process import n_processes
from .settings import BankSettings
from .task_list import TaskSource
from .trainer import TASKS, temperature_of

#: Folder of an unfinished run inside a bank.
RUN = "training"


@contextmanager
def new_bank(path: Path, settings: BankSettings) -> Iterator[CoreBank]:
    """Make a bank and keep it for this run; a run that fails before its first checkpoint leaves none."""
    bank = CoreBank.create(path, str(settings.basis), dtype=settings.keep)
    with locked(path):
        try:
            yield bank
        except BaseException:
            if last_whole(path / RUN, (TASKS,)) is None:
                remove_folder(path)
            raise


def check(settings: BankSettings) -> None:
    """Refuse settings that have no meaning."""
    if settings.output is None:
        raise ConfigError("--output is missing. `lotr bank train --help` shows examples.")
    if n_processes() > 1:
        raise ConfigError(
            "Tasks of a bank train in one process. Start it without torchrun or accelerate launch."
        )
    check_numbers(settings)
    temperature_of(settings.sampling, settings.temperature)


def settings_to_resume(named: dict[str, Any], path: Path) -> BankSettings:
    """Return the settings of the stopped run in a bank; those named now must not differ from them."""
    file = path / RUN / SETTINGS
    if not file.is_file():
        # what a run that was killed at its end left
        shutil.rmtree(unfinished(path / RUN), ignore_errors=True)
        raise ConfigError(f"There is no unfinished run in {path}; there is nothing to resume.")
    saved = read_json(file, "the folder of a run that was started")
    check_same_run(named, saved)
    try:
        settings = BankSettings(**{**saved, **named, "tasks": tuple(saved["tasks"]), "output": str(path)})
        if nulls := [
            f.name for f in fields(settings) if f.default is not None and vars(settings)[f.name] is None
        ]:
            raise TypeError(f"{nulls[0]} is null")
        check(settings)
        for source in settings.tasks:
            TaskSource(**source)
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}), so its run cannot go on. Drop it with --replace; the bank keeps its "
            "tasks as of the last checkpoint."
        ) from None
    return settings


def open_bank(settings: BankSettings, path: Path) -> CoreBank | None:
    """Open the bank, or return nothing where a new one is to be made."""
    if settings.resume:
        return CoreBank.open(path, writable=True)
    if (path / RUN / SETTINGS).is_file() and not settings.replace:
        raise ConfigError(
            f"A run in {path} was not finished. Go on with it with --resume, or drop it with --replace; the bank keeps "
            "its tasks as of the last checkpoint."
        )
    if not settings.tasks:
        raise ConfigError("There are no tasks to train. Name them with --tasks.")
    if not path.is_dir() or not any(path.iterdir()):
        if settings.basis is None:
            raise ConfigError(
                f"{path} holds no bank yet. Name the adapter that gives its factors with --basis."
            )
        return None
    return CoreBank.open(path, writable=True)


def check_new(bank: CoreBank, settings: BankSettings) -> None:
    """Refuse another basis than the bank's, and tasks that it has."""
    basis = settings.basis  # named again by who starts a run again that was killed early
    if settings.resume:
        return
    if basis is not None and hash_of(read_saved(basis).factors()) != bank.description.basis_hash:
        raise ConfigError(f"{bank.path} is a bank and has another basis. Leave out --basis={basis}.")
    taken = [source["name"] for source in settings.tasks if source["name"] in bank]
    if taken and not settings.replace:
        raise ConfigError(
            f"The bank in {bank.path} has a task {taken[0]!r} already. Choose another name, or use --replace."
        )


def base_of_basis(settings: BankSettings) -> str:
    """Return the base model of the adapter that gives a new bank its factors."""
    saved = read_saved(str(settings.basis))
    Layout.of(saved.plan)  # refused before any data is read
    name = settings.model or saved.config.base_model_name_or_path or saved.folder.task.get("base_model")
    if name is None:
        raise ConfigError(f"{settings.basis} does not tell its base model. Name it with --model.")
    return str(name)
