"""`--rank auto`: the ranks that a budget of trained numbers allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..math.cores import CORES
from ..math.init import DATA_INITS
from ..tuner.ranks import largest_rank
from ..tuner.saved_adapter import read_saved
from ..tuner.targets import plan

if TYPE_CHECKING:
    from torch import nn

    from ..tuner.config import LotrConfig
    from .settings import TrainSettings

AUTO = "auto"
_WIDER = 2  # times the uniform rank: how far one group may grow at the cost of others


def check_budget_is_meant(settings: TrainSettings) -> None:
    """Refuse one of `rank="auto"` and `budget` without the other.

    Raises:
        ConfigError: The message names the one that is missing.
    """
    if settings.rank == AUTO and settings.budget is None:
        raise ConfigError(
            "rank='auto' needs a budget: the trained numbers that it may use. Add --budget 9216."
        )
    if settings.budget is None:
        return
    if settings.rank == type(settings).rank:
        raise ConfigError(
            f"budget={settings.budget} chooses the rank where rank='auto' asks for that, and rank is {settings.rank} "
            "by default. Add --rank auto, or leave the budget out."
        )
    if settings.rank != AUTO:
        raise ConfigError(
            f"budget={settings.budget} chooses the rank, and rank={settings.rank!r} sets it. Use rank='auto', or leave "
            "the budget out."
        )
    if settings.basis is not None:
        raise ConfigError(
            f"budget={settings.budget} chooses ranks, and those of basis={settings.basis!r} are kept. Leave one of "
            "them out."
        )
    if settings.budget < 1:
        raise ConfigError(f"budget={settings.budget} trains nothing. Use a positive number.")


def is_shared_out(settings: TrainSettings, config: LotrConfig) -> bool:
    """Whether groups get ranks of their own: a start looks at data, factors train, and their cores can be cut.

    Cores that train alone keep one rank: their factors cost nothing, so no group grows at the cost of another's.
    """
    by_site = CORES[str(config.core)].by_site
    given = settings.budget is not None and settings.init in DATA_INITS
    return given and by_site and config.trainable == "all"


def fit(settings: TrainSettings, config: LotrConfig, model: nn.Module, done: Path | None = None) -> str:
    """Set the ranks with which an adapter is made, and say which.

    That is the largest uniform rank that the budget allows; twice that where the start shares the budget out
    afterwards. The wider adapter has at most some four times the numbers of the budget, and no optimiser yet.

    Args:
        settings: `budget` and `start` are read.
        config: Gets its ranks.
        model: The base model; on the meta device for a plan.
        done: Checkpoint of a run that goes on; it has the ranks already.

    Raises:
        ConfigError: See `largest_rank`.
    """
    assert settings.budget is not None
    if done is not None:
        saved = read_saved(done).config
        config.r, config.rank_pattern = saved.r, saved.rank_pattern
        return "Rank: as the run began."
    rank = config.r = largest_rank(model, config, settings.budget)
    if is_shared_out(settings, config):
        config.r = min(_WIDER * rank, plan(model, config).widest_rank)
    return said_rank(settings, config, rank)


def said_rank(settings: TrainSettings, config: LotrConfig, rank: int) -> str:
    """Return a line with the rank of a budget, and whether the groups get others or why they do not."""
    said = f"Rank: {rank} is the largest that trains at most {settings.budget:,} numbers"
    if is_shared_out(settings, config):
        return f"{said}; the start looks at twice as many directions, and shares the budget out among the groups."
    if not CORES[str(config.core)].by_site:
        return f"{said}. It is the same for all groups: cores of core={config.core!r} have no cut."
    if config.trainable != "all":
        return f"{said}. It is the same for all groups, because the factors stay (--trainable {config.trainable})."
    return f"{said}. It is the same for all groups: no start looks at data (--init gradient)."


def ranks_of(config: LotrConfig) -> dict[str, tuple[int, int]]:
    """Return the ranks `(k, r)` of the groups of an adapter in a model, by name."""
    return {group.name: group.rank for group in config.recorded_plan().groups}


def said_ranks(config: LotrConfig) -> str:
    """Return a line with the ranks of the groups."""
    ranks = ranks_of(config)
    shown = [f"{name} {rank}" for name, rank in list(ranks.items())[:8]]
    more = f", and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    trained = config.recorded_plan().n_parameters
    return f"Ranks (k, r): {', '.join(shown)}{more}; {trained:,} numbers in all."
