"""Tensor-rank adapters for PyTorch and Hugging Face models: `ΔW_s = σ · U · C_s · Vᵀ`.

Importing the package registers the method with PEFT, so `get_peft_model`, `PeftModel.from_pretrained` and
transformers' own adapter functions know it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tuner.register import add_peft_type

add_peft_type()  # the configuration needs the type before it can be registered

from .adapters.export import export  # noqa: E402
from .adapters.inspection import Inspection, inspect  # noqa: E402
from .bank import CoreBank, Task  # noqa: E402
from .errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DataError,
    LotrError,
    PlanError,
    TrainingError,
    UnknownTaskError,
)
from .methods import METHODS, Method  # noqa: E402
from .sharing.plan import Plan  # noqa: E402
from .training.clip_updates import clip_updates  # noqa: E402
from .training.rates import parameter_groups  # noqa: E402
from .tuner.config import LotrConfig  # noqa: E402
from .tuner.data_init import init_from_data  # noqa: E402
from .tuner.lora_init import init_from_lora  # noqa: E402
from .tuner.ranks import largest_rank  # noqa: E402
from .tuner.register import register  # noqa: E402
from .tuner.targets import plan  # noqa: E402
from .tuner.truncate import truncate  # noqa: E402

if TYPE_CHECKING:
    from .compression.run import compress
    from .training.predict import evaluate, predict
    from .training.run import train
    from .training.settings import TrainSettings
    from .training.trained import merge

register()

#: Names whose modules import transformers' Trainer, and are imported when they are first used.
_LATER = {
    "TrainSettings": "training.settings",
    "compress": "compression.run",
    "evaluate": "training.predict",
    "merge": "training.trained",
    "predict": "training.predict",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CheckpointError",
    "ConfigError",
    "CoreBank",
    "DataError",
    "Inspection",
    "LotrConfig",
    "LotrError",
    "Method",
    "Plan",
    "PlanError",
    "Task",
    "TrainSettings",
    "TrainingError",
    "UnknownTaskError",
    "__version__",
    "clip_updates",
    "compress",
    "evaluate",
    "export",
    "init_from_data",
    "init_from_lora",
    "inspect",
    "largest_rank",
    "merge",
    "parameter_groups",
    "plan",
    "predict",
    "train",
    "truncate",
]
