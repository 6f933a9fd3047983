"""Starts that look at data: the factors turn towards the gradients or the activations of the first batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..starts import DATA_STARTS, generator_for
from ..subspaces import Subspaces
from .adapted import Adapted
from .group import LotrGroup
from .layer import LotrLinear
from .statistics import Energies, Loss, Products, SiteStart, look_through


def start(
    model: nn.Module,
    batches: Iterable[Any],
    kind: str = "gradient",
    adapter: str | None = None,
    rounds: int = 3,
    normalise: bool = True,
    loss: Loss | None = None,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> list[SiteStart]:
    """Turn the shared factors of a fresh adapter towards data, without changing what the model computes.

    The cores are at zero, so any factors leave the model as it is. Whatever `start` the configuration names is
    replaced. Every round is one forward and backward pass over the batches; only products with thin matrices are kept,
    never a gradient of a weight.

    Args:
        model: A model with an adapter whose update is zero.
        batches: A few batches, each as `model(**batch)` takes it; gone through `rounds + 1` times.
        kind: `"gradient"`: Tucker-2 of the stacked gradients of the adapted weights. `"activation"`: principal
            directions of the pooled inputs for `V`, of the pooled output gradients for `U`.
        adapter: Name of the adapter; default: the active one.
        rounds: Passes over the batches that turn the factors: a random one, then refinements.
        normalise: Weigh every site by one over its norm; gradients of values are often ten times those of queries.
        loss: Returns the loss of a batch; default: the model's own.
        seed: Of the random first round.
        tick: Called after every pass over a batch.

    Returns:
        For each site how much of its gradient the factors keep.

    Raises:
        ConfigError: The kind is unknown, the update is not zero, or there are no batches.

    Source: HOSVD and HOOI (De Lathauwer et al., 2000) of the gradients at `ΔW = 0`, where `∂L/∂C = σ Uᵀ G V`.
    """
    if kind not in DATA_STARTS:
        raise ConfigError(f"kind={kind!r} is no start that looks at data. Known: {', '.join(DATA_STARTS)}.")
    held = list(batches)
    if not held:
        raise ConfigError("There are no batches to look at. Give at least one.")
    found = _adapted(model, adapter)
    _check_zero(found)
    measure = loss or _own_loss
    spaces: dict[LotrGroup, Subspaces] = {}
    for adapted in found:
        for member in adapted.members:
            group = member.part.group
            if member.group not in spaces:
                generator = generator_for(seed, adapted.adapter, group.name, "start")
                spaces[member.group] = Subspaces(group.shape, group.rank, generator, normalise)
    for _ in range(rounds):
        products = Products(kind, spaces)
        look_through(model, found, held, measure, products.see, tick)
        products.turn()
    name = found[0].adapter
    for group, space in spaces.items():
        U, V = space.factors()
        with torch.no_grad():
            if not _starts_at_zero_factor(found, group):
                group.lotr_U[name].weight.copy_(U)
            group.lotr_V[name].weight.copy_(V.T)
    if name in getattr(model, "peft_config", {}):
        model.peft_config[name].start = kind
    energies = Energies()
    look_through(model, found, held, measure, energies.see, tick)
    return energies.report(found)


def _adapted(model: nn.Module, adapter: str | None) -> list[Adapted]:
    layers = [module for module in model.modules() if isinstance(module, LotrLinear)]
    active = {name for layer in layers for name in layer.active_adapters if name in layer.lotr_site}
    names = active if adapter is None else {adapter}
    found = [layer.adapted(name) for layer in layers for name in names if name in layer.lotr_site]
    if not layers:
        raise ConfigError(
            "The model has no adapter of this library. Make one first: get_peft_model(model, LotrConfig())."
        )
    if not found or len(names) != 1:
        raise ConfigError(
            f"A start turns the factors of one adapter, and {sorted(names)} on this model are {len(found)} modules. "
            "Name one adapter that the model has."
        )
    return found


def _check_zero(found: list[Adapted]) -> None:
    for adapted in found:
        if any(adapted.placed(member).update.left().any() for member in adapted.members):
            raise ConfigError(
                f"The update of adapter {adapted.adapter!r} is not zero, so other factors would change the model. "
                "Start before training, with init_weights=True."
            )


def _starts_at_zero_factor(found: list[Adapted], group: LotrGroup) -> bool:
    """Whether `U` is what holds the update of a group at zero (LoRA); then only `V` has a start."""
    members = (member for adapted in found for member in adapted.members if member.group is group)
    return next(members).part.group.core.is_identity


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"A batch is a {type(batch).__name__}, and the model takes it by name. Give mappings, for example "
            '{"input_ids": …, "labels": …}, or a function as loss.'
        )
    result: Tensor | None = getattr(model(**batch), "loss", None)
    if result is None:
        raise ConfigError(
            "The model gave no loss: the batch has no labels. Add them, or give a function as loss."
        )
    return result
