"""All before the first step of a run: its settings, model and rows; a new head warms up, factors turn towards data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations

from ..bank.heads import NAMES
from ..errors import ConfigError, TrainingError, near
from ..files.adapter_folder import read_adapter
from ..files.fingerprint import fingerprint
from .adapter import adapter_config, add_adapter, check_from_zero, check_positive, complete, fit_rank
from .base_model import check_dtype, load_tokenizer, load_with_new, locate, text_length
from .checkpoint import last_whole
from .data import Columns, collator, encode, load_task
from .output import check_apart, check_output
from .process import is_main_process
from .rates import Rates, rates_of
from .trained import CHECKPOINTS, TaskRecord

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel

    from .settings import TrainSettings

_COUNTS = ("epochs", "batch_size", "max_length", "max_steps", "eval_steps", "start_batches")
_POSITIVE = (*_COUNTS, *Rates.__dataclass_fields__)
_HEAD = ".modules_to_save."


@dataclass(frozen=True)
class Run:
    """What is known before the first step."""

    settings: TrainSettings  # with what was left open decided
    folder: Path
    checkpoint: Path | None  # to go on from
    model: PeftModel
    rates: Rates
    task: TaskRecord
    rows: tuple[Dataset, Dataset]  # to train on, to evaluate on
    eval_source: str
    collate: Callable[[list[Any]], Any]
    steps: int


def check(settings: TrainSettings, config: PeftConfig | None) -> TrainSettings:
    """Check what costs nothing to check; return the settings with their base model."""
    if settings.model is None and settings.basis is not None:
        base = read_adapter(settings.basis).config.get("base_model_name_or_path")
        settings = replace(settings, model=base)
    for name in ("model", "train", "output"):
        if getattr(settings, name) is None:
            raise ConfigError(f"--{name} is missing. `lotr train --help` shows examples.")
    check_positive(settings, *_POSITIVE)
    check_from_zero(settings)
    check_dtype(settings.dtype)
    loggers = ["none", "all", *get_available_reporting_integrations()]
    if settings.report_to not in loggers:
        raise ConfigError(
            f"report_to={settings.report_to!r} is not known, or not installed. {near(settings.report_to, loggers)}"
        )
    if config is not None and settings.budget is not None:
        raise ConfigError(
            f"budget={settings.budget} chooses the ranks of the adapter that the settings describe, and config "
            "describes another. Leave the budget out; lotr.largest_rank finds a rank for a configuration."
        )
    check_apart(settings, config)
    if not settings.resume and is_main_process():  # the others would find what the main process made
        check_output(Path(str(settings.output)), settings.overwrite)
    return settings


def prepare(settings: TrainSettings, say: Callable[[str], None], given: PeftConfig | None) -> Run:
    """Load and encode what the run needs; `given` is a configuration instead of the one of the settings."""
    config: Any = given or adapter_config(settings)
    name, folder = str(settings.model), Path(str(settings.output))
    tokenizer = load_tokenizer(name)
    columns = Columns(settings.text, settings.text2, settings.label)
    data = load_task(str(settings.train), settings.eval, columns, settings.task, seed=settings.seed)  # type: ignore[arg-type]
    say(f"Task: {data.task}. {data.reason}")
    say(f"Data: {len(data.train)} rows to train on, {len(data.eval)} to evaluate on.")

    if given is None:
        settings = complete(settings, config, data.task)
    set_seed(settings.seed)
    base, new = load_with_new(name, data.task, data.labels, settings.dtype, tokenizer)
    # PEFT trains and saves the head by itself
    own = {*(config.modules_to_save or ()), *(path for path in new if not set(path.split(".")) & set(NAMES))}
    config.modules_to_save = sorted(own) or None
    of_base = fingerprint(base, (*NAMES, *own))
    length = text_length(base, name, settings.max_length)
    settings = replace(settings, max_length=length)
    checkpoint = last_whole(folder / CHECKPOINTS) if settings.resume else None
    chosen = fit_rank(settings, config, base, checkpoint) if settings.budget is not None else ""
    model = add_adapter(base, config)
    if settings.gradient_checkpointing:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    trained, total = model.get_nb_trainable_parameters()
    share = 100 * trained / total
    say(chosen or f"Method: {settings.method}, {trained:,} trained numbers ({share:.2f} % of the model).")

    task = TaskRecord(
        task=data.task,
        labels=tuple(data.labels),
        max_length=length,
        columns=columns,
        base_model=locate(name)[1],
        pairs=data.pairs,
        method=settings.method,
        dtype=settings.dtype,
        base_fingerprint=of_base,
    )
    train, eval = (
        encode(part, tokenizer, data.task, data.labels, length) for part in (data.train, data.eval)
    )
    an_epoch = math.ceil(len(train) / (settings.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    return Run(
        settings,
        folder,
        checkpoint,
        model,
        rates_of(settings, config),
        task,
        (train, eval),
        data.eval_source,
        collator(tokenizer, data.task),
        settings.max_steps or math.ceil(an_epoch * settings.epochs),
    )


def begin(run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    """Warm up a new head, then start the factors, as the settings have it.

    Every process sees the same batches, so all do the same. A new head trains alone for as many steps as asked, else
    for a fifth of all and at most 20; a head without an adapter has nothing to go before.

    Returns:
        What was done, for the report of the run.
    """
    settings, model = run.settings, run.model
    steps = settings.head_warmup
    if steps is None:
        is_first = run.task.task != "causal-lm" and settings.method != "head"
        steps = min(20, run.steps // 5) if is_first else 0
    done: dict[str, Any] = {"head_warmup": steps}
    batches = _batches(run)
    if steps:
        warm_head(model, batches, steps, run.rates.head_lr)
        say(f"Head: warmed up for {steps} steps.")
    if settings.init in ("gradient", "first_step"):
        from ..tuner.data_init import init_from_data

        count = settings.start_batches or 8
        init_from_data(model, [next(batches) for _ in range(count)], seed=settings.seed)
        done |= {"init": settings.init, "start_batches": count}
        stay = model.active_peft_config.trainable == "cores"
        why = ", because they stay as they start (--init orthonormal keeps them random)" if stay else ""
        say(f"Start: the factors turned towards the gradients of {count} batches{why}.")
    return done


def warm_head(model: PeftModel, batches: Iterator[Any], steps: int, lr: float) -> None:
    """Train the modules that are saved in full, and nothing else, for some steps.

    Cold, the gradients that reach the adapter are those of a random head.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter = [p for name, p in trained if _HEAD not in name]
    optimizer = torch.optim.AdamW([p for name, p in trained if _HEAD in name], lr=lr, weight_decay=0.0)
    training = model.training
    model.train()
    try:
        for parameter in adapter:
            parameter.requires_grad_(False)
        for _ in tqdm(range(steps), desc="Head", unit=" steps", delay=2, leave=False, disable=None):
            loss = model(**next(batches)).loss
            if not torch.isfinite(loss):
                raise TrainingError("The loss is not finite while the head warms up. Lower head_lr.")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.train(training)
        for parameter in adapter:
            parameter.requires_grad_(True)


def _batches(run: Run) -> Iterator[Any]:
    """Yield batches without end, in an order that depends on the seed alone."""
    order = torch.Generator().manual_seed(run.settings.seed)
    size = run.settings.batch_size
    loader = DataLoader(run.rows[0], size, shuffle=True, collate_fn=run.collate, generator=order)
    while True:
        for batch in loader:
            yield {name: value.to(run.model.device) for name, value in batch.items()}
