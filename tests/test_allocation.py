"""Sharing out a budget: against all other ways to spend it."""

from __future__ import annotations

import itertools

import pytest
import torch

from lotr.sharing.allocation import allocate


def _kept(energies, ranks) -> float:
    return sum(float(e[:k, :r].sum()) for e, (k, r) in zip(energies, ranks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_it_keeps_nearly_what_the_best_of_all_ranks_keeps_and_never_spends_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    falls = 0.6 ** torch.arange(4.0)
    energies = [torch.rand(4, 4, generator=generator) * falls.outer(falls) * size for size in (1.0, 5.0)]
    costs = [lambda k, r: 8 * k + 8 * r + 3 * k * r, lambda k, r: 20 * k + 5 * r + 3 * k * r]

    def spent(ranks) -> int:
        return sum(cost(*rank) for cost, rank in zip(costs, ranks, strict=True))

    every = list(itertools.product(itertools.product(range(1, 5), repeat=2), repeat=2))
    for budget in range(50, 300, 20):
        ranks = allocate(energies, costs, budget)
        best = max(_kept(energies, other) for other in every if spent(other) <= budget)
        assert spent(ranks) <= budget and _kept(energies, ranks) > 0.9 * best


def test_a_step_on_both_sides_is_taken_where_one_alone_gains_nothing() -> None:
    assert allocate([torch.eye(3)], [lambda k, r: k + r], budget=6) == [(3, 3)]


def test_numbers_that_keep_nothing_are_not_spent() -> None:
    nothing, something = torch.zeros(4, 4), torch.ones(4, 4)
    costs = [lambda k, r: k + r] * 2
    assert allocate([nothing, something], costs, budget=1000) == [(1, 1), (4, 4)]
