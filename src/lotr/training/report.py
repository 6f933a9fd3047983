"""What a training run leaves behind: adapter, metrics, curve, model card."""

from __future__ import annotations

import math
import platform
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import plots
from ..errors import TrainingError
from ..files import card
from ..files.adapter_folder import WEIGHTS, write_adapter
from ..files.atomic import move_into, whole_folder, write_json
from ..math.magnitude import MAGNITUDES
from . import adapter as adapt
from . import metrics
from .budget import ranks_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer

    from lotr_cli.settings import TrainSettings

    from .data import TaskData

SETTINGS, METRICS, CURVE, START = "settings.json", "metrics.json", "curve.png", "start.png"
CHECKPOINTS = "checkpoints"
#: Where the results are put together before they replace those of an earlier run.
STAGED = ".new"
#: Pictures of an adapter that a run does not always draw, and those that `lotr inspect` and `lotr evaluate` draw later.
PICTURES = (START, "cores.png", "confusion.png")


@dataclass
class Run:
    """What is known before the first step."""

    settings: TrainSettings
    folder: Path
    data: TaskData
    model: PeftModel
    tokenizer: Any
    task_record: dict[str, Any]
    begun: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def summarise(run: Run, trainer: Trainer, scores: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return what `metrics.json` will hold: the score, every setting, counts, cost and versions.

    Raises:
        TrainingError: The final score is not finite.
    """
    task = run.data.task
    head = sum(
        p.numel() for n, p in run.model.named_parameters() if p.requires_grad and ".modules_to_save." in n
    )
    trained, _ = run.model.get_nb_trainable_parameters()
    values = {
        name.removeprefix("eval_"): v
        for name, v in scores.items()
        if not name.endswith(("second", "runtime"))
    }
    values = {name: value for name, value in values.items() if name not in ("epoch", "step")}
    if task == "causal-lm":
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
    main = metrics.MAIN[task]
    if not math.isfinite(values[main]):
        raise TrainingError(f"The final {main} is {values[main]}. Lower the learning rates.")
    return {
        "metric": main,
        main: values[main],
        "eval": values,
        "eval_source": run.data.eval_source,
        "task": run.task_record,
        "settings": run.settings.record(),
        "rates": vars(adapt.rates(run.settings)),
        "begun": run.begun,
        **({} if run.settings.budget is None else {"ranks": ranks_of(run.model.active_peft_config)}),
        "trained_numbers": {"adapter": trained - head, "head": head, "total": trained},
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "rows": {"train": len(run.data.train), "eval": len(run.data.eval)},
        "seconds": round(seconds, 2),
        "peak_memory_bytes": _peak_memory(),
        "seed": run.settings.seed,
        "versions": versions(),
    }


def write(run: Run, report: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the results; an older adapter in the folder, with its pictures, stays until the new one is whole."""
    shutil.rmtree(run.folder / STAGED, ignore_errors=True)  # of a run that was killed here
    with whole_folder(run.folder / STAGED) as made:
        write_adapter(run.model, made, task=run.task_record, base=run.task_record["base_model"])
        report["adapter_bytes"] = (made / WEIGHTS).stat().st_size
        plots.curve(history, report["metric"], f"{run.settings.method} on {run.settings.train}", made / CURVE)
        if sites := report["begun"].get("sites"):
            places = [(site["layer"], site["projection"]) for site in sites]
            kept = [site["kept"] for site in sites]
            plots.by_place(places, kept, "share of the gradient that the factors keep", made / START)
        config = run.model.active_peft_config
        additive = MAGNITUDES[getattr(config, "magnitude", "none")].additive
        text = card.for_run(report, config.task_type, additive, getattr(config, "reference", None))
        (made / "README.md").write_text(text, encoding="utf-8")
        write_json(made / SETTINGS, run.settings.record())
        write_json(made / METRICS, {**report, "history": history})
    for name in PICTURES:  # they show the earlier adapter
        (run.folder / name).unlink(missing_ok=True)
    move_into(run.folder / STAGED, run.folder, last=METRICS)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {
        "lotr": version("lotr"),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
