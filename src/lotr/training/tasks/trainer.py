"""transformers' Trainer for many tasks at once: batches mixed from all of them, checkpoints into the bank."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler

from ...bank import Task
from ...bank.heads import row_losses
from ...errors import CheckpointError, ConfigError, TrainingError
from ...files.adapter_folder import opened, read_tensors
from ...tuner.checks import one_of
from ..checkpoint import AdapterTrainer, arguments
from ..rates import default_rates
from .served import Served
from .settings import BankSettings
from .task_list import together

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

TASKS = "tasks.safetensors"
BASIS = "basis_hash"  # beside its numbers
_MAX_NORM = 1.0  # of a task's gradient


class TaskTrainer(AdapterTrainer):
    """Trains the tasks of a bank on a model that `CoreBank.wrap` made.

    The loss of a batch is the sum over its tasks of the mean over the task's rows, so that a task's gradient does not
    depend on which others are in the batch. A checkpoint has the numbers of all tasks in float32; once it is written,
    the bank holds the tasks as they are then, too, in one transaction.
    """

    def __init__(
        self,
        settings: BankSettings,
        served: Served,
        rows: Sequence[Dataset],  # encoded, of each task
        tasks: Sequence[Task],  # as they begin, in the order of the rows
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        sizes, batch = [len(part) for part in rows], settings.batch_size
        steps = settings.max_steps or math.ceil(sum(sizes) * settings.epochs / batch)
        temperature = temperature_of(settings.sampling, settings.temperature)
        self.served, self.tasks = served, tasks
        self.sampler = TaskSampler(sizes, steps * batch, temperature, settings.seed)
        self._in_batch: Counter[str] = Counter()  # rows of each task
        own = {"eval_strategy": "no", "save_total_limit": 1, "report_to": "none"}
        super().__init__(
            model=served.model,
            # clipped task by task, in the optimiser
            args=arguments(served.bank.path, steps, settings.save_steps, settings, max_grad_norm=0.0, **own),
            train_dataset=together(rows),
            data_collator=served.collator(),
            optimizers=(_optimizer(settings, served), None),
            callbacks=list(callbacks),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one step; returns the mean loss of the tasks in the batch. The gradient is clipped task by task."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = super().training_step(model, inputs, *args, **kwargs)
        for name in self._in_batch:
            nn.utils.clip_grad_norm_(self.served.rows.cache.training[name].parameters, _MAX_NORM)
        return loss / len(self._in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch; that of a task which is not finite is a TrainingError that names it."""
        inputs = dict(inputs)
        names = [self.tasks[n].name for n in inputs.pop("task").tolist()]
        labels = inputs.pop("labels")
        with self.served.rows.select(names):
            logits = model(**inputs).logits
            causal = labels.dim() == 2
            losses = (
                row_losses(logits[:, :-1], labels[:, 1:])
                if causal
                else self.served.rows.losses(logits, labels)
            )
        bad = {name for name, loss in zip(names, losses.tolist(), strict=True) if not math.isfinite(loss)}
        if bad:
            what = f"The loss of task {', '.join(map(repr, sorted(bad)[:5]))} is not finite"
            raise TrainingError(self._diverged(what, self.state.global_step + 1))
        rows = self._in_batch = Counter(names)
        return (losses / torch.tensor([rows[name] for name in names], device=losses.device)).sum()

    def write(self, folder: Path) -> None:
        """Write the numbers of all tasks, and bring the bank there."""
        numbers = {name: p.detach().cpu() for name, p in self.served.tensors().items()}
        save_file(numbers, folder / TASKS, {BASIS: self.served.bank.description.basis_hash})
        # killed before the rest is written, the bank is a step ahead until the run that goes on comes here again
        self.served.bank.add_many(map(self.served.in_memory, self.tasks), replace=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / TASKS
        saved = read_tensors(file)
        with opened(file) as content:
            basis = (content.metadata() or {}).get(BASIS)
        if basis != self.served.bank.description.basis_hash:
            raise CheckpointError(
                f"{file} was trained on other factors than the bank has now, which was replaced. Drop the run with "
                "--replace."
            )
        for name, parameter in self.served.tensors().items():
            if name not in saved or saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{file} has other tasks or labels than the data now. Restore the data, or drop the run with "
                    "--replace."
                )
            parameter.data.copy_(saved[name])


def _optimizer(settings: BankSettings, served: Served) -> torch.optim.Optimizer:
    """Return AdamW, which leaves a task alone that has no row in the batch: neither it nor its moments change."""
    rates = default_rates(served.bank.config, decoder=False)  # cores alone take the same everywhere
    lr = {"cores": settings.core_lr or rates["core_lr"], "heads": settings.head_lr or rates["head_lr"]}
    params: dict[str, list[Tensor]] = {"cores": [], "heads": []}
    for name, parameter in served.tensors().items():
        params["cores" if name.endswith(".numbers") else "heads"].append(parameter)
    groups = [{"params": own, "lr": lr[name], "name": name} for name, own in params.items() if own]
    betas = 0.9, settings.adam_beta2
    return torch.optim.AdamW(groups, betas=betas, weight_decay=settings.weight_decay)


def temperature_of(sampling: str, temperature: float) -> float:
    """Return the temperature of a way to sample; raise ConfigError if there is no such way or temperature."""
    temperatures = {"proportional": 1.0, "uniform": math.inf, "temperature": temperature}
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} is out of range. Use 1 (proportional) or more.")
    return temperatures[one_of("sampling", sampling, temperatures)]


class TaskSampler(Sampler[int]):
    """Draws rows of many tasks: task `t` with its `n_t` rows takes a share `n_t^(1/T) / Σ n^(1/T)`.

    T = 1 is proportional to size, T = ∞ uniform over tasks. Shares are kept exactly, round after round, and a task's
    rows come in a new order each time all of them have been seen.

    Args:
        sizes: Rows of each task; the rows of a task stand one behind the other.
        total: Rows to draw.
        temperature: `T`.
        seed: Seed of the order.

    Source: https://arxiv.org/abs/1907.05019

    Example:
        >>> rows = list(TaskSampler([9, 1], total=20, temperature=math.inf))
        >>> rows.count(9)
        10
    """

    def __init__(self, sizes: Sequence[int], total: int, temperature: float = 1.0, seed: int = 0) -> None:
        self.sizes, self.total, self.seed = np.asarray(sizes), total, seed
        weights = self.sizes ** (0.0 if math.isinf(temperature) else 1.0 / temperature)
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        starts = np.cumsum(self.sizes) - self.sizes
        orders = [self._endless(task) for task in range(len(self.sizes))]
        drawn = np.zeros(len(self.sizes), dtype=np.int64)
        for n in range(-(-self.total // self.sizes.sum())):
            upto = np.floor(self.shares * self.sizes.sum() * (n + 1) + 1e-9).astype(np.int64)
            rows = [
                start + row
                for start, order, count in zip(starts.tolist(), orders, (upto - drawn).tolist(), strict=True)
                for row in itertools.islice(order, count)
            ]
            drawn = upto
            np.random.default_rng([self.seed, n]).shuffle(rows)
            yield from rows[: self.total - n * self.sizes.sum()]

    def _endless(self, task: int) -> Iterator[int]:
        """Yield the rows of a task in one order after another, which depend on the seed and the task alone."""
        for n in itertools.count():
            yield from np.random.default_rng([self.seed, task, n]).permutation(self.sizes[task]).tolist()
