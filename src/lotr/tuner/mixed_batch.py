"""Batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import LotrLinear

BASE = "__base__"  # PEFT's name for rows without an adapter


@contextmanager
def forward_hooks(
    tuner: BaseTuner, adapter_names: Sequence[str] | None, num_beams: int | None = None
) -> Iterator[None]:
    """Give `adapter_names` to every adapted module during one forward pass or generation.

    Args:
        tuner: The model.
        adapter_names: Adapter of each row; `"__base__"` for none.
        num_beams: Beams of a beam search, which repeats every row of the decoder so many times.

    Raises:
        ValueError: The model is in training mode, or an adapter does not exist.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [m for m in tuner.modules() if isinstance(m, LotrLinear | AuxiliaryTrainingWrapper)]
    known = {name for m in layers if isinstance(m, LotrLinear) for name in m.parts}
    missing = sorted(set(adapter_names) - known - {BASE})
    if missing:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}")

    rows = list(adapter_names)
    decoder_rows = [name for name in rows for _ in range(num_beams or 1)]
    encoder = _encoder(tuner.model)
    in_encoder = set() if encoder is None else {id(module) for module in encoder.modules()}
    handles = [
        layer.register_forward_pre_hook(
            _passing(rows if id(layer) in in_encoder else decoder_rows), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passing(names: list[str]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": names}

    return hook


def _encoder(model: nn.Module) -> nn.Module | None:
    # only encoder-decoder models: of others "the encoder" is the model itself, which beams do repeat
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get: Any = getattr(model, "get_encoder", None)
    return None if get is None else get()
