"""PEFT's `hotswap_adapter` for this method: what two adapters must agree on, and factors that stay."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.utils import hotswap
from torch import Tensor, nn

from ..sharing.keys import is_factor
from .config import LotrConfig
from .state_dict import of_adapter

#: Fields of the configuration that two adapters must agree on.
KEYS = [
    "r",
    "modes",
    "core",
    "core_ranks",
    "blocks",
    "layers_per_group",
    "magnitude",
    "trainable",
    "rank_pattern",
    "basis_hash",
    "targets",
]


def keep_factors() -> None:
    """Make PEFT's hot-swapping keep the factors of a basis, which the files of its adapters lack.

    PEFT fills with zeros whatever a file lacks.
    """
    swap = hotswap.hotswap_adapter_from_state_dict

    @wraps(swap)
    def swapped(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        *args: Any,
        **words: Any,
    ) -> None:
        if isinstance(config, LotrConfig):
            _ = config.lora_alpha  # refuses what cannot be swapped, before a number has changed
            if config.refers_to_basis:
                own = of_adapter(model, adapter_name, model.state_dict())
                stay = {key.removeprefix("_orig_mod."): own[key] for key in own if is_factor(key)}
                state_dict = stay | state_dict
        swap(model, state_dict, adapter_name, config, *args, **words)

    hotswap.hotswap_adapter_from_state_dict = swapped
