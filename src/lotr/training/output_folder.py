"""The output folder of a run: apart from what the run reads, and not blocked by a run that came to nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import atomic as files
from ..files.adapter_folder import BASIS_WEIGHTS
from ..files.atomic import check_free, write_json
from .checkpoint import last_whole
from .report import CHECKPOINTS, SETTINGS, STAGED

if TYPE_CHECKING:
    from peft import PeftConfig

    from .settings import TrainSettings


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something; what a killed run left before its first checkpoint is nothing.

    Raises:
        ConfigError: The folder is not free, or is a bank, whose factors would be read in place of the new weights.
    """
    if (folder / BASIS_WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} is a bank, and an adapter cannot replace it. Choose another output folder."
        )
    holds = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if holds != {CHECKPOINTS} or last_whole(folder / CHECKPOINTS) is not None:
        check_free(folder, overwrite)


def check_apart(folder: Path, settings: TrainSettings, config: PeftConfig | None = None) -> None:
    """Refuse an output folder whose writing would destroy what the run reads.

    Args:
        folder: The output folder.
        settings: `basis` and `model` are read.
        config: A configuration instead of the settings' own; its `basis` is read.

    Raises:
        ConfigError: The basis or the base model is in a place that the run overwrites.
    """
    for what, place in (
        ("basis", settings.basis),
        ("basis", getattr(config, "basis", None)),
        ("base model", settings.model),
    ):
        files.check_apart(folder, what, place, folder / CHECKPOINTS, folder / STAGED)


@contextmanager
def begun_folder(
    folder: Path, record: dict[str, Any], resume: bool, say: Callable[[str], None]
) -> Iterator[None]:
    """Make the folder of checkpoints for the time of the block; a block that fails before the first leaves none.

    Args:
        folder: The output folder.
        record: Settings of the run, written beside its checkpoints.
        resume: The checkpoints in the folder are this run's own.
        say: Called with one line when nothing is left.
    """
    existed = folder.exists()
    if not resume:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    try:
        # beside the checkpoints: the settings of an older, finished run in the folder stay with its adapter
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / CHECKPOINTS / SETTINGS, record)
        yield
    except BaseException:
        if last_whole(folder / CHECKPOINTS) is None:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()
            say(
                "No checkpoint was written yet, so nothing is left of this run; the same command starts it again."
            )
        raise
