"""The numbers with which a group of an adapter begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..math.init import DATA_INITS, INITS, WEIGHT_INITS, generator_for
from ..sharing.plan import Group
from .config import LotrConfig

#: Size of a random update (`init_weights=False`): small beside a weight, since `U` and `V` are orthonormal.
_RANDOM = 0.1
Started = tuple[Tensor, Tensor, dict[str, Tensor]]


def start_group(
    group: Group,
    config: LotrConfig,
    weights: Callable[[Group], list[Tensor]],
    adapter: str,
    seed: int,
    empty: bool = False,
) -> Started:
    """Return `U` `(o, k)`, `V` `(i, r)` and the numbers of the core with which a group begins.

    Where the update starts at zero, exactly one thing is zero: the number that the core names, or `U` where the core
    has none.

    Args:
        group: The group.
        config: Its `start` and `init_weights` are read.
        weights: Returns the blocks of the base weights of a group, for the starts that look at them.
        adapter: Name of the adapter; adapters of one seed start differently.
        seed: Every number comes from a generator of its own that depends on this seed.
        empty: The values do not matter, because they are loaded afterwards.
    """
    (o, i), (k, r) = group.shape, group.rank
    core = group.core
    if empty:
        return torch.empty(o, k), torch.empty(i, r), {n: torch.empty(s) for n, s in core.shapes.items()}

    def draw(name: str) -> Generator:
        return generator_for(seed, adapter, group.name, name)

    start = "orthonormal" if config.init in DATA_INITS else str(config.init)
    held = weights(group) if start in WEIGHT_INITS else []
    if any(W.is_meta for W in held):  # there is nothing to look at, and the factors will be loaded
        start, held = "orthonormal", []
    if held:
        U, V = WEIGHT_INITS[start](held, k, r, draw("UV"))
    else:
        U, V = INITS[start](o, k, draw("U")), INITS[start](i, r, draw("V"))
    numbers = {name: core.init(name, draw(name)) for name in core.shapes}
    if core.zero is not None and config.init_weights is not None:
        numbers[core.zero] *= (
            _RANDOM  # a magnitude that divides by the update's norm sees its direction alone
        )
    if core.zero is not None and config.starts_at_zero:
        numbers[core.zero] = torch.zeros_like(numbers[core.zero])
    if config.starts_at_zero and core.zero is None:
        U = torch.zeros_like(U)
    return U, V, numbers
