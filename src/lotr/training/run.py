"""One training run: settings in; adapter, metrics, curve and model card out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, Interrupted
from ..files.adapter_folder import fingerprint, read_adapter
from . import adapter as adapt
from . import budget, metrics, resume
from .base_model import check_dtype, load_model, load_tokenizer, locate, text_length
from .data import Columns, collator, encode, load_task
from .output_folder import begun_folder, check_apart, check_output
from .parsing import check_logger, check_positive
from .rates import parameter_groups
from .report import CHECKPOINTS, Run, summarise, write
from .trained import device
from .trainer import AdapterTrainer, StopOnRequest, finish_on_interrupt, is_main_process
from .warmup import begin

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import TrainerCallback

    from lotr_cli.settings import TrainSettings


def train(
    settings: TrainSettings,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
    config: PeftConfig | None = None,
) -> dict[str, Any]:
    """Fine-tune a model and write the adapter with its reports.

    Args:
        settings: What to train on what; see `TrainSettings`.
        say: Called with lines for the user.
        callbacks: More callbacks for the Trainer, for example a progress bar.
        config: Configuration of any PEFT method, instead of the one that the settings describe.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: A setting has no meaning, alone or with this model.
        DataError: The data cannot be used.
        CheckpointError: The output folder is not free, or there is nothing whole to go on from.
        TrainingError: The loss is not finite.
        Interrupted: The user stopped the run.
    """
    if not is_main_process():
        say = _nothing
    folder = _claim(settings, config)
    checkpoint = resume.checkpoint(folder) if settings.resume else None
    run = _prepare(settings, folder, say, config, checkpoint)
    rows = _encoded(run)
    main = is_main_process()
    with begun_folder(folder, settings.record(), settings.resume, say) if main else nullcontext():
        return _trained(run, rows, callbacks, say, checkpoint)


def _trained(
    run: Run,
    rows: list[Dataset],
    callbacks: Sequence[TrainerCallback],
    say: Callable[[str], None],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Begin or go on, train to the end, measure, and write what the run leaves behind."""
    if checkpoint is None:
        run.model.to(device())
        collate = collator(run.tokenizer, run.data.task)
        run.begun = _begin(run, rows, collate, say)
    else:
        run.begun, run.seconds = resume.progress(checkpoint)
    stop = StopOnRequest()
    trainer = _trainer(run, rows, [*callbacks, stop])
    started, before = time.perf_counter(), run.seconds

    def progress() -> dict[str, Any]:
        run.seconds = before + time.perf_counter() - started
        return {"begun": run.begun, "seconds": run.seconds}

    trainer.progress = progress
    with finish_on_interrupt(stop, say):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}. Go on with: "
                f"lotr train --resume --output {run.folder}"
            )
        scores = _measured(trainer) or trainer.evaluate()
    report = summarise(run, trainer, scores, progress()["seconds"])
    if is_main_process():
        write(run, report, trainer.state.log_history)
    return report


def _measured(trainer: AdapterTrainer) -> dict[str, float] | None:
    """Return the scores of the last step when the loop has just measured them."""
    step = trainer.state.global_step
    return next(
        (log for log in reversed(trainer.state.log_history) if "eval_loss" in log and log["step"] == step),
        None,
    )


def _nothing(line: str) -> None:
    """Say nothing."""


def _claim(settings: TrainSettings, config: PeftConfig | None) -> Path:
    """Check what costs nothing to check, and return the output folder."""
    if settings.model is None and settings.basis is not None:
        settings.model = read_adapter(settings.basis).config.get("base_model_name_or_path")
    for name in ("model", "train", "output"):
        if getattr(settings, name) is None:
            raise ConfigError(f"--{name} is missing. `lotr train --help` shows examples.")
    check_positive(settings, "epochs", "batch_size", "max_length", "max_steps", "eval_steps", "start_batches")
    for name, most in (
        ("warmup", 1.0),
        ("weight_decay", math.inf),
        ("seed", 2**32 - 1),
        ("head_warmup", math.inf),
    ):
        if getattr(settings, name) is not None and not 0 <= getattr(settings, name) <= most:
            raise ConfigError(
                f"{name}={getattr(settings, name)} is out of range. Use a number from 0 to {most}."
            )
    check_dtype(settings.dtype)
    check_logger(settings.report_to)
    folder = Path(str(settings.output))
    check_apart(folder, settings, config)
    if not settings.resume and is_main_process():  # the others would find what the main process made
        check_output(folder, settings.overwrite)
    return folder


