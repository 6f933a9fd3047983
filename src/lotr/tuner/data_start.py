"""Starts that look at data: the factors turn towards the gradients or the activations of the first batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..starts import DATA_STARTS, generator_for
from ..subspaces import Subspaces
from .adapted import Adapted, Member
from .group import LotrGroup
from .layer import LotrLinear

Loss = Callable[[nn.Module, Any], Tensor]
Seen = Callable[[Adapted, Tensor, Tensor], None]


@dataclass(frozen=True)
class SiteStart:
    """How much of one site's gradient the factors hold when training starts.

    `kept` is `Σ ‖Uᵀ G V‖² / Σ ‖G‖²` over the batches, `norm` the root of the sum below.
    """

    module: str
    layer: str
    projection: str
    head: int | None
    norm: float
    kept: float


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

    The cores are at zero, so any factors leave the model as it is. Every round is one forward and backward pass over
    the batches; only products with thin matrices are kept, never a gradient of a weight.

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
        products = _Products(kind, spaces)
        _pass(model, found, held, measure, products.see, tick)
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
    energies = _Energies()
    _pass(model, found, held, measure, energies.see, tick)
    return energies.report(found)


def _adapted(model: nn.Module, adapter: str | None) -> list[Adapted]:
    layers = [module for module in model.modules() if isinstance(module, LotrLinear)]
    active = {name for layer in layers for name in layer.active_adapters if name in layer.lotr_site}
    names = active if adapter is None else {adapter}
    found = [layer.lotr_site[name] for layer in layers for name in names if name in layer.lotr_site]
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
    result: Tensor = model(**batch).loss
    return result


def _pass(
    model: nn.Module,
    found: list[Adapted],
    batches: list[Any],
    loss: Loss,
    see: Seen,
    tick: Callable[[], None] | None,
) -> None:
    """Run the batches forward and backward, and show input and output gradient of every adapted module."""
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    training = model.training
    model.train(
        getattr(model, "is_gradient_checkpointing", False)
    )  # without dropout, unless memory asks for it
    try:
        with _watching(found, see):
            for batch in batches:
                loss(model, batch).backward()
                if tick is not None:
                    tick()
    finally:
        model.train(training)
        for parameter, gradient in kept.items():
            parameter.grad = gradient


@contextmanager
def _watching(found: list[Adapted], see: Seen) -> Iterator[None]:
    def hook_of(adapted: Adapted) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:  # not in the first pass of a reentrant checkpoint
                x = args[0].detach()
                output.register_hook(lambda gradient: see(adapted, x, gradient))

        return hook

    handles = [adapted.layer.register_forward_hook(hook_of(adapted)) for adapted in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(member: Member, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:  # (n, b, i), (n, a, o)
    """Return the input and the output gradient of the sites of a part, token by token, in float32."""
    part = member.part
    (row, rows), (column, columns), (a, b) = part.rows, part.columns, part.grid
    inputs = x.narrow(-1, column, columns).flatten(0, -2).float().unflatten(-1, (b, -1))
    return inputs, gradient.detach().narrow(-1, row, rows).flatten(0, -2).float().unflatten(-1, (a, -1))


class _Products:
    """The products of one round: for every site `M V` and `Mᵀ U`, summed over the batches."""

    def __init__(self, kind: str, spaces: dict[LotrGroup, Subspaces]) -> None:
        self.kind, self.spaces = kind, spaces
        self.sums: dict[LotrGroup, dict[tuple[LotrLinear, str], tuple[Tensor, Tensor]]] = {
            g: {} for g in spaces
        }

    @torch.no_grad()
    def see(self, adapted: Adapted, x: Tensor, gradient: Tensor) -> None:
        """Add one batch at one module."""
        for member in adapted.members:
            space = self.spaces[member.group]
            inputs, outputs = _blocks(member, x, gradient)
            U, V = space.U.to(inputs.device), space.V.to(inputs.device)
            if self.kind == "gradient":  # M = G of each site
                left = torch.einsum("nao,nbq->aboq", outputs, inputs @ V)
                right = torch.einsum("nbi,naq->abiq", inputs, outputs @ U)
            else:  # M = the second moments of output gradients and inputs
                left = torch.einsum("nao,naq->aoq", outputs, outputs @ U)
                right = torch.einsum("nbi,nbq->biq", inputs, inputs @ V)
            sums, key = self.sums[member.group], (adapted.layer, member.part.name)
            before = sums.get(key)
            sums[key] = (left, right) if before is None else (before[0] + left, before[1] + right)

    def turn(self) -> None:
        """Turn the factors of every group; processes that saw other batches add theirs."""
        for group, sums in self.sums.items():
            left, right = [], []
            for pair in sums.values():
                for found, product in zip((left, right), pair, strict=True):
                    summed = _over_processes(product)
                    found += summed.reshape(-1, *summed.shape[-2:]).cpu().unbind(0)
            self.spaces[group].turn(left, right)


class _Energies:
    """Sums over the batches of `‖G‖²` and `‖Uᵀ G V‖²` of every site."""

    def __init__(self) -> None:
        self.sums: dict[tuple[LotrLinear, str], Tensor] = {}  # (2, a, b)

    @torch.no_grad()
    def see(self, adapted: Adapted, x: Tensor, gradient: Tensor) -> None:
        """Add one batch at one module; one site's gradient is built at a time."""
        for member in adapted.members:
            inputs, outputs = _blocks(member, x, gradient)
            U = member.group.lotr_U[adapted.adapter].weight.to(inputs)
            V = member.group.lotr_V[adapted.adapter].weight.T.to(inputs)
            if member.part.group.core.is_identity:
                U = torch.eye(U.shape[0]).to(inputs)
            inside = torch.einsum("nak,nbr->abkr", outputs @ U, inputs @ V).square().sum((-2, -1))
            whole = torch.empty_like(inside)
            for at, g in enumerate(outputs.unbind(1)):
                for of, h in enumerate(inputs.unbind(1)):
                    whole[at, of] = (g.T @ h).square().sum()
            key = (adapted.layer, member.part.name)
            self.sums[key] = self.sums.get(key, 0) + torch.stack([whole, inside])

    def report(self, found: list[Adapted]) -> list[SiteStart]:
        """Return one entry a site, in model order."""
        reports = []
        for adapted in found:
            for member in adapted.members:
                key = (adapted.layer, member.part.name)
                whole, inside = (_over_processes(self.sums[key]).flatten(1)).cpu().double()
                for site, energy, kept in zip(
                    member.part.sites, whole.tolist(), inside.tolist(), strict=True
                ):
                    share = kept / energy if energy > 0 else 0.0
                    reports.append(
                        SiteStart(site.module, site.layer, site.projection, site.head, energy**0.5, share)
                    )
        return reports


def _over_processes(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
