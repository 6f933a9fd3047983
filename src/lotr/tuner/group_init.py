"""The numbers with which a group of an adapter begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..math.init import CORE_INITS, DATA_INITS, INITS, WEIGHT_INITS, generator_for
from ..sharing.blocks import Site
from ..sharing.groups import Group
from .config import LotrConfig
from .experts import ExpertsWeight
from .weight import base_weight

#: Size of a random update (`init_weights=False`): small beside a weight, since `U` and `V` are orthonormal.
_RANDOM = 0.1


def start_group(
    group: Group,
    config: LotrConfig,
    modules: Mapping[str, nn.Module | ExpertsWeight],
    adapter: str,
    empty: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return `U` `(o, k)`, `V` `(i, r)` and the numbers of the core with which a group begins.

    Where the update starts at zero, exactly one thing is zero: the number that the core names, `U` or `V`. Every number
    comes from a generator of its own, which depends on the seed and on the adapter's name. Some starts look at the
    weights of `modules`, which are by path. `empty` values are loaded afterwards.
    """
    (o, i), (k, r), core = group.shape, group.rank, group.core
    if empty:
        return torch.empty(o, k), torch.empty(i, r), {n: torch.empty(s) for n, s in core.shapes.items()}
    seed = torch.initial_seed() if config.seed is None else config.seed

    def draw(name: str) -> Generator:
        return generator_for(seed, adapter, group.name, name)

    start = "orthonormal" if config.init in DATA_INITS else config.init
    weights = _blocks(group, modules) if start in WEIGHT_INITS else []
    if any(W.is_meta for W in weights):  # there is nothing to look at, and the factors will be loaded
        start = "orthonormal"
    if start in WEIGHT_INITS:
        U, V = WEIGHT_INITS[start](weights, k, r, draw("UV"))
    else:
        U, V = INITS[start](o, k, draw("U")), INITS[start](i, r, draw("V"))
    own = CORE_INITS.get(str(config.core_init))
    numbers = {
        name: own(shape, draw(name)) if own else core.init(name, draw(name))
        for name, shape in core.shapes.items()
    }
    if config.core_init == "kaiming":
        beside = Counter(map(_strip, group.sites))
        for site in group.sites:
            numbers["C"][group.index[site]] /= beside[_strip(site)] ** 0.5
    if config.starts_at_zero:
        at_zero = {"output": U, "input": V}.get(config.zero)
        (numbers[str(core.zero)] if at_zero is None else at_zero).zero_()
    elif core.zero is not None and config.init_weights is not None:
        # a magnitude that divides by the update's norm sees its direction alone
        numbers[core.zero] *= _RANDOM
    return U, V, numbers


def _strip(site: Site) -> tuple[str, int]:
    """Return what the sites have in common whose cores add up to the same outputs, as a linear layer's inputs do."""
    return site.module, site.column if site.transposed else site.row


def _blocks(group: Group, modules: Mapping[str, nn.Module | ExpertsWeight]) -> list[Tensor]:
    """Return the blocks of the base weights that share a group's factors, `(o, i)` each."""
    weights = {site.module: base_weight(modules[site.module]) for site in group.sites}
    blocks = []
    for site in group.sites:
        (n, m), (o, i) = site.shape, group.shape
        W = weights[site.module][site.row : site.row + n, site.column : site.column + m]
        W = W.T if site.transposed else W
        blocks.append(W if W.shape == (o, i) else F.pad(W, (0, i - m, 0, o - n)))
    return blocks
