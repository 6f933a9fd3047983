"""What is known and ready before the first step of a run: settings, model with adapter, encoded rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed
from transformers.utils import logging

from ..errors import ConfigError, near
from ..files.adapter_folder import fingerprint, read_adapter
from . import budget
from .adapter import TASK_TYPES, adapter_config, add_adapter, check_positive, rates, resolve
from .base_model import check_dtype, load_model, load_tokenizer, locate, text_length
from .checkpoint import last_whole
from .data import Columns, collator, encode, load_task
from .output_folder import check_apart, check_output
from .process import is_main_process
from .report import CHECKPOINTS, TaskRecord

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel

    from .rates import Rates
    from .settings import TrainSettings

_LIMITS = {"warmup": 1.0, "weight_decay": math.inf, "seed": 2**32 - 1, "head_warmup": math.inf}
_POSITIVE = ("epochs", "batch_size", "max_length", "max_steps", "eval_steps", "start_batches")
_RATES = ("lr", "core_lr", "magnitude_lr", "head_lr")


def check(settings: TrainSettings, config: PeftConfig | None) -> tuple[TrainSettings, Path]:
    """Check what costs nothing to check; return the settings with their base model, and the output folder."""
    if settings.model is None and settings.basis is not None:
        base = read_adapter(settings.basis).config.get("base_model_name_or_path")
        settings = replace(settings, model=base)
    for name in ("model", "train", "output"):
        if getattr(settings, name) is None:
            raise ConfigError(f"--{name} is missing. `lotr train --help` shows examples.")
    check_positive(settings, *_POSITIVE, *_RATES)
    for name, most in _LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= most:
            raise ConfigError(f"{name}={value} is out of range. Use a number from 0 to {most}.")
    check_dtype(settings.dtype)
    _check_logger(settings.report_to)
    if config is not None and settings.budget is not None:
        raise ConfigError(
            f"budget={settings.budget} chooses the ranks of the adapter that the settings describe, and config "
            "describes another. Leave the budget out; lotr.largest_rank finds a rank for a configuration."
        )
    folder = Path(str(settings.output))
    check_apart(folder, settings, config)
    if not settings.resume and is_main_process():  # the others would find what the main process made
        check_output(folder, settings.overwrite)
    return settings, folder


def _check_logger(report_to: str) -> None:
    """Refuse a place to log to that transformers does not know, or whose package is missing."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = ["none", "all", *get_available_reporting_integrations()]
    if report_to not in known:
        raise ConfigError(f"report_to={report_to!r} is not known, or not installed. {near(report_to, known)}")


@dataclass(frozen=True)
class Run:
    """What is known before the first step."""

    settings: TrainSettings
    folder: Path
    checkpoint: Path | None
    model: PeftModel
    rates: Rates
    task: TaskRecord
    rows: tuple[Dataset, Dataset]  # to train on, to evaluate on
    eval_source: str
    collate: Callable[[list[Any]], Any]
    steps: int


def prepare(
    settings: TrainSettings, folder: Path, say: Callable[[str], None], config: PeftConfig | None
) -> Run:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    described = config is None
    if config is None:
        config = adapter_config(settings)
    name = str(settings.model)
    tokenizer = load_tokenizer(name)
    columns = Columns(settings.text, settings.text2, settings.label)
    data = load_task(str(settings.train), settings.eval, columns, settings.task, seed=settings.seed)  # type: ignore[arg-type]
    say(f"Task: {data.task}. {data.reason}")
    say(f"Data: {len(data.train)} rows to train on, {len(data.eval)} to evaluate on.")

    if described:
        settings = resolve(settings, config, data.task)
        config.task_type = TASK_TYPES[data.task]
        if settings.init is not None:
            config.init = settings.init  # type: ignore[attr-defined]
    set_seed(settings.seed)
    base = load_model(name, data.task, data.labels, settings.dtype, tokenizer)
    settings = replace(settings, max_length=text_length(base, name, settings.max_length))
    checkpoint = last_whole(folder / CHECKPOINTS) if settings.resume else None
    if settings.budget is not None:
        say(budget.fit(settings, config, base, checkpoint))  # type: ignore[arg-type]
    model = add_adapter(base, config)
    if settings.gradient_checkpointing:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    if settings.budget is None:
        trained, total = model.get_nb_trainable_parameters()
        share = 100 * trained / total
        say(f"Method: {settings.method}, {trained:,} trained numbers ({share:.2f} % of the model).")

    adapted: Any = model.base_model
    task = TaskRecord(
        task=data.task,
        labels=tuple(data.labels),
        max_length=int(settings.max_length or 0),
        columns=columns,
        base_model=locate(name)[1],
        pairs=data.pairs,
        method=settings.method,
        dtype=settings.dtype,
        base_fingerprint=fingerprint(base, sorted(adapted.targeted_module_names)),
    )
    rows = tuple(
        encode(part, tokenizer, data.task, data.labels, task.max_length) for part in (data.train, data.eval)
    )
    return Run(
        settings,
        folder,
        checkpoint,
        model,
        rates(settings, config),
        task,
        rows,
        data.eval_source,
        collator(tokenizer, data.task),
        _steps(settings, len(rows[0])),
    )


def _steps(settings: TrainSettings, rows: int) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    an_epoch = math.ceil(rows / (settings.batch_size * world))
    return settings.max_steps or math.ceil(an_epoch * settings.epochs)
