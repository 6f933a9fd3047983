"""Many tasks trained at once into a bank: settings in, tasks with their scores out."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from ...bank import CoreBank, Task
from ...errors import Interrupted
from ...files.atomic import write_json
from ..base_model import load_tokenizer, locate, skeleton, text_length
from ..process import StopOnRequest, finish_on_interrupt
from ..rates import default_rates
from ..report import SETTINGS, versions
from .bank import RUN, bank_of, base_of_basis, check, resumed
from .predict import scores_of_tasks
from .row_adam import RowAdam
from .sampler import TaskSampler, temperature_of
from .served import Served, base_of, load_served
from .task_list import Prepared, TaskSource, prepare, together
from .trainer import TaskTrainer
from .window import Window

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lotr_cli.bank_settings import BankSettings

#: The file of an unfinished run, beside its settings.
STATE = "window.sqlite"


def train_bank(
    settings: BankSettings, say: Callable[[str], None] = print, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Train tasks at once on a basis that stays as it is, and keep them in a bank.

    At every checkpoint the bank holds all tasks as they are then, in one transaction; a run that was stopped or killed
    goes on from there with `resume`.

    Args:
        settings: What to train on what; see `BankSettings`.
        say: Called with lines for the user.
        callbacks: More callbacks for the Trainer, for example a progress bar.

    Returns:
        The scores of every task, as the bank holds it, with counts and cost.

    Raises:
        ConfigError: A setting has no meaning, a task exists already, or there is no run to go on with.
        DataError: The data of a task cannot be used.
        CheckpointError: The bank or the base model is not the right one.
        TrainingError: The loss of a task is not finite.
        Interrupted: The user stopped the run.
    """
    check(settings)
    path = Path(str(settings.output))
    settings = resumed(settings, path) if settings.resume else settings
    bank = bank_of(settings, path)
    name = base_of(bank, settings.model) if bank is not None else base_of_basis(settings)
    sources = [TaskSource(**said) for said in settings.tasks]
    settings.max_length = text_length(skeleton(name)[0], name, settings.max_length)
    prepared = prepare(sources, load_tokenizer(name), settings.max_length, settings.seed)
    if bank is None:  # only now: data that cannot be used leaves no bank behind
        bank = CoreBank.create(path, str(settings.basis), dtype=settings.keep)
    if not settings.resume:
        shutil.rmtree(path / RUN, ignore_errors=True)
    with bank:
        return _run(settings, bank, name, prepared, say, callbacks)


