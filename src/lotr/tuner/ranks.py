"""`lotr.largest_rank`: the rank that a budget of trained numbers allows."""

from __future__ import annotations

import copy
from bisect import bisect_right
from dataclasses import replace

from torch import nn

from ..errors import ConfigError
from .checks import check_is_lotr
from .config import LotrConfig
from .targets import plan


def largest_rank(model: nn.Module, config: LotrConfig, budget: int) -> int:
    """Return the largest rank, the same for all groups, with which an adapter trains at most so many numbers.

    Args:
        model: Any model; also one on the meta device.
        config: The adapter's configuration; its `r` is not read, and nothing is changed.
        budget: Trained numbers of the adapter, without a head.

    Returns:
        The rank, at least 1; no larger than the blocks allow.

    Raises:
        ConfigError: Rank 1 is over the budget already, or `rank_pattern` sets ranks of single modules.
        PlanError: See `lotr.plan`.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> largest_rank(base, LotrConfig(method="lotr_joint", target_modules=["0", "1"]), budget=100)
        4
    """
    check_is_lotr(config)
    if config.rank_pattern:
        raise ConfigError(
            f"rank_pattern={config.rank_pattern!r} sets ranks of single modules, and a budget asks for one rank of "
            "all. Leave one of them out."
        )
    config = copy.copy(config)
    config.r = 1
    smallest = plan(model, config)
    if budget < smallest.n_parameters:
        raise ConfigError(
            f"budget={budget:,} is less than rank 1 trains: {smallest.n_parameters:,} numbers for {smallest.n_sites} "
            "sites. Allow as many, adapt fewer modules, or share along more modes (method='lotr_joint')."
        )

    def n_parameters(r: int) -> int:
        return config.plan_for([replace(target, rank=(r, r)) for target in smallest.targets]).n_parameters

    widest = min(min(group.shape) for group in smallest.groups)
    return bisect_right(range(1, widest + 1), budget, key=n_parameters)
