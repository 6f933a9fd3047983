"""The sparse optimiser trains each task as AdamW would alone; the sampler keeps its shares."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from lotr.bank.cache import take
from lotr.errors import ConfigError
from lotr.training.tasks.row_adam import RowAdam
from lotr.training.tasks.trainer import TaskSampler, temperature_of


def loss(core: Tensor, head: Tensor, target: float) -> Tensor:
    return ((core * 3 - target) ** 2).sum() + (core.sum() * head).sin().sum()


@pytest.mark.parametrize(("decay", "max_norm"), [(0.0, 1.0), (0.1, 100.0)])
def test_each_task_is_trained_as_adamw_trains_it_alone(decay: float, max_norm: float) -> None:
    cores, heads = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    tables = [cores.clone().requires_grad_(), heads.clone().requires_grad_()]
    together = RowAdam(
        [{"params": tables[:1], "lr": 0.05}, {"params": tables[1:], "lr": 0.1}],
        weight_decay=decay,
        max_norm=max_norm,
    )
    plan = [[1, 3], [3], [1, 4, 3], [4], [1]]
    for slots in plan:
        at = torch.tensor([slot for slot in slots for _ in range(2)])
        core, head = (take(table, at) for table in tables)
        sum(loss(core[n], head[n], float(at[n])) for n in range(len(at))).backward()
        together.step()
    for slot in (1, 3, 4):
        own = [cores[slot].clone().requires_grad_(), heads[slot].clone().requires_grad_()]
        alone = torch.optim.AdamW(
            [{"params": own[:1], "lr": 0.05}, {"params": own[1:], "lr": 0.1}], weight_decay=decay
        )
        for _ in range(sum(slot in slots for slots in plan)):
            alone.zero_grad()
            (2 * loss(*own, float(slot))).backward()
            torch.nn.utils.clip_grad_norm_(own, max_norm)
            alone.step()
        for table, expected in zip(tables, own, strict=True):
            assert torch.allclose(table[slot], expected, atol=1e-6)
    assert torch.equal(tables[0][[0, 2]], cores[[0, 2]])


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
