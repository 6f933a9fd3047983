"""transformers' Trainer with whole checkpoints, a stop on NaN, and a ctrl-C that loses nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import TrainingError
from ..files.adapter_folder import write_adapter
from ..files.atomic import whole_folder, write_json
from . import checkpoint as disk


class EpochSampler(Sampler[int]):
    """Rows of about the same length together, in an order drawn from the seed and the number of the epoch alone.

    transformers draws it from the process's random numbers. Then a run that goes on inside an epoch would see other
    rows than one that never stopped, and processes whose dropout differs would see rows twice.

    Args:
        grouped: What transformers would have used.
        seed: Seed of the order.
        epoch: Tells the number of the epoch that begins.
    """

    def __init__(self, grouped: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.grouped, self.seed, self.epoch = grouped, seed, epoch

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(
            get_length_grouped_indices(self.grouped.lengths, self.grouped.batch_size, generator=drawn)
        )


class AdapterTrainer(Trainer):
    """Trains the adapter of a PEFT model.

    A checkpoint holds the adapter and the state of the run in safetensors and JSON, and is renamed into
    place when it is whole.
    """

    #: Gives what a checkpoint shall hold beside that, to go on with the record of the run.
    progress: Callable[[], dict[str, Any]] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return EpochSampler(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one step.

        Raises:
            TrainingError: The loss is NaN or infinite.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            raise TrainingError(self._diverged(f"The loss is {loss.item()}", self.state.global_step + 1))
        return loss

    def _diverged(self, what: str, step: int) -> str:
        last = disk.last_whole(Path(str(self.args.output_dir)))
        kept = f"The last good checkpoint is {last}." if last else "No checkpoint was written before."
        return f"{what} at step {step}. {kept} Lower the learning rates, or look for bad rows in the data."

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unwrapped = self.accelerator.unwrap_model(self.model)
        trained = [p for p in unwrapped.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(p).all()) for p in trained):
            raise TrainingError(self._diverged("A trained number is not finite", self.state.global_step))
        if self.args.should_save:
            with whole_folder(folder, overwrite=True) as made:
                write_adapter(unwrapped, made)
                disk.write_state(made, self.optimizer, self.lr_scheduler)
                self.state.save_to_json(str(made / disk.TRAINER_STATE))
                if self.progress is not None:
                    write_json(made / disk.PROGRESS, self.progress())
            self._forget_old(folder.parent)
        self.accelerator.wait_for_everyone()
        if self.args.process_index:
            disk.write_state(folder, self.optimizer, self.lr_scheduler, self.args.process_index)

    def _forget_old(self, folder: Path) -> None:
        keep = self.args.save_total_limit or 0
        numbered = sorted(
            folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda p: int(p.name.rpartition("-")[2])
        )
        for path in numbered[: -keep or None] if keep else []:
            shutil.rmtree(path, ignore_errors=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            disk.read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            disk.read_random(Path(checkpoint), self.args.process_index)


class StopOnRequest(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and the end."""
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def finish_on_interrupt(stop: StopOnRequest, say: Any) -> Iterator[None]:
    """Turn the first ctrl-C into a request to stop; a second one stops at once.

    Args:
        stop: What is asked to stop.
        say: Called with one line for the user.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        say("Stopping after this step, with a checkpoint. Press ctrl-C again to stop at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
