"""Passes over batches for a start that looks at data: forward, backward, and nothing of the model is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from .adapted import Adapted

Loss = Callable[[nn.Module, Any], Tensor]
Seen = Callable[[Adapted, Tensor, Tensor], None]


def look_through(
    model: nn.Module,
    found: list[Adapted],
    batches: list[Any],
    loss: Loss,
    see: Seen,
    tick: Callable[[], None] | None,
) -> None:
    """Run the batches forward and backward, and show input and output gradient of every adapted module.

    Raises:
        ConfigError: What `loss` returns is not one number that depends on trained ones.
        TrainingError: A loss is NaN or infinite.
    """
    with _watching(found, see):
        run_through(model, batches, loss, tick)


def run_through(
    model: nn.Module, batches: list[Any], loss: Loss, after: Callable[[], None] | None = None
) -> None:
    """Run the batches forward and backward.

    Gradients of parameters and the mode of the model are as before, whatever happens.

    Args:
        model: The model.
        batches: What `loss` takes.
        loss: Returns the loss of a batch.
        after: Called after every backward pass.

    Raises:
        ConfigError: What `loss` returns is not one number that depends on trained ones.
        TrainingError: A loss is NaN or infinite.
    """
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in kept:
        parameter.grad = None
    training = model.training
    model.train(
        getattr(model, "is_gradient_checkpointing", False)
    )  # without dropout, unless memory asks for it
    try:
        for n, batch in enumerate(batches, 1):
            result = loss(model, batch)
            _check_loss(result, f"batch {n} of {len(batches)}")
            result.backward()
            if after is not None:
                after()
    finally:
        model.train(training)
        for parameter, gradient in kept.items():
            parameter.grad = gradient


def _check_loss(loss: Any, batch: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ConfigError(
            f"The loss of {batch} is a {type(loss).__name__} {shape}, and gradients are those of one number. Return a "
            "tensor of one element."
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"The loss of {batch} depends on no trained number: the adapter is frozen, or the loss was cut off from "
            "the model's output. Load the adapter with is_trainable=True, and let loss return a number with a gradient."
        )
    if not loss.isfinite():
        raise TrainingError(
            f"The loss of {batch} is {loss.item()}, so its gradients tell nothing; the factors are as they were. Look "
            "at that batch, or compute in a wider type than that of the base model."
        )


@contextmanager
def _watching(found: list[Adapted], see: Seen) -> Iterator[None]:
    def hook_of(adapted: Adapted) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:  # not in the first pass of a reentrant checkpoint
                x = args[0].detach()
                output.register_hook(lambda gradient: see(adapted, x, gradient))

        return hook

    handles = [adapted.layer.register_forward_hook(hook_of(adapted)) for adapted in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
