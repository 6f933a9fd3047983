"""`lotr.largest_rank`: the rank that a budget allows."""

from __future__ import annotations

from typing import Any

import pytest

import lotr
from conftest import bert
from lotr import ConfigError, LotrConfig


def _config(**fields: Any) -> LotrConfig:
    return LotrConfig(
        **{"target_modules": ["query", "value", "dense"], "seed": 0, "init": "orthonormal", **fields}
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trainable": "cores"},
        {"method": "lora"},
        {"method": "dora"},
        {"method": "tenslora_depth"},
        {"method": "metatt_4d", "target_modules": ["query", "value"]},
    ],
    ids=str,
)
def test_the_largest_rank_is_the_last_that_the_budget_allows(fields: dict[str, Any]) -> None:
    base = bert()
    counts = {r: lotr.plan(base, _config(r=r, **fields)).n_parameters for r in range(1, 33)}
    for budget in (2500, 4000, 10**6):
        within = [r for r, count in counts.items() if count <= budget]
        assert lotr.largest_rank(base, _config(**fields), budget) == max(within)


def test_a_budget_below_rank_one_tells_the_smallest_that_is_possible() -> None:
    least = lotr.plan(bert(), _config(r=1)).n_parameters
    assert lotr.largest_rank(bert(), _config(), least) == 1
    with pytest.raises(ConfigError, match=f"less than rank 1 trains: {least:,} numbers"):
        lotr.largest_rank(bert(), _config(), least - 1)
    with pytest.raises(ConfigError, match="sets ranks of single modules"):
        lotr.largest_rank(bert(), _config(rank_pattern={"query": 4}), 10**6)
