"""A short training that is thrown away: a LoRA beside every adapted module shows where the weights want to go.

The gradient at the start points where the loss falls at once; where training ends up it holds little of
(`benchmarks/quality_fit.py`). The updates of a trial hold more, for the price of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from ..math.hooi import Subspaces
from ..math.init import generator_for, orthonormal
from .adapted import Adapted, Member
from .group import LotrGroup
from .layer import LotrLinear
from .statistics import Energies, check_reached, n_processes, over_processes

_ROUNDS = 5  # of HOOI: they cost no pass over data
_CLIP = 1.0  # norm of all gradients


@dataclass(frozen=True)
class _Pair:
    """`ΔW = B A / √r` at one module; `A` starts with orthonormal rows, `B` at zero."""

    A: nn.Parameter  # (r, in)
    B: nn.Parameter  # (out, r)

    def update(self, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        wide = x.to(self.A.dtype)
        return F.linear(F.linear(wide, self.A), self.B) / len(self.A) ** 0.5

    def blocks(self, member: Member) -> tuple[Tensor, Tensor]:  # (a, o, r), (b, r, i)
        """Return both sides of the update of the sites of a part."""
        part = member.part
        (row, rows), (column, columns), (a, b) = part.rows, part.columns, part.grid
        B = self.B.detach()[row : row + rows].unflatten(0, (a, -1))
        A = self.A.detach()[:, column : column + columns].unflatten(1, (b, -1)).movedim(1, 0)
        return B / len(self.A) ** 0.5, A


class Trial:
    """LoRAs beside the adapted modules, and their optimiser.

    Sizes are such that one rate serves every width and rank: with inputs of size one, a step changes outputs by the
    rate, and turns the rows of `A` by twenty times as much.

    Args:
        found: The adapted modules.
        rank: Rank of every LoRA.
        lr: Learning rate of AdamW for `B`; it falls linearly to zero.
        steps: How many there will be.
        seed: Decides `A`.
    """

    def __init__(self, found: list[Adapted], rank: int, lr: float, steps: int, seed: int) -> None:
        _check_trains(found)
        _check_equal(steps)
        self.found, self.lr = found, lr
        self.pairs: dict[LotrLinear, _Pair] = {}
        groups: list[dict[str, Any]] = []
        for adapted in found:
            layer, module = adapted.layer, adapted.members[0].part.sites[0].module
            home = layer.home
            if home.type == "meta":  # the base is offloaded; inputs come to where the factors are
                home = adapted.members[0].group.lotr_U[adapted.adapter].weight.device
            draw = generator_for(seed, adapted.adapter, module, "trial")
            rows = orthonormal(layer.in_features, min(rank, layer.in_features), draw).T.contiguous()
            pair = _Pair(
                nn.Parameter(rows.to(home)),
                nn.Parameter(torch.zeros(layer.out_features, len(rows), device=home)),
            )
            self.pairs[layer] = pair
            groups += [
                {"params": [pair.B], "lr": lr},
                {"params": [pair.A], "lr": 20 * lr / layer.in_features**0.5},
            ]
        self._reached: set[LotrLinear] = set()
        self._parameters = [p for pair in self.pairs.values() for p in (pair.A, pair.B)]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda n: max(0.0, 1 - n / steps))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Add the updates to the outputs of the modules."""

        def hook_of(pair: _Pair) -> Callable[..., Tensor]:
            return lambda module, args, output: output + pair.update(args[0]).to(output.dtype)

        handles = [layer.register_forward_hook(hook_of(pair)) for layer, pair in self.pairs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self) -> None:
        """Take one step after a backward pass; processes take the mean of their gradients.

        Raises:
            TrainingError: A gradient is not finite.
        """
        self._reached |= {layer for layer, pair in self.pairs.items() if pair.B.grad is not None}
        for parameter in self._parameters:  # a process whose batch missed a module has nothing to add there
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = over_processes(gradient) / n_processes()
        norm = nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        if not norm.isfinite():
            raise TrainingError(
                f"The gradients of the short training are not finite ({norm.item()}), although the loss is; the "
                "factors are as they were. Compute in a wider type."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()

    def turn(self, spaces: dict[LotrGroup, Subspaces]) -> None:
        """Turn the factors of every group towards the updates.

        Raises:
            ConfigError: No batch went through a module.
        """
        seen = [float(layer in self._reached) for layer in self.pairs]
        flags = over_processes(torch.tensor(seen, device=self._parameters[0].device))
        reached = {layer for layer, flag in zip(self.pairs, flags.tolist(), strict=True) if flag}
        check_reached(self.found, _parts(self.found, lambda adapted, _: adapted.layer in reached))
        for group, space in spaces.items():
            sides = [self.pairs[a.layer].blocks(m) for a in self.found for m in a.members if m.group is group]
            updates = [(B.cpu(), A.cpu()) for left, right in sides for B in left for A in right]
            for _ in range(_ROUNDS):
                space.turn(
                    [B @ (A @ space.V) for B, A in updates],
                    [A.T @ (B.T @ space.U) for B, A in updates],
                )

    def energies(self, energies: Energies) -> None:
        """Fill in what the factors keep of the updates."""
        for adapted in self.found:
            for member in adapted.members:
                B, A = self.pairs[adapted.layer].blocks(member)
                U, V = (factor.to(B) for factor in energies.factors[member.group])
                # ‖B A‖² from two small squares
                whole = torch.einsum("axy,byx->ab", B.mT @ B, A @ A.mT)
                left = B if member.part.group.core.is_identity else U.T @ B
                inside = (left[:, None] @ (A @ V)[None]).square()
                if member.part.group.core.is_identity:
                    inside = inside.sum(-2, keepdim=True)
                energies.sums[adapted.layer, member.part.name] = whole, inside


def _parts(found: list[Adapted], which: Callable[[Adapted, Member], bool]) -> set[tuple[LotrLinear, str]]:
    return {(a.layer, m.part.name) for a in found for m in a.members if which(a, m)}


def _check_trains(found: list[Adapted]) -> None:
    """Refuse an adapter that is frozen."""

    def trains(adapted: Adapted, member: Member) -> bool:
        name, group = adapted.adapter, member.group
        held = (group.lotr_U, group.lotr_V, group.lotr_core, adapted.layer.lotr_C)
        return any(p.requires_grad for of in held if name in of for p in of[name].parameters())

    check_reached(found, _parts(found, trains))


def _check_equal(steps: int) -> None:
    """Refuse processes with unequal numbers of batches: the ones with more would wait for the others."""
    if n_processes() == 1:
        return
    all_of: list[Any] = [None] * n_processes()
    torch.distributed.all_gather_object(all_of, steps)
    if len(set(all_of)) > 1:
        raise ConfigError(
            f"Processes take steps of a start from updates together, and theirs are {all_of}. Give every process as "
            "many batches."
        )
