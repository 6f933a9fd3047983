"""How a budget of trained numbers is shared out: the ranks that keep most for each number spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

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

    def step_of(n: int) -> tuple[float, int, Rank]:  # gain of a number, price, ranks
        """Return the best step of a group that fits; the gain of none is zero."""
        (k, r), best = ranks[n], (0.0, 0, ranks[n])
        for after in ((k + 1, r), (k, r + 1), (k + 1, r + 1)):
            if after[0] <= len(kept[n]) and after[1] <= len(kept[n][0]):
                price = costs[n](*after) - costs[n](k, r)
                gain = (kept[n][after[0] - 1][after[1] - 1] - kept[n][k - 1][r - 1]) / price
                if price <= left and gain > max(best[0], rounding):
                    best = gain, price, after
        return best

    waiting = [(-step_of(n)[0], n) for n in range(len(ranks))]
    heapify(waiting)
    while waiting:
        said, n = heappop(waiting)
        gain, price, after = step_of(n)
        if gain == -said:  # else its step does not fit any more, and it waits with a smaller one
            ranks[n], left = after, left - price
            gain = step_of(n)[0]
        if gain > 0:
            heappush(waiting, (-gain, n))
    return ranks
