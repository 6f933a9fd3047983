"""What happens between a fresh adapter and the first step: a new head warms up, the factors turn towards data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..errors import TrainingError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from .settings import TrainSettings

_HEAD = ".modules_to_save."


def begin(
    settings: TrainSettings,
    model: PeftModel,
    rows: Dataset,
    collate: Callable[[list[Any]], Any],
    head: tuple[int, float],
    looks: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Warm up a new head, then start the factors, as the settings have it.

    Every process sees the same batches, so all do the same.

    Args:
        settings: `init`, `batch_size` and `seed` are read.
        model: A model with a fresh adapter, on its device.
        rows: Encoded training rows.
        collate: Rows to a batch.
        head: Steps in which a new head trains alone, and its learning rate.
        looks: Batches that a start from data looks at.
        say: Called with lines for the user.

    Returns:
        What was done, for the report of the run.
    """
    steps, rate = head
    done: dict[str, Any] = {"head_warmup": steps}
    batches = _batches(rows, collate, settings.batch_size, settings.seed, model.device)
    if steps:
        warm_head(model, batches, steps, rate)
        say(f"Head: warmed up for {steps} steps.")
    if settings.init in ("gradient", "first_step"):
        from ..tuner.data_init import init_from_data

        init_from_data(model, [next(batches) for _ in range(looks)], seed=settings.seed)
        done |= {"init": settings.init, "start_batches": looks}
        stay = model.active_peft_config.trainable == "cores"
        why = ", because they stay as they start (--init orthonormal keeps them random)" if stay else ""
        say(f"Start: the factors turned towards the gradients of {looks} batches{why}.")
    return done


def warm_head(model: PeftModel, batches: Iterator[Any], steps: int, lr: float) -> None:
    """Train the modules that are saved in full, and nothing else, for some steps.

    Cold, the gradients that reach the adapter are those of a random head.

    Raises:
        TrainingError: The loss is not finite.
    """
    frozen = [p for n, p in model.named_parameters() if p.requires_grad and _HEAD not in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and _HEAD in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=0.0)
    training = model.training
    model.train()
    try:
        for _ in tqdm(range(steps), desc="Head", unit=" steps", delay=2, leave=False, disable=None):
            loss = model(**next(batches)).loss
            if not torch.isfinite(loss):
                raise TrainingError("The loss is not finite while the head warms up. Lower head_lr.")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.train(training)
        for parameter in frozen:
            parameter.requires_grad_(True)


def _batches(
    rows: Dataset, collate: Callable[[list[Any]], Any], size: int, seed: int, device: torch.device
) -> Iterator[Any]:
    """Yield batches without end, in an order that depends on the seed alone."""
    from torch.utils.data import DataLoader

    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(rows, batch_size=size, shuffle=True, collate_fn=collate, generator=order)
    while True:
        for batch in loader:
            yield {name: value.to(device) for name, value in batch.items()}
