"""A rate that cannot move an adapter is told at the first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import lotr
from conftest import bert, tokens


def _step(optimizer_of: Callable[[Any], Optimizer], warm_up: bool = False, **fields: Any) -> list[str]:
    """Take two steps; return what was warned."""
    model = get_peft_model(
        bert(), lotr.LotrConfig(**{"r": 4, "target_modules": ["query", "value"], **fields})
    )
    optimizer = optimizer_of(model)
    schedule = LambdaLR(optimizer, lambda step: (step + 1) / 1000 if warm_up else 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(tokens()).logits.square().sum().backward()
            optimizer.step()
            schedule.step()
    return [str(warning.message) for warning in caught if "hardly moves" in str(warning.message)]


def _adam(rate: float) -> Callable[[Any], Optimizer]:
    return lambda model: AdamW(model.parameters(), lr=rate)


@pytest.mark.parametrize("rate", [5e-5, 2e-4])
def test_loras_rates_and_trainers_are_told_once_with_the_way_out(rate: float) -> None:
    (text,) = _step(_adam(rate))
    assert f"{rate:g}" in text and "lotr.parameter_groups" in text and "scaling=16" in text


def test_rates_that_move_it_are_not() -> None:
    assert not _step(lambda model: AdamW(lotr.parameter_groups(model, lr=3e-3, core_lr=1e-2)))
    assert not _step(_adam(2e-4), scaling=16.0)
    assert not _step(_adam(4e-4), r=32)  # cores of a large rank move the update more
    assert not _step(_adam(3e-3), warm_up=True)  # a warm-up begins low


def test_other_starts_and_optimisers_are_not() -> None:
    assert not _step(_adam(2e-4), method="lora")
    assert not _step(lambda model: SGD(model.parameters(), lr=1e-4))
    linear = torch.nn.Linear(2, 2)
    linear(torch.ones(2)).sum().backward()
    AdamW(linear.parameters(), lr=1e-6).step()
