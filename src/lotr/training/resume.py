"""Going on with a run that was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files.atomic import read_json
from .checkpoint import PROGRESS, last_whole
from .report import CHECKPOINTS, METRICS, SETTINGS

if TYPE_CHECKING:
    from .settings import TrainSettings

# a resumed run may differ in these and still be the same run
_FREE_ON_RESUME = frozenset({"resume", "overwrite", "output", "eval_steps", "report_to"})


def restore(settings: TrainSettings, given: set[str]) -> TrainSettings:
    """Return the settings of the interrupted run in the output folder.

    Args:
        settings: What was asked for now; `output` names the folder.
        given: Names of the settings that the user named now.

    Raises:
        ConfigError: A setting was named that differs from the run's.
        CheckpointError: There is no run in the folder.
    """
    if settings.output is None:
        raise ConfigError("--resume needs --output, the folder of the run to go on with.")
    folder = Path(settings.output)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} does not exist, so there is no run to resume. Leave --resume out to start one."
        )
    # checkpoints are removed last, so where some are left there is a run to go on with, over an older one too
    if (folder / METRICS).is_file() and not (folder / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"The run in {folder} is finished; there is nothing to resume. Start another with --overwrite."
        )
    saved = read_json(folder / CHECKPOINTS / SETTINGS, "the folder of a run that was started")
    for name in sorted(given - _FREE_ON_RESUME):
        if name in saved and getattr(settings, name) != saved[name]:
            raise ConfigError(
                f"--resume goes on with the run's own settings, and {name} was {saved[name]!r}, not "
                f"{getattr(settings, name)!r}. Leave it out, or start a new run in another folder."
            )
    free = {name: getattr(settings, name) for name in _FREE_ON_RESUME & given}
    known = {name: value for name, value in saved.items() if hasattr(settings, name)}
    return replace(settings, **{**known, **free, "resume": True, "output": settings.output})


def checkpoint(folder: Path) -> Path:
    """Return the newest whole checkpoint of the run in a folder.

    Raises:
        ConfigError: There is none.
    """
    found = last_whole(folder / CHECKPOINTS)
    if found is None:
        raise ConfigError(f"{folder} holds no whole checkpoint to resume from. Start again with --overwrite.")
    return found


def progress(checkpoint: Path) -> tuple[dict[str, Any], float]:
    """Return how the run of a checkpoint began, and its seconds so far; nothing where an older version wrote it."""
    if not (checkpoint / PROGRESS).is_file():
        return {}, 0.0
    said = read_json(checkpoint / PROGRESS, "a checkpoint of a run")
    return dict(said.get("begun", {})), float(said.get("seconds", 0.0))
