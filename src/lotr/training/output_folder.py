"""The output folder of a run: apart from what the run reads, not blocked by one that came to nothing, gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import atomic
from ..files.adapter_folder import BASIS_WEIGHTS
from ..files.atomic import check_free, read_json, write_json
from .checkpoint import last_whole
from .report import CHECKPOINTS, METRICS, SETTINGS, STAGED
from .settings import TrainSettings, read_settings

if TYPE_CHECKING:
    from peft import PeftConfig

#: A run that goes on may differ in these and still be the same run.
_FREE_ON_RESUME = frozenset({"resume", "overwrite", "output", "eval_steps", "report_to"})


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something; what a killed run left before its first checkpoint is nothing.

    Raises:
        ConfigError: The folder is not free, or is a bank, whose factors would be read in place of the new weights.
    """
    if (folder / BASIS_WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} is a bank, and an adapter cannot replace it. Choose another output folder."
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names != {CHECKPOINTS} or last_whole(folder / CHECKPOINTS) is not None:
        check_free(folder, overwrite)


def check_apart(folder: Path, settings: TrainSettings, config: PeftConfig | None = None) -> None:
    """Refuse an output folder whose writing would destroy the basis or the base model that the run reads."""
    inputs = {
        "basis": (settings.basis, getattr(config, "basis", None)),
        "base model": (settings.model,),
    }
    for what, paths in inputs.items():
        for path in paths:
            atomic.check_apart(folder, what, path, folder / CHECKPOINTS, folder / STAGED)


@contextmanager
def started_run(folder: Path, settings: TrainSettings, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder of checkpoints for the time of the block; a block that fails before the first leaves none."""
    existed = folder.exists()
    if not settings.resume:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    try:
        # beside the checkpoints: the settings of an older, finished run in the folder stay with its adapter
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / CHECKPOINTS / SETTINGS, settings.to_dict())
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


def settings_to_resume(options: Mapping[str, Any]) -> TrainSettings:
    """Return the settings of the interrupted run in an output folder.

    Args:
        options: The settings that were named now; `output` is the folder.

    Raises:
        ConfigError: A setting was named that differs from the run's, or there is nothing to resume.
        CheckpointError: There is no run in the folder.
    """
    if options.get("output") is None:
        raise ConfigError("--resume needs --output, the folder of the run to go on with.")
    folder = Path(options["output"])
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
    if last_whole(folder / CHECKPOINTS) is None:
        raise ConfigError(f"{folder} holds no whole checkpoint to resume from. Start again with --overwrite.")
    named = {name: value for name, value in options.items() if value is not None}
    for name in sorted(named.keys() - _FREE_ON_RESUME):
        if named[name] != saved.get(name):
            raise ConfigError(
                f"--resume goes on with the run's own settings, and {name} was {saved.get(name)!r}, not "
                f"{named[name]!r}. Leave it out, or start a new run in another folder."
            )
    return read_settings(TrainSettings, {**saved, **named})
