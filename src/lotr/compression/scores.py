"""Every adapter's score on its own data, before it went into a bank and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, near
from ..training.data import Columns
from ..training.metrics import MAIN
from ..training.predict import evaluate
from ..training.tasks.served import OneTask, load_served
from ..training.tasks.task_list import TaskSource, read_tasks
from ..training.trained import Trained, load_trained
from .stack import Tick


@dataclass(frozen=True)
class Before:
    """The score of an adapter by itself."""

    source: TaskSource  # where its rows are
    trained: Trained  # the adapter, without the model that it was measured on
    metric: str
    score: float


def measure_adapters(
    tasks: str | Path, places: Mapping[str, Path], model: str | None, tick: Tick
) -> list[Before]:
    """Measure adapters, each on its base model and its own data: the rows of `eval`, or else those of `train`."""
    sources = read_tasks(Path(tasks))
    for source in sources:
        if source.name not in places:
            raise ConfigError(
                f"{tasks} names {source.name!r}, which is no adapter. {near(source.name, places)}"
            )
    before = []
    for source in sources:
        trained = load_trained(places[source.name], model)
        if source.task not in (None, trained.task.task):
            raise ConfigError(
                f"{tasks}: task={source.task!r} of {source.name!r} contradicts the adapter, which was trained for "
                f"{trained.task.task}. Leave it out."
            )
        metric, score = _score(trained, source)
        unloaded: Any = None
        before.append(Before(source, replace(trained, model=unloaded), metric, score))
        tick("Scores before", len(before), len(sources))
    return before


def measure_bank(
    before: Sequence[Before], bank: Path, model: str | None, tick: Tick
) -> dict[str, dict[str, Any]]:
    """Measure the same adapters as tasks of a bank: task → metric, score before and score after."""
    served = load_served(bank, model)
    scores: dict[str, dict[str, Any]] = {}
    with served.bank:
        for of in before:
            task: Any = OneTask(served, of.source.name, of.trained.task)
            _, after = _score(replace(of.trained, model=task), of.source)
            scores[of.source.name] = {"metric": of.metric, "score_before": of.score, "score_after": after}
            tick("Scores after", len(scores), len(before))
    return scores


def _score(trained: Trained, source: TaskSource) -> tuple[str, float]:
    columns = {key: name for key, name in vars(source.columns).items() if name != getattr(Columns, key)}
    scores = evaluate(trained, source.eval or source.train, **columns)
    metric = MAIN[trained.task.task]
    return metric, float(scores[metric])
