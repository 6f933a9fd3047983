"""What a training run leaves behind: adapter, metrics, curve, model card."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import card
from ..files.adapter_folder import WEIGHTS, write_adapter
from ..files.atomic import move_into, whole_folder, write_json
from ..files.card import Card
from ..tuner.config import LotrConfig
from .data import Columns, Task

if TYPE_CHECKING:
    from peft import PeftModel

    from .rates import Rates
    from .settings import TrainSettings

SETTINGS, METRICS, CURVE = "settings.json", "metrics.json", "curve.png"
CHECKPOINTS = "checkpoints"
#: Where the results are put together before they replace those of an earlier run.
STAGED = ".new"
#: Pictures of an adapter that `lotr inspect` and `lotr evaluate` draw later.
PICTURES = ("cores.png", "confusion.png")


@dataclass(frozen=True)
class TaskRecord:
    """What an adapter was trained for, beside its numbers: content of `task.json`."""

    task: Task
    labels: tuple[str, ...]
    max_length: int
    columns: Columns
    base_model: str
    pairs: bool = False
    method: str = "lotr"
    dtype: str = "float32"
    base_fingerprint: str | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TaskRecord:
        """Read the content of `task.json`."""
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**{**known, "labels": tuple(content["labels"]), "columns": Columns(**content["columns"])})


@dataclass
class RunReport:
    """What is known of a run at its end: content of `metrics.json`."""

    metric: str  # the number that the task is judged by
    eval: dict[str, float]
    eval_source: str  # where the rows to measure on come from
    task: TaskRecord
    settings: TrainSettings  # with what was left open decided
    rates: Rates
    begun: dict[str, Any]  # what happened before the first step
    trained_numbers: dict[str, int]  # of the adapter, the head, and both
    rows: dict[str, int]  # to train on, and to evaluate on
    steps: int
    processes: int
    seconds: float
    peak_memory_bytes: int  # of the accelerator, or of the process
    adapter_bytes: int = 0
    rank: int | None = None  # where a budget chose it
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
        left_out = {name for name in ("history",) if not history} | ({"rank"} if self.rank is None else set())
        return {name: value for name, value in content.items() if name not in left_out}


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
    for name in PICTURES:  # they show the earlier adapter
        (folder / name).unlink(missing_ok=True)
    move_into(folder / STAGED, folder, last=METRICS)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _card(model: PeftModel, report: RunReport) -> str:
    task, settings, numbers = report.task, report.settings, report.trained_numbers
    config = model.active_peft_config
    ours = isinstance(config, LotrConfig)
    adapter = config.card(len(task.labels)) if ours else Card(settings.method, is_lotr=False)
    results = card.results(
        report.eval,
        task.labels,
        train=settings.train,
        task=task.task,
        rows=report.rows["train"],
        eval_rows=report.rows["eval"],
        steps=report.steps,
        seed=settings.seed,
        adapter=numbers["adapter"],
        head=numbers["head"],
        bytes=report.adapter_bytes,
    )
    return replace(adapter, method=settings.method, base_model=task.base_model).text(results)


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("lotr", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
