"""All before the first step of a run: its settings, model and rows; a new head warms up, factors turn towards data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler, set_seed
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..bank.heads import NAMES
from ..errors import ConfigError, TrainingError
from ..files.adapter_folder import read_adapter
from ..files.fingerprint import fingerprint
from ..tuner.checks import one_of
from .adapter import adapter_config, add_adapter, check_numbers, complete, fit_rank
from .base_model import (
    check_dtype,
    halves_are_slow,
    load_tokenizer,
    load_with_new,
    locate,
    text_length,
)
from .checkpoint import last_whole
from .data import Columns, TaskData, collator, load_task
from .data.conversations import IGNORED
from .data.encode import packed
from .given_config import described, resolved
from .output import check_hub, check_output
from .process import is_main_process, n_processes
from .rates import parameter_groups, rates_of
from .settings import with_usual
from .trained import CHECKPOINTS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .settings import TrainSettings

#: A batch, and its share of the loss of a step.
Microbatch = tuple[float, dict[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """What is known before the first step."""

    settings: TrainSettings  # with what was left open decided
    folder: Path
    checkpoint: Path | None  # to go on from
    model: PeftModel
    rates: dict[str, float]
    data: TaskData  # encoded
    collate: Callable[[list[Any]], Any]
    steps: int


def check(settings: TrainSettings, config: PeftConfig | None) -> TrainSettings:
    """Check what costs nothing to check; return the settings with their base model."""
    basis = settings.basis or getattr(config, "basis", None)
    if settings.model is None and basis is not None:
        base = read_adapter(basis).config.get("base_model_name_or_path")
        settings = replace(settings, model=base)
    if config is not None:
        settings = described(settings, config)
    elif basis is None:
        settings = with_usual(settings)
    for name in ("model", "train", "output"):
        if getattr(settings, name) is None:
            raise ConfigError(f"--{name} is missing. `lotr train --help` shows examples.")
    check_numbers(settings)
    check_dtype(settings.dtype, settings.load_in)
    _check_logger(settings.report_to)
    _check_scheduler(settings.scheduler)
    if settings.push_to_hub is not None and is_main_process():
        check_hub(settings.push_to_hub)
    check_output(settings, config, is_main_process())
    return settings


def _check_logger(name: str) -> None:
    """Refuse a logger that transformers does not know, or that is not installed."""
    one_of("report_to", name, ["none", "all", *INTEGRATION_TO_CALLBACK])
    if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
        package = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}.get(name, name)
        raise ConfigError(f"report_to={name!r} needs a package that is not installed: pip install {package}")


def _check_scheduler(name: str) -> None:
    """Refuse a schedule that transformers cannot make from its name alone."""
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)]), num_warmup_steps=1, num_training_steps=2)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler={name!r} cannot be made from its name alone: {error}. Use linear or cosine."
        ) from None


def prepare(settings: TrainSettings, say: Callable[[str], None], given: PeftConfig | None) -> Run:
    """Load and encode what the run needs; `given` is a configuration instead of the one of the settings."""
    config: Any = adapter_config(settings) if given is None else resolved(given)
    name, folder = str(settings.model), Path(str(settings.output))
    tokenizer = load_tokenizer(name)
    columns = Columns(settings.text, settings.text2, settings.label)
    data = load_task(str(settings.train), settings.eval, columns, settings.task, seed=settings.seed)  # type: ignore[arg-type]
    kind = data.task.task
    say(f"Task: {kind}. {data.reason}")
    say(f"Data: {len(data.train)} rows to train on, {len(data.eval)} to evaluate on.")

    settings = complete(settings, config, kind)
    set_seed(settings.seed)
    base, new = load_with_new(name, kind, data.task.labels, settings.dtype, tokenizer, settings.load_in)
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
        # the other kind knows no `backward(inputs=…)`, by which a head warms up
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trained, total = model.get_nb_trainable_parameters()
    share = 100 * trained / total
    say(chosen or f"Method: {settings.method}, {trained:,} trained numbers ({share:.2f} % of the model).")
    if settings.dtype != "float32" and halves_are_slow():
        say(f"This processor takes several times as long with {settings.dtype} as with float32.")
    rates = rates_of(settings, model)
    parts = [f"{part['name']} {part['lr']:g}" for part in parameter_groups(model, **rates)]
    say(f"Rates: {', '.join(parts)}.")  # of what trains: one that was named may be of a part that does not

    data = data.encoded(
        tokenizer,
        max_length=length,
        base_model=locate(name)[1],
        method=settings.method,
        dtype=settings.dtype,
        load_in=settings.load_in,
        base_fingerprint=of_base,
    )
    collate = collator(tokenizer, kind)
    if settings.packing:
        collate = packed(base, kind, collate, data.train)
    return Run(
        settings,
        folder,
        checkpoint,
        model,
        rates,
        data,
        collate,
        settings.max_steps or math.ceil(math.ceil(len(data.train) / rows_a_step(settings)) * settings.epochs),
    )


def rows_a_step(settings: TrainSettings) -> int:
    """Return how many rows one step takes, over all processes and forward passes."""
    return settings.batch_size * settings.gradient_accumulation_steps * n_processes()


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
        is_first = run.data.task.task != "causal-lm" and settings.method != "head"
        steps = min(20, run.steps // 5) if is_first else 0
    done: dict[str, Any] = {"head_warmup": steps}
    data = _steps(run)
    if steps:
        warm_head(model, data, steps, run.rates["head_lr"])
        say(f"Head: warmed up for {steps} steps.")
    if settings.init in ("gradient", "first_step"):
        from ..tuner.data_init import init_from_data

        count = settings.start_batches or 8
        batches = [batch for _ in range(count) for batch in next(data)]
        init_from_data(model, batches, loss=_share_of_loss, seed=settings.seed)
        done |= {"init": settings.init, "start_batches": count}
        stay = model.active_peft_config.trainable == "cores"
        why = ", because they stay as they start (--init orthonormal keeps them random)" if stay else ""
        say(f"Start: the factors turned towards the gradients of {count} batches{why}.")
    return done


def warm_head(model: PeftModel, data: Iterator[list[Microbatch]], steps: int, lr: float) -> None:
    """Train the modules that are saved in full, and nothing else, for some steps; `data` has the parts of each.

    Cold, the gradients that reach the adapter are those of a random head.
    """
    (head,) = (part["params"] for part in parameter_groups(model, lr) if part["name"] == "head")
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=0.0)
    training = model.training
    model.train()
    for _ in tqdm(range(steps), desc="Head", unit=" steps", delay=2, leave=False, disable=None):
        for part in next(data):
            loss = _share_of_loss(model, part)
            if not torch.isfinite(loss):
                raise TrainingError("The loss is not finite while the head warms up. Lower head_lr.")
            loss.backward(inputs=head)
        optimizer.step()
        optimizer.zero_grad()
    model.train(training)


def _share_of_loss(model: nn.Module, part: Microbatch) -> Tensor:
    share, batch = part
    return share * model(**batch).loss


def _steps(run: Run) -> Iterator[list[Microbatch]]:
    """Yield the rows of one step after another, without end, in an order that depends on the seed alone.

    A step has the rows that all processes and forward passes take in a step of the run, in parts that fit a device.
    """
    order = torch.Generator().manual_seed(run.settings.seed)
    step, size = rows_a_step(run.settings), run.settings.batch_size
    loader = DataLoader(run.data.train, step, shuffle=True, collate_fn=list, generator=order)
    while True:
        for rows in loader:
            parts = [run.collate(rows[first : first + size]) for first in range(0, len(rows), size)]
            taught = [_taught(part["labels"]) for part in parts]
            yield [
                (n / sum(taught), {name: value.to(run.model.device) for name, value in part.items()})
                for n, part in zip(taught, parts, strict=True)
            ]


def _taught(labels: Tensor) -> int:
    """Return over how many rows, or tokens of a language model, the loss is a mean."""
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else len(labels)
