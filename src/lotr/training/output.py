"""The output folder of a run: what must not be in it, what a run leaves there, and how a stopped one goes on."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..files import card
from ..files.adapter_folder import WEIGHTS, check_replaceable, write_adapter
from ..files.atomic import (
    check_apart,
    move_into,
    remove_folder,
    unfinished,
    whole_folder,
    write_json,
)
from ..files.card import Card
from ..tuner.config import LotrConfig
from .checkpoint import last_whole
from .data import TaskRecord
from .rates import parameter_groups
from .settings import Settings, TrainSettings, read_options, typed
from .trained import CHECKPOINTS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

SETTINGS, METRICS, CURVE = "settings.json", "metrics.json", "curve.png"
#: Where the results are put together before they replace those of an earlier run.
STAGED = ".new"
#: Where loggers of transformers write, such as TensorBoard's.
LOGS = "runs"
#: A run that goes on may differ in these and still be the same run.
_FREE_ON_RESUME = frozenset({"resume", "overwrite", "output", "eval_steps", "save_steps", "report_to"})


def check_output(settings: TrainSettings, config: PeftConfig | None, is_main: bool) -> None:
    """Refuse an output folder that holds something, or the basis or the base model that the run reads.

    What a killed run left before its first checkpoint is nothing.
    """
    folder = Path(str(settings.output))
    read = [
        ("basis", settings.basis),
        ("basis", getattr(config, "basis", None)),
        ("base model", settings.model),
    ]
    for what, place in read:
        check_apart(folder, what, place, folder / CHECKPOINTS, folder / STAGED)
    if settings.resume or not is_main:  # the others would find what the main process made
        return
    shutil.rmtree(unfinished(folder / CHECKPOINTS), ignore_errors=True)  # of a run that was killed at its end
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names <= {CHECKPOINTS, LOGS} or last_whole(folder / CHECKPOINTS) is not None:
        check_replaceable(folder, settings.overwrite)


@contextmanager
def started_run(
    folder: Path, settings: Any, say: Callable[[str], None], config: PeftConfig | None = None
) -> Iterator[None]:
    """Make the folder of checkpoints for the time of the block; a block that fails before the first leaves none.

    A configuration is kept there to go on with.
    """
    if not settings.resume:
        remove_folder(folder / CHECKPOINTS)
    try:
        # beside the checkpoints: the settings of an older, finished run in the folder stay with its adapter
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if config is not None:
            config.save_pretrained(str(folder / CHECKPOINTS))
        write_json(folder / CHECKPOINTS / SETTINGS, settings.to_dict())
        yield
    except BaseException:
        if last_whole(folder / CHECKPOINTS) is None:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            say("No checkpoint was written yet, so the same command starts this run again.")
        raise


def options_to_resume(named: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Return the settings of the stopped run in the folder `output`; those named now must not differ from them.

    A run that was stopped before its first checkpoint begins again.
    """
    if "output" not in named:
        raise ConfigError("--resume needs --output, the folder of the run to go on with.")
    folder = Path(named["output"])
    file = folder / CHECKPOINTS / SETTINGS
    if not file.is_file():
        # what is left of a run that was killed at its end
        shutil.rmtree(unfinished(folder / CHECKPOINTS), ignore_errors=True)
        raise ConfigError(
            f"There is no unfinished run in {folder}: it has ended, or was never begun, so there is nothing to resume. "
            "Leave --resume out to start one."
        )
    saved = read_options({}, file, kind)
    plain = typed(kind, json.loads(json.dumps(dict(named), default=str)), "--resume")
    for name in sorted(plain.keys() - _FREE_ON_RESUME):
        if plain[name] != saved.get(name):
            raise ConfigError(
                f"--resume goes on with the run's own settings, and {name} was {saved.get(name)!r}, not "
                f"{plain[name]!r}. Leave it out, or start a new run in another folder."
            )
    return {**saved, **named}


@dataclass
class RunReport:
    """What is known of a run at its end: content of `metrics.json`."""

    metric: str  # the number that the task is judged by
    eval: dict[str, float]
    eval_source: str  # where the rows to measure on come from
    task: TaskRecord
    settings: TrainSettings  # with what was left open decided
    rates: dict[str, float]
    begun: dict[str, Any]  # what happened before the first step
    trained_numbers: dict[str, int]  # of the adapter, the head, and both
    rows: dict[str, int]  # to train on, and to evaluate on
    steps: int
    processes: int
    seconds: float
    peak_memory_bytes: int  # of the accelerator, or of the process
    adapter_bytes: int = 0
    rank: int | None = None  # where a budget chose it
    resumed_at: list[int] = field(default_factory=list)  # steps at which the run went on after a stop
    history: list[dict[str, Any]] = field(default_factory=list)  # losses and scores over the steps

    @property
    def score(self) -> float:
        """The value of `metric`."""
        return self.eval[self.metric]

    def to_dict(self, history: bool = True) -> dict[str, Any]:
        """Return plain values, with the score under its name, and the versions of what the result depends on."""
        content = asdict(self) | {
            self.metric: self.score,
            "settings": self.settings.to_dict(),
            "seed": self.settings.seed,
            "versions": versions(),
        }
        left_out = {"history": not history, "rank": self.rank is None}
        return {name: value for name, value in content.items() if not left_out.get(name)}


def write(folder: Path, model: PeftModel, report: RunReport) -> None:
    """Write the results; an older adapter in the folder, with its pictures, stays until the new one is whole."""
    from ..adapters import plots

    settings = report.settings
    shutil.rmtree(folder / STAGED, ignore_errors=True)  # of a run that was killed here
    with whole_folder(folder / STAGED) as staged:
        write_adapter(model, staged, task=asdict(report.task), base=report.task.base_model)
        report.adapter_bytes = (staged / WEIGHTS).stat().st_size
        title = f"{settings.method} on {settings.train}"
        plots.curve(report.history, report.metric, title, staged / CURVE)
        (staged / "README.md").write_text(_card(model, report), encoding="utf-8")
        write_json(staged / SETTINGS, settings.to_dict())
        write_json(staged / METRICS, report.to_dict())
    move_into(folder / STAGED, folder, last=METRICS)
    remove_folder(folder / CHECKPOINTS)


def _card(model: PeftModel, report: RunReport) -> str:
    task, settings, config = report.task, report.settings, model.active_peft_config
    ours = isinstance(config, LotrConfig)
    adapter = config.card(len(task.labels)) if ours else Card(str(settings.method), is_lotr=False)
    rates = {part["name"]: part["lr"] for part in parameter_groups(model, **report.rates)}
    results = card.results(report.to_dict(), rates)
    return replace(adapter, method=settings.method, base_model=task.base_model).text(results)


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("lotr", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_hub(repository: str) -> None:
    """Refuse an upload that would fail when the run is over: no hub, nobody logged in, or no name (ConfigError)."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_exists(repository)
        HfApi().whoami()
    except Exception as error:  # of whichever library the hub's uses to connect
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"push_to_hub={repository!r} would fail: {reason} Log in with `hf auth login`; or leave it out, and upload "
            f"later: hf upload {repository} OUTPUT"
        ) from None


def upload(folder: Path, repository: str) -> str:
    """Upload the files of a finished run, in a private repository where there is none yet; return its address."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["runs/**"]))
    except Exception as error:  # as above
        raise CheckpointError(
            f"The adapter is whole in {folder}, and its upload failed: {error} Upload it later: "
            f"hf upload {repository} {folder}"
        ) from error
