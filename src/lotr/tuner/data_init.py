"""Starts that look at data: the factors turn towards gradients, activations or the updates of a short training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from ..math.cores import CORES
from ..math.hooi import Subspaces
from ..math.init import DATA_INITS, generator_for
from .adapted import Adapted, Member
from .config import LotrConfig
from .group import LotrGroup
from .layer import LotrLinear
from .passes import Loss, Seen, look_through, run_through
from .ranks import Numbers, at_rank, check_budget, members_of, set_ranks, share_out
from .statistics import Energies, Products, SiteStart
from .trial import Trial

Tick = Callable[[], None]
Look = Callable[[Seen, Tick | None], None]
_TRIAL_RANK = 8  # of a trial, at least


def init_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    kind: str = "gradient",
    adapter: str | None = None,
    rounds: int | None = None,
    normalise: bool = True,
    loss: Loss | None = None,
    seed: int = 0,
    budget: int | None = None,
    lr: float = 1e-2,
    tick: Tick | None = None,
) -> list[SiteStart]:
    """Turn the shared factors of a fresh adapter towards data, without changing what the model computes.

    The cores are at zero, so any factors leave the model as it is. Whatever `start` the configuration names is
    replaced. Every round is one forward and backward pass over the batches; only thin matrices are kept, never a
    gradient of a weight.

    Args:
        model: A model with an adapter whose update is zero.
        batches: Each as `model(**batch)` takes it: a few, gone through `rounds + 1` times; for `"update"` some fifty,
            gone through `rounds` times.
        kind: `"gradient"`: Tucker-2 of the stacked gradients of the adapted weights. `"activation"`: principal
            directions of the pooled inputs for `V`, of the pooled output gradients for `U`. `"update"`: Tucker-2 of the
            stacked updates of a short training, one step a batch, of a LoRA beside every module, which is then
            dropped; the model stays as it is, its head too. It costs what those steps cost, and holds more of what
            training will do.
        adapter: Name of the adapter; default: the active one.
        rounds: Passes over the batches; default 3, a random one and refinements, and 1 for `"update"`.
        normalise: Weigh every site by one over its norm; gradients of values are often ten times those of queries.
        loss: Returns the loss of a batch; default: the model's own.
        seed: Of the random first round.
        budget: Trained numbers that the adapter may keep, without a head. The groups are then cut down to ranks
            `(k, r)` of their own: greedily those that keep the most gradient, or update, for each number. Make the
            adapter wider than `lotr.largest_rank` allows, for example twice. Cores must be free.
        lr: Learning rate of the short training of `"update"`; nothing else uses it.
        tick: Called after every pass over a batch.

    Returns:
        For each site how much of its gradient, or of its update, the factors keep.

    Raises:
        ConfigError: The kind is unknown, there are no rounds or no batches, the rate is not positive, the update is not
            zero (with some magnitudes it never is), the factors are those of a basis, the adapter takes no part
            (disabled, merged, frozen, or under `torch.no_grad()`), or the budget cannot be met.
        TrainingError: The loss of a batch is NaN or infinite. The factors are as they were.

    Source: HOSVD and HOOI (De Lathauwer et al., 2000) of the gradients at `ΔW = 0`, where `∂L/∂C = σ Uᵀ G V`.
    """
    if kind not in DATA_INITS:
        raise ConfigError(f"kind={kind!r} is no start that looks at data. Known: {', '.join(DATA_INITS)}.")
    if rounds is None:
        rounds = 1 if kind == "update" else 3
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ConfigError(
            f"rounds={rounds!r} leaves the factors as they are. Use a positive integer, for example 3."
        )
    if not isinstance(lr, Real) or isinstance(lr, bool) or not 0 < lr < float("inf"):
        raise ConfigError(f"lr={lr!r} is no learning rate. Use a positive number, for example 1e-2.")
    held = list(batches)
    if not held:
        raise ConfigError("There are no batches to look at. Give at least one.")
    found = _adapted(model, adapter)
    name = found[0].adapter
    config: LotrConfig | None = getattr(model, "peft_config", {}).get(name)
    _check_runs(found)
    _check_free(found, config)
    if budget is not None:
        _check_cut(config, budget)
    members = members_of(model, name)
    group_of = {shared: parts[0][1].part.group for shared, parts in members.items()}
    spaces = {
        shared: Subspaces(group.shape, group.rank, generator_for(seed, name, group.name, "start"), normalise)
        for shared, group in group_of.items()
    }
    measure = loss or _own_loss
    if kind == "update":
        rank = max(_TRIAL_RANK, *(max(group.rank) for group in group_of.values()))
        trial = Trial(found, rank, lr, rounds * len(held), seed)
        run = partial(run_through, model, held, measure)
        energies = _after_trial(run, trial, spaces, rounds, tick)
    else:
        look = partial(look_through, model, found, held, measure)
        energies = _after_passes(look, kind, found, spaces, rounds, tick)
    ranks = None
    if config is not None and budget is not None:
        shares = energies.of_groups(found, normalise)
        ranks = share_out(config.recorded_plan(), shares, budget)
    # nothing can fail from here on
    for shared, (U, V) in energies.factors.items():
        with torch.no_grad():
            if not group_of[shared].core.is_identity:  # there `U` holds the update at zero (LoRA)
                shared.lotr_U[name].weight.copy_(U)
            shared.lotr_V[name].weight.copy_(V.T)
    if config is not None:
        config.init = kind
        if ranks is not None:
            set_ranks(config, members, ranks, lambda group, rank: _leading(name, members[group], *rank))
    return energies.report(found)


def _after_passes(
    look: Look,
    kind: str,
    found: list[Adapted],
    spaces: dict[LotrGroup, Subspaces],
    rounds: int,
    tick: Tick | None,
) -> Energies:
    """Turn the factors by what passes over the batches show; return what they keep, by one more."""
    for _ in range(rounds):
        products = Products(kind, spaces)
        look(products.see, tick)
        products.turn(found)
    energies = Energies({shared: space.factors() for shared, space in spaces.items()})
    look(energies.see, tick)
    energies.gather(found)
    return energies


def _after_trial(
    run: Callable[[Tick], None],
    trial: Trial,
    spaces: dict[LotrGroup, Subspaces],
    rounds: int,
    tick: Tick | None,
) -> Energies:
    """Turn the factors by the updates of a short training; return what they keep of those."""

    def step() -> None:
        trial.step()
        if tick is not None:
            tick()

    try:
        with trial.beside():
            for _ in range(rounds):
                run(step)
    except TrainingError as error:
        raise TrainingError(
            f"{error} Losses that rise before that are those of a rate (lr={trial.lr}) that is too high for the short "
            "training."
        ) from None
    trial.turn(spaces)
    energies = Energies({shared: space.factors() for shared, space in spaces.items()})
    trial.energies(energies)
    return energies


def _leading(adapter: str, parts: list[tuple[Adapted, Member]], k: int, r: int) -> Numbers:
    """Return the first columns of a group's factors, and cores at zero."""
    group = parts[0][1].group
    U, V = group.lotr_U[adapter].weight[:, :k], group.lotr_V[adapter].weight.T[:, :r]
    return U, [U.new_zeros(len(member.part.sites), k, r) for _, member in parts], V


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


