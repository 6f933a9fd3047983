"""A configuration that the caller gives to a run, instead of settings that describe one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftConfig

from ..errors import ConfigError
from ..tuner.basis import resolve_basis
from ..tuner.config import LotrConfig
from .settings import OF_ADAPTER, TrainSettings

#: Configurations of PEFT that a loop alone does not train.
_MORE_THAN_A_RUN = ("AdaLoraConfig", "PolyConfig", "ShadowConfig", "TrainableTokensConfig")
#: Starts of PEFT's LoRA that need no data, and are the same at every load.
_STARTS_OF_LORA = ("gaussian", "orthogonal", "olora", "pissa")


def check_alone(config: PeftConfig, named: Mapping[str, Any]) -> None:
    """Refuse settings of an adapter beside a configuration that describes one, and what no run can train."""
    if not isinstance(config, PeftConfig):
        raise ConfigError(
            f"config={str(config)[:80]!r} is no configuration. Give one, such as LotrConfig(r=16)."
        )
    kind, start = type(config).__name__, getattr(config, "init_lora_weights", True)
    problem = ""
    if config.is_prompt_learning or kind in _MORE_THAN_A_RUN or not hasattr(config, "modules_to_save"):
        problem = f"{kind} needs more than a run does: prompts, a schedule of ranks, or task ids."
    elif isinstance(start, str) and start not in _STARTS_OF_LORA:
        problem = (
            f"init_lora_weights={start!r} needs more than a run does: data, or the same draws at every load."
        )
    if problem:
        raise ConfigError(f"{problem} Use PEFT itself, or another configuration.")
    allowed = {"start_batches"} if isinstance(config, LotrConfig) else set()
    for name in sorted(set(OF_ADAPTER) & named.keys() - allowed):
        raise ConfigError(
            f"{name}={named[name]!r} describes an adapter, and so does config. Leave {name} out; what a configuration "
            "has of it is a field of its own."
        )


def described(settings: TrainSettings, config: PeftConfig) -> TrainSettings:
    """Return settings with the method and rank of a configuration, as the report tells them."""
    if isinstance(config, LotrConfig):
        return replace(settings, method=config.method, rank=rank_text(config))
    kind = "dora" if getattr(config, "use_dora", False) else str(config.peft_type).rpartition(".")[2].lower()
    return replace(
        settings, method=f"peft_{kind}", rank=str(config.r) if isinstance(config, LoraConfig) else None
    )


def rank_text(config: LotrConfig) -> str:
    """Return `16`, or `8,16` of a pair."""
    return ",".join(map(str, dict.fromkeys(config.rank)))


def resolved(config: PeftConfig) -> PeftConfig:
    """Return a copy of a configuration for training, with what an adapter has from its basis."""
    config = copy.deepcopy(config)
    config.inference_mode = False  # that of a saved adapter is on
    if isinstance(config, LotrConfig) and config.basis is not None:
        resolve_basis(config)
    return config