def _run(
    settings: BankSettings,
    bank: CoreBank,
    base: str,
    prepared: Sequence[Prepared],
    say: Callable[[str], None],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    served = load_served(bank, base, prepared[0].data.task, settings.capacity, settings.dtype)
    rows = sum(len(p.train) for p in prepared)
    say(
        f"Tasks: {len(prepared)}, with {rows} rows to train on; {bank.layout.size:,} numbers each, beside a head."
    )
    folder = bank.path / RUN
    folder.mkdir(exist_ok=True)
    write_json(folder / SETTINGS, settings.record())
    window, stop = Window(folder / STATE, _beginner(served, prepared, settings)), StopOnRequest()
    started = time.perf_counter()
    try:
        trainer = _trainer(settings, served, prepared, window, [*callbacks, stop])
        with finish_on_interrupt(stop, say):
            trainer.train(resume_from_checkpoint=trainer.resume())
        step, steps = trainer.state.global_step, trainer.state.max_steps
        if stop.requested and step < steps:
            raise Interrupted(
                f"Stopped at step {step} of {steps}. Go on with: lotr bank train --resume --output {bank.path}"
            )
    finally:
        window.close()
    return _finish(settings, served, prepared, time.perf_counter() - started, step)


def _beginner(served: Served, prepared: Sequence[Prepared], settings: BankSettings) -> Callable[[str], Task]:
    """Return what makes the task of a name as it is before its first step."""
    by_name = {p.source.name: p for p in prepared}
    numbers, heads = served.fresh_numbers(), served.rows.slab.heads

    def begin(name: str) -> Task:
        p = by_name[name]
        labels = p.data.labels
        outputs = len(labels) or 1
        head = {} if heads is None else heads.fresh(outputs, crc32(f"{settings.seed} {name}".encode()))
        about = {
            "max_length": settings.max_length,
            "pairs": p.pairs,
            "columns": vars(p.source.columns),
            "dtype": settings.dtype,
            "rows": {"train": len(p.train), "eval": len(p.eval)},
        }
        return Task(name, numbers, head, labels, p.data.task, about)

    return begin


def _optimizer(settings: BankSettings, served: Served, outputs: int) -> RowAdam:
    """Return what steps the tasks in memory, once their heads have place for so many outputs."""
    slab = served.rows.slab
    if slab.heads is not None:
        slab.heads.widen(outputs)
    rates = default_rates(str(served.bank.config.core), "none", "cores")
    heads = [] if slab.heads is None else list(slab.heads.tables.values())
    groups = [
        {"params": [table.requires_grad_() for table in tables], "lr": lr, "name": name}
        for name, tables, lr in (
            ("cores", [slab.numbers], settings.core_lr or rates.core_lr),
            ("heads", heads, settings.head_lr or rates.head_lr),
        )
        if tables
    ]
    return RowAdam(groups, weight_decay=settings.weight_decay)


def _trainer(
    settings: BankSettings,
    served: Served,
    prepared: Sequence[Prepared],
    window: Window,
    callbacks: Sequence[TrainerCallback],
) -> TaskTrainer:
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

    set_seed(settings.seed)
    rows = together(prepared)
    steps = settings.max_steps or math.ceil(len(rows) * settings.epochs / settings.batch_size)
    every = settings.save_steps or max(1, math.ceil(steps / 5))
    optimizer = _optimizer(settings, served, max(len(p.data.labels) or 1 for p in prepared))
    window.attach(served.rows.slab, optimizer)
    args = TrainingArguments(
        output_dir=str(served.bank.path / RUN),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=math.ceil(steps * settings.warmup),
        max_grad_norm=0.0,  # clipped task by task, in the optimiser
        eval_strategy="no",
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, steps // 50),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=settings.seed,
        disable_tqdm=True,
    )
    temperature = temperature_of(settings.sampling, settings.temperature)
    sampler = TaskSampler(
        [len(p.train) for p in prepared], steps * settings.batch_size, temperature, settings.seed
    )
    trainer = TaskTrainer(
        model=served.model,
        args=args,
        train_dataset=rows,
        data_collator=served.collator(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
        bank=served.bank,
        window=window,
        names=[p.source.name for p in prepared],
        sampler=sampler,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _finish(
    settings: BankSettings, served: Served, prepared: Sequence[Prepared], seconds: float, steps: int
) -> dict[str, Any]:
    """Measure every task as the bank holds it, keep the scores with it, and forget the run."""
    served.rest()
    scores = scores_of_tasks(served, {p.source.name: p.eval for p in prepared})

    def with_scores() -> Iterator[Task]:
        for name, score in scores.items():
            task = served.bank.get(name)
            yield replace(task, metadata={**task.metadata, "scores": score})

    served.bank.add_many(with_scores(), replace=True)
    shutil.rmtree(served.bank.path / RUN, ignore_errors=True)
    _, model = locate(base_of(served.bank, settings.model))
    return {
        "bank": str(served.bank.path),
        "model": model,
        "tasks": {
            p.source.name: {
                "task": p.data.task,
                "labels": len(p.data.labels),
                **scores[p.source.name],
                "rows": {"train": len(p.train), "eval": len(p.eval)},
            }
            for p in prepared
        },
        "numbers_a_task": served.bank.layout.size,
        "bytes_a_task": served.bank.task_bytes,
        "steps": steps,
        "seconds": round(seconds, 2),
        "settings": settings.record(),
        "versions": versions(),
    }
