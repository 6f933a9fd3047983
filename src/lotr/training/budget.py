"""`--rank auto`: the rank that a budget of trained numbers allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..tuner.ranks import largest_rank
from ..tuner.saved_adapter import read_saved

if TYPE_CHECKING:
    from torch import nn

    from ..tuner.config import LotrConfig
    from .settings import TrainSettings

AUTO = "auto"


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


def fit(settings: TrainSettings, config: LotrConfig, model: nn.Module, done: Path | None = None) -> str:
    """Set the rank with which an adapter is made, and return a line that tells it.

    Args:
        settings: `budget` is read.
        config: Gets its rank.
        model: The base model; on the meta device for a plan.
        done: Checkpoint of a run that goes on; it has the rank already.

    Raises:
        ConfigError: See `largest_rank`.
    """
    assert settings.budget is not None
    if done is not None:
        config.set_rank(read_saved(done).config.r)
    else:
        config.set_rank(largest_rank(model, config, settings.budget))
    return f"Rank: {config.r} is the largest that trains at most {settings.budget:,} numbers."
