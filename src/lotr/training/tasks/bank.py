"""The bank that a run trains: whether it may, and whether it is made or gone on with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...bank import CoreBank
from ...bank.layout import Layout
from ...errors import ConfigError
from ...files.atomic import read_json
from ...tuner.saved_adapter import read_saved
from ..adapter import check_positive
from ..report import SETTINGS
from .sampler import temperature_of

if TYPE_CHECKING:
    from lotr_cli.bank_settings import BankSettings

#: Folder of an unfinished run inside a bank.
RUN = "training"


def check(settings: BankSettings) -> None:
    """Refuse settings that would train nothing, before anything is read."""
    if settings.output is None:
        raise ConfigError("--output is missing. `lotr bank train --help` shows examples.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "Tasks of a bank train in one process. Start it without torchrun or accelerate launch."
        )
    numbers = ("epochs", "batch_size", "max_length", "max_steps", "save_steps", "core_lr", "head_lr")
    check_positive(settings, *numbers)
    temperature_of(settings.sampling, settings.temperature)


def resumed(settings: BankSettings, path: Path) -> BankSettings:
    """Return the settings of the run that goes on."""
    unfinished = path / RUN / SETTINGS
    if not unfinished.is_file():
        raise ConfigError(f"There is no unfinished run in {path}; there is nothing to resume.")
    saved = read_json(unfinished, "the folder of a run that was started")
    return replace(settings, **{**saved, "output": str(path)})


def bank_of(settings: BankSettings, path: Path) -> CoreBank | None:
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
    bank = CoreBank.open(path, writable=True)
    if settings.basis is not None:
        raise ConfigError(f"{path} is a bank and has its basis. Leave out --basis={settings.basis}.")
    taken = [said["name"] for said in settings.tasks if said["name"] in bank]
    if taken and not settings.replace:
        raise ConfigError(
            f"The bank in {path} has a task {taken[0]!r} already. Choose another name, or use --replace."
        )
    return bank


def base_of_basis(settings: BankSettings) -> str:
    """Return the base model of the adapter that gives a new bank its factors."""
    adapter = read_saved(str(settings.basis))
    Layout.of(adapter.plan)  # refused before any data is read
    name = settings.model or adapter.config.base_model_name_or_path or adapter.folder.task.get("base_model")
    if name is None:
        raise ConfigError(f"{settings.basis} does not tell its base model. Name it with --model.")
    return str(name)
