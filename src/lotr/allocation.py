"""How a budget of trained numbers is shared out: the ranks that keep most for each number spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Rank = tuple[int, int]  # (k, r)
_ROUNDING = 1e-9  # of all energy: what a whole budget has to gain to be worth spending


def allocate(
    energies: Sequence[Tensor],  # (K, R) each
    costs: Sequence[Callable[[int, int], int]],
    budget: int,
) -> list[Rank]:
    """Choose ranks for several groups under one budget, greedily.

    Ranks `(k, r)` keep the first `k` columns of `U` and the first `r` of `V`, so they keep `Σ_{a<k, b<r} E[a, b]`. All
    begin at `(1, 1)`; again and again the group that gains most for each number grows by a column of `U`, of `V`, or of
    both, until nothing that fits gains anything.

    Args:
        energies: Of every group what each pair of columns keeps, in the order of the columns.
        costs: Of every group the trained numbers at ranks `(k, r)`.
        budget: Trained numbers in all; at least what ranks of one cost.

    Returns:
        `(k, r)` of every group.

    Example:
        >>> import torch
        >>> strong, weak = torch.diag(torch.tensor([9.0, 4.0, 1.0])), torch.diag(torch.tensor([3.0, 0.1, 0.0]))
        >>> allocate([strong, weak], [lambda k, r: 10 * (k + r)] * 2, budget=80)
        [(3, 3), (1, 1)]
    """
    kept = [energy.double().cumsum(0).cumsum(1).tolist() for energy in energies]
    ranks = [(1, 1) for _ in kept]
    left = budget - sum(cost(1, 1) for cost in costs)
    rounding = _ROUNDING * sum(rows[-1][-1] for rows in kept) / budget
    while True:
        best, chosen = rounding, None
        for n, (k, r) in enumerate(ranks):
            for k_next, r_next in ((k + 1, r), (k, r + 1), (k + 1, r + 1)):
                if k_next > len(kept[n]) or r_next > len(kept[n][0]):
                    continue
                price = costs[n](k_next, r_next) - costs[n](k, r)
                gain = (kept[n][k_next - 1][r_next - 1] - kept[n][k - 1][r - 1]) / price
                if price <= left and gain > best:
                    best, chosen = gain, (n, (k_next, r_next), price)
        if chosen is None:
            return ranks
        n, ranks[n], price = chosen
        left -= price
