"""transformers' Trainer with checkpoints in safetensors and JSON, byte-equal resume, and a stop on NaN.

A checkpoint is whole once `trainer_state.json` is, which the Trainer writes last; only then are older ones removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import sort_checkpoints

from ..errors import CheckpointError, Interrupted, TrainingError
from ..files.adapter_folder import opened, read_adapter, read_tensors, write_adapter
from .process import StopOnInterrupt
from .trained import CHECKPOINTS

OPTIMIZER, TRAINER_STATE = "optimizer.safetensors", "trainer_state.json"


def arguments(folder: Path, steps: int, every: int | None, settings: Any, **more: Any) -> TrainingArguments:
    """Return what every run tells transformers: its length, its checkpoints, and silence; `more` are its own."""
    every = every or max(1, math.ceil(steps / 5))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=math.ceil(steps * settings.warmup),
        seed=settings.seed,
        save_strategy="steps",
        save_steps=every,
        eval_steps=every,
        logging_steps=max(1, steps // 50),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **more,
    )
    args._n_gpu = min(args.n_gpu, 1)  # threads of DataParallel know neither shared factors nor tasks
    return args


class Draws(TrainerCallback):
    """Draws the random numbers of an epoch, and of a step, from the seed and its number alone.

    So a run that goes on draws what one that never stopped does, and a checkpoint holds no state of generators.
    """

    def __init__(self) -> None:
        self.order = torch.Generator()  # of the rows: the same in every process

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the order of an epoch's rows."""
        self.order.manual_seed(args.seed + int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin what dropout draws, in every process for itself."""
        words = np.random.SeedSequence([args.seed, state.global_step, args.process_index]).generate_state(1)
        torch.manual_seed(int(words[0]))


class AdapterTrainer(Trainer):
    """Trains the adapter of a PEFT model."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.draws = Draws()
        self.add_callback(self.draws)

    def run(self, checkpoint: Path | None, say: Callable[[str], None], go_on: str) -> dict[str, float]:
        """Train from the start, or from a checkpoint, to the end; return the last scores, where there are rows for it.

        Raises:
            Interrupted: The user stopped the run; the message tells the command to go on with.
        """
        stop = StopOnInterrupt(say)
        self.add_callback(stop)
        with stop:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            step, steps = self.state.global_step, self.state.max_steps
            if stop.requested and step < steps:
                raise Interrupted(f"Stopped at step {step} of {steps}. Go on with: {go_on}")
            if self.eval_dataset is None:
                return {}
            measured = [log for log in self.state.log_history if "eval_loss" in log and log["step"] == step]
            return measured[-1] if measured else self.evaluate()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size  # rows of one step, as one process would group them
            sampler.generator = self.draws.order
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        sampler = super()._get_eval_sampler(eval_dataset)
        # transformers 5.12 draws from each process's own random numbers
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(self.args.seed)
        return sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one step; a loss that is not finite is a TrainingError."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            raise TrainingError(self._diverged(f"The loss is {loss.item()}", self.state.global_step + 1))
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        """Keep checkpoints apart from what loggers write: they go when the run ends."""
        return str(Path(str(self.args.output_dir), CHECKPOINTS))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.state.compute_steps(self.args, self.args.max_steps)  # as told now: the state has those of before

    def _diverged(self, what: str, step: int) -> str:
        last = last_whole(Path(self._get_output_dir(None)))
        saved = f"The last good checkpoint is {last}." if last else "No checkpoint was written before."
        return f"{what} at step {step}. {saved} Lower the learning rates, or look for bad rows in the data."

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        numbers = self.accelerator.unwrap_model(self.model).parameters()
        if not all(bool(torch.isfinite(p).all()) for p in numbers if p.requires_grad):
            raise TrainingError(self._diverged("A trained number is not finite", self.state.global_step))
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE).unlink(missing_ok=True)  # of the same step, before it was gone back on
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write what is trained into the folder of a checkpoint."""
        write_adapter(self.accelerator.unwrap_model(self.model), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        optimizer, schedule = self.optimizer.state_dict(), self.lr_scheduler.state_dict()
        plain = {"param_groups": optimizer["param_groups"], "scheduler": schedule}
        moments = {
            f"{n}.{key}": tensor.detach().cpu().contiguous()
            for n, own in optimizer["state"].items()
            for key, tensor in own.items()
        }
        save_file(moments, Path(output_dir, OPTIMIZER), metadata={"content": json.dumps(plain)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_adapter(resume_from_checkpoint).tensors()  # refused in a sentence where it is damaged
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file, state = Path(checkpoint, OPTIMIZER), dict[int, dict[str, Tensor]]()
        try:
            with opened(file) as content:
                plain = json.loads(content.metadata()["content"])
            moments = read_tensors(file)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be gone on from: {error} Delete {file.parent} to go on from the checkpoint before."
            ) from None
        for key, tensor in moments.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
        self.lr_scheduler.load_state_dict(plain["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Leave it to `Draws`."""


def last_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is complete, or `None`."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)) if folder.is_dir() else [])):
        with suppress(OSError, ValueError):
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
            return path
    return None
