"""Names of experts: those of their modules before one parameter held them all, and "all-linear"."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from ..errors import PlanError
from .config import LotrConfig
from .experts import stacked_weights
from .names import linear_paths, suffixes

#: Names of an expert's linear modules in checkpoints and in older versions of transformers → the parameter.
PARAMETERS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "down_proj": "down_proj",
    "w2": "down_proj",
}


def map_names(config: LotrConfig, model: nn.Module) -> None:
    """Add to `target_parameters` the experts that `target_modules` means, by "all-linear", names or a regex.

    What linear modules match too stays among `target_modules`. Nothing else is adapted by default where
    `target_parameters` are named.

    Raises:
        PlanError: Only one of two projections is named that one parameter holds.
    """
    modules = config.target_modules
    if modules is None:
        if config.target_parameters:
            config.target_modules = set()  # type: ignore[assignment]
        return
    stacks = [path for path in stacked_weights(model) if re.search(r"experts\.", path)]
    named = {path for path in stacks if modules == "all-linear" or _is_named(path, modules)}
    ends = {".".join(path.split(".")[-2:]) for path in named}
    by_ends = {path for path in stacks if path.endswith(tuple(ends))} == named
    config.target_parameters = (
        sorted({*(config.target_parameters or ()), *(ends if by_ends else named)}) or None
    )
    if not named or modules == "all-linear":
        return
    linear = linear_paths(model)
    if not isinstance(modules, str):
        of_experts = suffixes(name for path in named for name in (path, *_old(path)))
        config.target_modules = set(modules) - (of_experts - suffixes(linear))  # type: ignore[assignment]
    elif not any(_matches(path, modules) for path in linear):
        config.target_modules = set()  # type: ignore[assignment]


def _old(path: str) -> list[str]:
    """Return the paths that a stack of experts stands for."""
    module, _, stack = path.rpartition(".")
    return [f"{module}.{name}" for name, parameter in PARAMETERS.items() if parameter == stack]


def _is_named(path: str, modules: str | Collection[str]) -> bool:
    """Whether `target_modules` names a stack of experts, or all that it stands for."""
    if _matches(path, modules):
        return True
    old = {old.rpartition(".")[2]: _matches(old, modules) for old in _old(path)}
    for one, other in (("gate_proj", "up_proj"), ("w1", "w3")):
        if old.get(one) != old.get(other):
            lone, missing = (one, other) if old[one] else (other, one)
            raise PlanError(
                f"target_modules={lone!r} is one half of experts' {PARAMETERS[one]!r}, which holds {missing!r} too. "
                "Name both, or the modules that are no experts by a regex."
            )
    return any(old.values())


def _matches(path: str, modules: str | Collection[str]) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return path.endswith(tuple(f".{name}" for name in modules))
