"""Which rows come when many tasks are trained at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ...errors import ConfigError, near

SAMPLING = ("proportional", "uniform", "temperature")


def temperature_of(sampling: str, temperature: float) -> float:
    """Return the temperature of a way to sample.

    Raises:
        ConfigError: The way is not known, or the temperature is not positive.
    """
    if sampling not in SAMPLING:
        raise ConfigError(f"sampling={sampling!r} is not known. {near(sampling, SAMPLING)}")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} is out of range. Use 1 (proportional) or more.")
    return {"proportional": 1.0, "uniform": math.inf, "temperature": temperature}[sampling]


class TaskSampler(Sampler[int]):
    """Draws rows of many tasks: task `t` with its `n_t` rows takes a share `n_t^(1/T) / Σ n^(1/T)`.

    T = 1 is proportional to size, T = ∞ uniform over tasks. Shares are kept exactly, round after round, and a task's
    rows come in a new order each time all of them have been seen.

    Args:
        sizes: Rows of each task; the rows of a task stand one behind the other.
        total: Rows to draw.
        temperature: `T`.
        seed: Seed of the order.

    Source: https://arxiv.org/abs/1907.05019

    Example:
        >>> rows = list(TaskSampler([9, 1], total=20, temperature=math.inf))
        >>> rows.count(9)
        10
    """

    def __init__(self, sizes: Sequence[int], total: int, temperature: float = 1.0, seed: int = 0) -> None:
        self.sizes, self.total, self.seed = np.asarray(sizes), total, seed
        weights = self.sizes ** (0.0 if math.isinf(temperature) else 1.0 / temperature)
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        a_round = int(self.sizes.sum())
        drawn = np.zeros(len(self.sizes), dtype=np.int64)
        for n in range(-(-self.total // a_round)):
            upto = np.floor(self.shares * a_round * (n + 1) + 1e-9).astype(np.int64)
            rows = np.concatenate(
                [
                    starts[t] + self._rows(t, int(drawn[t]), int(upto[t]))
                    for t in np.flatnonzero(upto > drawn).tolist()
                ]
            )
            drawn = upto
            np.random.default_rng([self.seed, n]).shuffle(rows)
            yield from rows[: self.total - n * a_round].tolist()

    def _rows(self, task: int, start: int, stop: int) -> np.ndarray:
        """Return what stands from `start` to `stop` in a task's endless sequence of shuffled rows."""
        size = int(self.sizes[task])
        first = start // size
        orders = [
            np.random.default_rng([self.seed, task, n]).permutation(size)
            for n in range(first, -(-stop // size))
        ]
        return np.concatenate(orders)[start - first * size : stop - first * size]
