"""Batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError
from .layer import LotrLinear
from .weight import AdaptedWeight

BASE = "__base__"  # PEFT's name for rows without an adapter


@contextmanager
def forward_hooks(
    tuner: BaseTuner, adapter_names: Sequence[str] | None, num_beams: int | None = None
) -> Iterator[None]:
    """Give the adapter of each row (`"__base__"`: none) to every adapted module in one forward pass or generation.

    A beam search repeats every row of the decoder `num_beams` times.

    Raises:
        ValueError: The model is in training mode, or an adapter does not exist.
        ConfigError: Experts of one parameter are adapted.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(isinstance(m, AdaptedWeight) and m.experts for m in tuner.modules()):
        raise ConfigError(
            "Rows of a batch cannot have adapters of their own where experts of one parameter are adapted: the experts "
            "see tokens, not rows. Run a batch for each adapter, with set_adapter."
        )
    layers = [m for m in tuner.modules() if isinstance(m, LotrLinear | AuxiliaryTrainingWrapper)]
    known = {name for m in layers if isinstance(m, LotrLinear) for name in m.adapters}
    missing = sorted(set(adapter_names) - known - {BASE})
    if missing:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}")

    decoder_rows = [name for name in adapter_names for _ in range(num_beams or 1)]
    in_encoder = set(_encoder_modules(tuner.model))

    def pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {
            **kwargs,
            "adapter_names": list(adapter_names) if module in in_encoder else decoder_rows,
        }

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(pass_names, with_kwargs=True))
        yield


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    # only of encoder-decoder models: of others "the encoder" is the model itself, which beams do repeat
    get: Any = getattr(model, "get_encoder", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and get is not None:
        yield from get().modules()
