"""Tensor-rank adapters for PyTorch and Hugging Face models: `ΔW_s = σ · U · C_s · Vᵀ`.

Importing the package registers the method with PEFT, so `get_peft_model`, `PeftModel.from_pretrained` and
transformers' own adapter functions know it.
"""

from __future__ import annotations

from .tuner.register import add_peft_type

add_peft_type()  # the configuration needs the type before it can be registered

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
from .sharing.plan import Group, Plan, Site  # noqa: E402
from .training.rates import parameter_groups  # noqa: E402
from .tuner.config import LotrConfig  # noqa: E402
from .tuner.data_init import init_from_data  # noqa: E402
from .tuner.lora_init import init_from_lora  # noqa: E402
from .tuner.model import LotrModel  # noqa: E402
from .tuner.ranks import largest_rank  # noqa: E402
from .tuner.register import register  # noqa: E402
from .tuner.targets import plan  # noqa: E402
from .tuner.truncate import truncate  # noqa: E402

register()

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CheckpointError",
    "ConfigError",
    "CoreBank",
    "DataError",
    "Group",
    "LotrConfig",
    "LotrError",
    "LotrModel",
    "Method",
    "Plan",
    "PlanError",
    "Site",
    "Task",
    "TrainingError",
    "UnknownTaskError",
    "__version__",
    "init_from_data",
    "init_from_lora",
    "largest_rank",
    "parameter_groups",
    "plan",
    "truncate",
]