def _check_runs(found: list[Adapted]) -> None:
    """Refuse a model through which no gradient of the adapter would flow."""
    name, layers = found[0].adapter, [adapted.layer for adapted in found]
    if not torch.is_grad_enabled():
        raise ConfigError(
            "A start looks at gradients, and under torch.no_grad() or torch.inference_mode() there are none. Call it "
            "outside."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ConfigError(
            f"Adapter {name!r} is disabled, so no gradient reaches it. Leave the disable_adapter() block, or call "
            "enable_adapter_layers(), first."
        )
    if any(layer.merged for layer in layers):
        merged = sorted({adapter for layer in layers for adapter in layer.merged_adapters})
        raise ConfigError(
            f"Adapters {', '.join(merged)} are merged into the weights, so no gradient reaches {name!r}. Call "
            "unmerge_adapter() first."
        )


def _check_free(found: list[Adapted], config: LotrConfig | None) -> None:
    """Refuse factors that may not turn."""
    if config is not None and config.refers_to_basis:
        raise ConfigError(
            f"The factors are those of basis={config.basis!r}, to which the cores will refer, so they stay. "
            "Leave the start out, or the basis."
        )
    for adapted in found:
        if adapted.magnitude.divides_by_update:
            magnitude = None if config is None else config.magnitude
            raise ConfigError(
                f"Adapter {adapted.adapter!r} has magnitude={magnitude!r}, which divides by the norm of the update, so "
                "the update never is zero and other factors would change the model. Leave the start out, or make the "
                "adapter with another magnitude."
            )
        if any(adapted.placed(member).update.left().any() for member in adapted.members):
            raise ConfigError(
                f"The update of adapter {adapted.adapter!r} is not zero, so other factors would change the model. "
                "Start before training, with init_weights=True."
            )


def _check_cut(config: LotrConfig | None, budget: int) -> None:
    """Refuse a budget that cannot be shared out."""
    core = None if config is None else config.core
    if config is None or not CORES[str(core)].by_site:
        raise ConfigError(
            f"budget={budget:,} gives every group ranks of its own, and that needs a PEFT model with free cores; here "
            f"core={core!r}, which has no cut. lotr.largest_rank finds one rank for all groups."
        )
    check_budget(at_rank(config.recorded_plan(), config, (1, 1)), budget)


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
