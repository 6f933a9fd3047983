"""One training run: settings in; adapter, metrics, curve and model card out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError, TrainingError
from ..files.atomic import locked, read_json
from . import metrics
from .checkpoint import TRAINER_STATE, AdapterTrainer, arguments
from .clip_updates import clip_updates
from .given_config import check_alone
from .output import RunReport, options_to_resume, started_run, upload, write
from .prepare import Run, begin, check, prepare
from .process import device, is_main_process, peak_memory
from .rates import parameter_groups
from .settings import TrainSettings, read_options
from .trained import CHECKPOINTS


def train(
    settings: TrainSettings | None = None,
    *,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
    config: PeftConfig | None = None,
    **options: Any,
) -> RunReport:
    """Fine-tune a model and write the adapter with its reports.

    Args:
        settings: What to train on what.
        say: Called with lines for the user.
        callbacks: More callbacks for the Trainer, for example a progress bar.
        config: Configuration of a PEFT method that trains weights, instead of the adapter that settings describe; a
            run that goes on has the one it began with.
        options: Settings by name, instead of `settings` or over them; see `TrainSettings`.

    Returns:
        Scores, counts and cost, which `metrics.json` holds too.

    Raises:
        ConfigError: A setting has no meaning, alone or with this model.
        DataError: The data cannot be used.
        CheckpointError: There is nothing whole to go on from.
        TrainingError: The loss is not finite.
        Interrupted: The user stopped the run.
    """
    named = read_options((settings.named() if settings is not None else {}) | options)
    if config is not None:
        if named.get("resume"):
            raise ConfigError(
                "A run that goes on has the configuration that it began with. Leave config out."
            )
        check_alone(config, named)
        named["configuration"] = type(config).__name__
    is_main, output = is_main_process(), named.get("output")
    say = say if is_main else lambda line: None
    with locked(Path(output)) if is_main and output is not None else nullcontext():
        if named.get("resume"):
            named = options_to_resume(named, TrainSettings)
            if named.get("configuration"):
                config = PeftConfig.from_pretrained(str(Path(named["output"]) / CHECKPOINTS))
        elif config is None and named.get("configuration"):
            raise ConfigError(
                f"The settings are of a run that was given a {named['configuration']}, and do not hold it. In Python: "
                "lotr.train(…, config=PeftConfig.from_pretrained(FOLDER)), with the folder of its adapter."
            )
        settings = check(TrainSettings(**named), config)
        run = prepare(settings, say, config)
        given = run.model.active_peft_config if config is not None and run.checkpoint is None else None
        with started_run(run.folder, run.settings, say, given) if is_main else nullcontext():
            report = _train(run, callbacks, say)
            if is_main:
                write(run.folder, run.model, report)
        if is_main and settings.push_to_hub is not None:
            say(f"Uploaded: {upload(run.folder, settings.push_to_hub)}")
    return report


class _Progress(TrainerCallback, ExportableState):
    """What the report tells of the run so far; the Trainer keeps it in every checkpoint."""

    def __init__(self, begun: dict[str, Any], seconds: float = 0.0, resumed_at: Sequence[int] = ()) -> None:
        self.begun, self.before, self.started = begun, seconds, time.perf_counter()
        self.resumed_at = list(resumed_at)

    @classmethod
    def of(cls, checkpoint: Path) -> _Progress:
        """Go on from a checkpoint."""
        state = read_json(checkpoint / TRAINER_STATE, "a checkpoint of a run")
        progress = cls(**state["stateful_callbacks"][cls.__name__]["attributes"])
        progress.resumed_at.append(state["global_step"])
        return progress

    @property
    def seconds(self) -> float:
        """Time that the run took, with what was before the checkpoint."""
        return self.before + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        attributes = {"begun": self.begun, "seconds": self.seconds, "resumed_at": self.resumed_at}
        return {"args": {}, "attributes": attributes}


def _train(run: Run, callbacks: Sequence[TrainerCallback], say: Callable[[str], None]) -> RunReport:
    """Begin or go on, train to the end, and measure."""
    if run.checkpoint is None:
        if run.settings.load_in is None:  # else it is where bitsandbytes put it
            run.model.to(device())
        progress = _Progress(begin(run, say))
    else:
        progress = _Progress.of(run.checkpoint)
    trainer = _trainer(run, [*callbacks, progress])
    scores = trainer.run(run.checkpoint, say, f"lotr train --resume --output {run.folder}")
    return _report(run, trainer, scores, progress)


def _trainer(run: Run, callbacks: list[TrainerCallback]) -> AdapterTrainer:
    s, causal = run.settings, run.data.task.task == "causal-lm"
    args = arguments(
        run.folder,
        run.steps,
        s.eval_steps,
        s,
        gradient_accumulation_steps=s.gradient_accumulation_steps,
        per_device_eval_batch_size=2 * s.batch_size,
        learning_rate=run.rates["lr"],
        lr_scheduler_type=s.scheduler,
        eval_strategy="steps",
        save_total_limit=2,
        use_cpu=device().type == "cpu",  # without it, processes on a CPU do not know of each other
        train_sampling_strategy="group_by_length",
        report_to=s.report_to,
    )
    groups, betas = parameter_groups(run.model, **run.rates), (0.9, s.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=s.weight_decay)
    if causal if s.clip_updates is None else s.clip_updates:
        clip_updates(optimizer)
    trainer = AdapterTrainer(
        model=run.model,
        args=args,
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        data_collator=run.collate,
        compute_metrics=metrics.for_trainer(run.data.task.task),
        preprocess_logits_for_metrics=metrics.token_losses if causal else None,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    # a mean over tokens needs the tokens of all processes and passes; a mean over rows is a mean already, and would be
    # multiplied by the number of both
    trainer.model_accepts_loss_kwargs = causal
    return trainer


def _report(run: Run, trainer: AdapterTrainer, scores: dict[str, float], progress: _Progress) -> RunReport:
    """Put the report together; a final score must be finite."""
    values = {
        name.removeprefix("eval_"): value
        for name, value in scores.items()
        if name.startswith("eval_") and not name.endswith(("second", "runtime"))
    }
    if run.data.task.task == "causal-lm":
        values["perplexity"] = metrics.perplexity(values["loss"])
    metric = metrics.MAIN[run.data.task.task]
    if not math.isfinite(values[metric]):
        raise TrainingError(f"The final {metric} is {values[metric]}. Lower the learning rates.")
    parts = parameter_groups(run.model, **run.rates)
    numbers = {part["name"]: sum(getattr(p, "ds_numel", p.numel()) for p in part["params"]) for part in parts}
    head, total = numbers.get("head", 0), sum(numbers.values())
    config: Any = run.model.active_peft_config
    return RunReport(
        metric=metric,
        eval=values,
        eval_source=run.data.eval_source,
        task=run.data.task,
        settings=run.settings,
        rates=run.rates,
        begun=progress.begun,
        trained_numbers={"adapter": total - head, "head": head, "total": total},
        rows=run.data.sizes,
        steps=trainer.state.global_step,
        processes=trainer.args.world_size,
        seconds=round(progress.seconds, 2),
        peak_memory_bytes=peak_memory(),
        rank=None if run.settings.budget is None else config.r,
        resumed_at=progress.resumed_at,
        # but for the Trainer's last line, which counts since the last start alone
        history=[log for log in trainer.state.log_history if "train_runtime" not in log],
    )
