"""transformers' Trainer with checkpoints in safetensors and JSON, byte-equal resume, and a stop on NaN.

A checkpoint is whole once `trainer_state.json` is, which the Trainer writes last; only then are older ones removed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import sort_checkpoints

from ..errors import CheckpointError, Interrupted, TrainingError
from ..files.adapter_folder import CONFIG, WEIGHTS, check_finite, read_adapter, write_adapter
from .process import StopOnInterrupt
from .trained import CHECKPOINTS

OPTIMIZER, RANDOM, TRAINER_STATE = "optimizer.safetensors", "random-{}.safetensors", "trainer_state.json"


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


class EpochSampler(Sampler[int]):
    """Rows of about one length together, in an order drawn from the seed and the number of the epoch alone.

    Drawn from the process's random numbers, as in transformers, a run that goes on inside an epoch would see other rows
    than one that never stopped, and processes whose dropout differs would see rows twice.
    """

    def __init__(self, grouped: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.grouped, self.seed, self.epoch = grouped, seed, epoch

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        self.grouped.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.grouped)


class AdapterTrainer(Trainer):
    """Trains the adapter of a PEFT model."""

    model_files: tuple[str, ...] = (WEIGHTS, CONFIG)  # of a checkpoint, beside the state of the run
    checkpoints = CHECKPOINTS  # folder inside the output
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

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
        grouped = super()._get_train_sampler(train_dataset)
        if not isinstance(grouped, LengthGroupedSampler):
            return grouped
        grouped.batch_size *= self.args.world_size  # rows of one step, as one process would group them
        return EpochSampler(grouped, self.args.seed, lambda: int(self.state.epoch or 0))

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
        return str(Path(str(self.args.output_dir), self.checkpoints))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.state.compute_steps(self.args, self.args.max_steps)  # as told now: the state has those of before

    def _diverged(self, what: str, step: int) -> str:
        last = last_whole(Path(self._get_output_dir(None)), self.model_files)
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
        moments = {f"{n}.{key}": t for n, own in optimizer["state"].items() for key, t in own.items()}
        plain = {"param_groups": optimizer["param_groups"], "scheduler": schedule}
        _write(Path(output_dir) / OPTIMIZER, moments, plain)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_adapter(resume_from_checkpoint).tensors()  # refused in a sentence where it is damaged
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        moments, plain = _read(Path(checkpoint) / OPTIMIZER)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
        self.lr_scheduler.load_state_dict(plain["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        name, keys, *rest = np.random.get_state()
        plain = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
        folder = Path(output_dir)
        # some versions of transformers let the first process alone save the model, and make the folder
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RANDOM.format(self.args.process_index), tensors, plain)
        self.accelerator.wait_for_everyone()  # a whole checkpoint has the state of every process

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "") / RANDOM.format(self.args.process_index)
        if not file.is_file():  # a process more than the run had
            return
        tensors, plain = _read(file)
        version, inner, gauss = plain["python"]
        random.setstate((version, tuple(inner), gauss))
        np.random.set_state(tuple(plain["numpy"]))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


def _write(file: Path, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, file, metadata={"content": json.dumps(plain)})


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            plain = json.loads(opened.metadata()["content"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}). Delete {file.parent} to go on from the checkpoint before."
        ) from None
    check_finite(tensors, str(file))
    return tensors, plain


def last_whole(folder: Path, model_files: tuple[str, ...] = (WEIGHTS, CONFIG)) -> Path | None:
    """Return the newest checkpoint in a folder that is complete, or `None`."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)) if folder.is_dir() else [])):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all((path / name).is_file() for name in (*model_files, OPTIMIZER, RANDOM.format(0))):
            return path
    return None
