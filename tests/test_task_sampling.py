"""The sampler keeps the shares of its tasks."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from lotr.errors import ConfigError
from lotr.training.tasks.trainer import TaskSampler, temperature_of


def test_proportional_sampling_shows_every_row_once_a_round() -> None:
    rows = list(TaskSampler([5, 2, 7], total=28))
    assert Counter(rows[:14]) == Counter(range(14)) and Counter(rows) == Counter(dict.fromkeys(range(14), 2))
    assert rows[:14] != sorted(rows[:14])


@pytest.mark.parametrize(("temperature", "shares"), [(math.inf, (0.5, 0.5)), (2.0, (0.75, 0.25))])
def test_shares_follow_the_temperature(temperature: float, shares: tuple[float, float]) -> None:
    rows = list(TaskSampler([90, 10], total=1000, temperature=temperature))
    large = sum(row < 90 for row in rows) / len(rows)
    assert large == pytest.approx(shares[0], abs=0.01)
    seen = Counter(row for row in rows if row >= 90)
    assert max(seen.values()) - min(seen.values()) <= 1  # a small task's rows are repeated evenly


def test_the_order_depends_on_the_seed_alone() -> None:
    a, b, c = (list(TaskSampler([5, 5], total=20, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_unknown_sampling_is_refused() -> None:
    assert temperature_of("uniform", 1.0) == math.inf
    with pytest.raises(ConfigError, match="Near matches: uniform"):
        temperature_of("unifrm", 1.0)
    with pytest.raises(ConfigError, match="out of range"):
        temperature_of("temperature", 0.0)