def _prepare(
    settings: TrainSettings,
    folder: Path,
    say: Callable[[str], None],
    config: PeftConfig | None,
    checkpoint: Path | None,
) -> Run:
    from transformers import set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    adapt.rates(settings)
    if config is not None and settings.budget is not None:
        raise ConfigError(
            f"budget={settings.budget} chooses the ranks of the adapter that the settings describe, and config "
            "describes another. Leave the budget out; lotr.largest_rank finds a rank for a configuration."
        )
    if config is None:  # before any data is read; again below, once the task is known
        adapt.adapter_config(settings, settings.task or "classification")
    tokenizer = load_tokenizer(str(settings.model))
    columns = Columns(settings.text, settings.text2, settings.label)
    data = load_task(str(settings.train), settings.eval, columns, settings.task, seed=settings.seed)  # type: ignore[arg-type]
    say(f"Task: {data.task}. {data.reason}")
    say(f"Data: {len(data.train)} rows to train on, {len(data.eval)} to evaluate on.")
    if config is None:
        config = adapt.adapter_config(settings, data.task)
        adapt.choose_start(settings, config, data.task)
    set_seed(settings.seed)
    base = load_model(str(settings.model), data.task, data.labels, settings.dtype, tokenizer)
    settings.max_length = text_length(base, str(settings.model), settings.max_length)
    if settings.budget is not None:
        say(budget.fit(settings, config, base, checkpoint))  # type: ignore[arg-type]
    model = adapt.add_adapter(base, config)
    if settings.gradient_checkpointing:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    _, name = locate(str(settings.model))
    adapted: Any = model.base_model
    record = {
        "task": data.task,
        "labels": list(data.labels),
        "max_length": settings.max_length,
        "pairs": data.task != "causal-lm" and columns.text2 in data.train.column_names,
        "columns": {"text": columns.text, "text2": columns.text2, "label": columns.label},
        "method": settings.method,
        "dtype": settings.dtype,
        "base_model": name,
        "base_fingerprint": fingerprint(base, sorted(adapted.targeted_module_names)),
    }
    trained, total = model.get_nb_trainable_parameters()
    if settings.budget is None:
        say(
            f"Method: {settings.method}, {trained:,} trained numbers ({100 * trained / total:.2f} % of the model)."
        )
    return Run(settings, folder, data, model, tokenizer, record)


def _encoded(run: Run) -> list[Dataset]:
    """Return the rows to train on and to evaluate on, as the model takes them."""
    s, data = run.settings, run.data
    columns = Columns(s.text, s.text2, s.label)
    return [
        encode(part, run.tokenizer, data.task, columns, data.labels, run.task_record["max_length"])
        for part in (data.train, data.eval)
    ]


def _steps(settings: TrainSettings, rows: list[Dataset]) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    an_epoch = math.ceil(len(rows[0]) / (settings.batch_size * world))
    return settings.max_steps or math.ceil(an_epoch * settings.epochs)


def _begin(
    run: Run, rows: list[Dataset], collate: Callable[[list[Any]], Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Do what goes before the first step, as far as the length of the run makes it worth."""
    settings, steps = run.settings, _steps(run.settings, rows)
    head = adapt.head_warmup(settings, run.data.task, steps), adapt.rates(settings).head_lr
    return begin(settings, run.model, rows[0], collate, head, adapt.start_batches(settings, steps), say)


def _trainer(run: Run, rows: list[Dataset], callbacks: list[TrainerCallback]) -> AdapterTrainer:
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    s, data = run.settings, run.data
    steps = _steps(s, rows)
    every = s.eval_steps or max(1, math.ceil(steps / 5))
    rates = adapt.rates(s)
    args = TrainingArguments(
        output_dir=str(run.folder / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=2 * s.batch_size,
        learning_rate=rates.lr,
        warmup_steps=math.ceil(steps * s.warmup),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, steps // 50),
        use_cpu=device().type == "cpu",  # without it, processes on a CPU do not know of each other
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=data.task == "causal-lm",
        # a mean over tokens needs the tokens of all processes; a mean over rows is a mean already, and would be
        # multiplied by the number of processes
        average_tokens_across_devices=data.task == "causal-lm",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=s.report_to,
        seed=s.seed,
        disable_tqdm=True,
    )
    groups = parameter_groups(run.model, **vars(rates))
    trainer = AdapterTrainer(
        model=run.model,
        args=args,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        data_collator=collator(run.tokenizer, data.task),
        compute_metrics=metrics.for_trainer(data.task),
        optimizers=(torch.optim.AdamW(groups, weight_decay=s.weight_decay), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
