"""What a pass over batches shows at every adapted module: products with the gradient of its weight, and its energy."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, TrainingError
from ..math.hooi import Subspaces
from .adapted import Adapted, Member
from .group import LotrGroup
from .layer import LotrLinear


@dataclass(frozen=True)
class SiteStart:
    """How much of one site's gradient the factors hold when training starts, or of its update in a trial.

    `kept` is `Σ ‖Uᵀ G V‖² / Σ ‖G‖²` over the batches, `norm` the root of the sum below; after a trial `G` is `ΔW`.
    """

    module: str
    layer: str
    projection: str
    head: int | None
    norm: float
    kept: float


def check_products(products: Iterable[Tensor], module: str) -> None:
    """Refuse products with gradients that are not finite."""
    if not all(bool(product.isfinite().all()) for product in products):
        raise TrainingError(
            f"The gradient at {module!r} is not finite, although every loss is; the factors are as they were. Compute "
            "in a wider type than that of the base model, or leave out batches."
        )


def check_reached(found: list[Adapted], seen: Container[tuple[LotrLinear, str]]) -> None:
    """Refuse modules of which nothing was seen."""
    for adapted in found:
        for member in adapted.members:
            if (adapted.layer, member.part.name) not in seen:
                raise ConfigError(
                    f"No gradient reaches {member.part.sites[0].module!r}: adapter {adapted.adapter!r} is frozen, or "
                    "no batch goes through the module. Load the adapter with is_trainable=True, give other batches, or "
                    "leave the module out with exclude_modules."
                )


def _blocks(member: Member, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:  # (n, b, i), (n, a, o)
    """Return the input and the output gradient of the sites of a part, token by token, in float32."""
    part = member.part
    (row, rows), (column, columns), (a, b) = part.rows, part.columns, part.grid
    inputs = x.narrow(-1, column, columns).flatten(0, -2).float().unflatten(-1, (b, -1))
    return inputs, gradient.detach().narrow(-1, row, rows).flatten(0, -2).float().unflatten(-1, (a, -1))


class Products:
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

    def turn(self, found: list[Adapted]) -> None:
        """Turn the factors of every group; processes that saw other batches add theirs.

        Raises:
            ConfigError: A module had no gradient.
            TrainingError: A gradient was not finite.
        """
        check_reached(found, {key for sums in self.sums.values() for key in sums})
        paths = {(a.layer, m.part.name): m.part.sites[0].module for a in found for m in a.members}
        for group, sums in self.sums.items():
            left: list[Tensor] = []
            right: list[Tensor] = []
            for key in _in_model_order(found, sums):  # the same in all processes
                pair = tuple(over_processes(product) for product in sums[key])
                check_products(pair, paths[key])
                for products, summed in zip((left, right), pair, strict=True):
                    products += summed.reshape(-1, *summed.shape[-2:]).cpu().unbind(0)
            self.spaces[group].turn(left, right)


class Energies:
    """Sums over the batches of `‖G‖²` and, column by column, of the squares of `Uᵀ G V` of every site.

    Args:
        factors: `U` `(o, k)` and `V` `(i, r)` of every group.
    """

    def __init__(self, factors: Mapping[LotrGroup, tuple[Tensor, Tensor]]) -> None:
        self.factors = factors
        # `‖G‖²` (a, b) and squares (a, b, k, r), of the sites of each part
        self.sums: dict[tuple[LotrLinear, str], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def see(self, adapted: Adapted, x: Tensor, gradient: Tensor) -> None:
        """Add one batch at one module; one site's gradient is built at a time."""
        for member in adapted.members:
            inputs, outputs = _blocks(member, x, gradient)
            U, V = (factor.to(inputs) for factor in self.factors[member.group])
            identity = member.part.group.core.is_identity
            left = outputs if identity else outputs @ U
            inside = torch.einsum("nak,nbr->abkr", left, inputs @ V).square()
            if identity:  # the whole output side is kept
                inside = inside.sum(-2, keepdim=True)
            whole = inside.new_empty(inside.shape[:2])
            for at, g in enumerate(outputs.unbind(1)):
                for of, h in enumerate(inputs.unbind(1)):
                    whole[at, of] = (g.T @ h).square().sum()
            key = (adapted.layer, member.part.name)
            before = self.sums.get(key)
            self.sums[key] = (whole, inside) if before is None else (before[0] + whole, before[1] + inside)

    def gather(self, found: list[Adapted]) -> None:
        """Add what other processes saw.

        Raises:
            ConfigError: A module had no gradient.
            TrainingError: A gradient was not finite.
        """
        check_reached(found, self.sums)
        self.sums = {
            key: (over_processes(self.sums[key][0]), over_processes(self.sums[key][1]))
            for key in _in_model_order(found, self.sums)
        }
        for adapted in found:
            for member in adapted.members:
                check_products(self.sums[adapted.layer, member.part.name], member.part.sites[0].module)

    def of_groups(self, found: list[Adapted], normalise: bool) -> dict[str, Tensor]:
        """Return for every group what each pair of columns keeps, `(k, r)`, added over its sites.

        Args:
            found: The adapted modules.
            normalise: Add shares of each site's `‖G‖²`.
        """
        groups: dict[str, Tensor] = {}
        for adapted in found:
            for member in adapted.members:
                whole, inside = (t.cpu().double() for t in self.sums[adapted.layer, member.part.name])
                kept = inside / whole.clamp_min(1e-300)[..., None, None] if normalise else inside
                name = member.part.group.name
                groups[name] = groups.get(name, 0) + kept.sum((0, 1))
        return groups

    def report(self, found: list[Adapted]) -> list[SiteStart]:
        """Return one entry a site, in model order, at the ranks that the groups have now."""
        reports = []
        for adapted in found:
            for member in adapted.members:
                k, r = member.part.group.rank
                whole, inside = self.sums[adapted.layer, member.part.name]
                energies = whole.flatten().cpu().double().tolist()
                kept = inside[..., :k, :r].sum((-2, -1)).flatten().cpu().double().tolist()
                for site, energy, part in zip(member.part.sites, energies, kept, strict=True):
                    share = part / energy if energy > 0 else 0.0
                    reports.append(
                        SiteStart(site.module, site.layer, site.projection, site.head, energy**0.5, share)
                    )
        return reports


def _in_model_order(
    found: list[Adapted], sums: Container[tuple[LotrLinear, str]]
) -> list[tuple[LotrLinear, str]]:
    keys = [(adapted.layer, member.part.name) for adapted in found for member in adapted.members]
    return [key for key in keys if key in sums]


def n_processes() -> int:
    """Return how many processes work together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of what all processes have; each gets it."""
    if n_processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
