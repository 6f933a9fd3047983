"""Names of experts: those of their modules before one parameter held them all, and "all-linear"."""

from __future__ import annotations

from torch import nn

from ..errors import PlanError
from .config import LotrConfig
from .experts import stacked_weights
from .names import linear_paths, suffixes

#: Names of an expert's linear modules in checkpoints and in older versions of transformers → the parameter.
_PARAMETERS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "down_proj": "down_proj",
    "w2": "down_proj",
}


def map_names(config: LotrConfig, model: nn.Module) -> None:
    """Add to `target_parameters` what "all-linear" and the old names of experts' modules in `target_modules` mean.

    A name that linear modules have too stays among `target_modules`. Nothing else is adapted by default where
    `target_parameters` are named.

    Raises:
        PlanError: Only one of two projections is named that one parameter holds.
    """
    modules = config.target_modules
    if modules is None:
        if config.target_parameters:
            config.target_modules = set()  # type: ignore[assignment]
        return
    experts = [path for path in stacked_weights(model) if "experts" in path.split(".")]
    parameters = set(config.target_parameters or ())
    if isinstance(modules, str):
        if modules == "all-linear":
            parameters |= {".".join(path.split(".")[-2:]) for path in experts}
    else:
        known = suffixes(experts)
        old = {name: _PARAMETERS[name] for name in modules if _PARAMETERS.get(name) in known}
        for one, other in (("gate_proj", "up_proj"), ("w1", "w3")):
            if (one in old) != (other in old):
                lone, missing = (one, other) if one in old else (other, one)
                raise PlanError(
                    f"target_modules={lone!r} is one half of experts' {_PARAMETERS[one]!r}, which holds {missing!r} "
                    f"too. Name both, or the modules that are no experts by a regex."
                )
        parameters |= {f"experts.{name}" for name in old.values()}
        linear = suffixes(linear_paths(model))
        config.target_modules = {name for name in modules if name not in old or name in linear}  # type: ignore[assignment]
    config.target_parameters = sorted(parameters) or None
