"""What an adapted weight should be, from the numbers of a file and the equations alone: slow, dense, independent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lotr.sharing.blocks import Site
from lotr.sharing.plan import Group, Plan

ROOT = "base_model.model."


def core(group: Group, site: Site, tensors: dict[str, Tensor]) -> Tensor:  # (k, r)
    """`C_s` of a core that its group keeps."""
    kind, index = type(group.core).__name__, group.index[site]
    at = f"{ROOT}lotrbasis.{group.name}.lotr_core."
    if kind == "IdentityCore":
        return torch.eye(group.rank[0])
    if kind == "CPCore":
        return torch.stack([tensors[f"{at}factor_{n}"][i] for n, i in enumerate(index)]).prod(0).diag()
    if kind == "TTCore":
        C = tensors[f"{at}core_0"][index[0]]
        for n, i in enumerate(index[1:], start=1):
            C = C @ tensors[f"{at}core_{n}"][i]
        return C
    assert kind == "TuckerCore"
    C = tensors[f"{at}core"]
    for n, i in enumerate(index):  # the first axis that is left is this mode's
        C = torch.einsum("q...,q->...", C, tensors[f"{at}factor_{n}"][i])
    return C


def site_updates(plan: Plan, tensors: dict[str, Tensor], scaling: float) -> list[tuple[Site, Tensor]]:
    """`σ U C_s Vᵀ` of every site, in the order of the modules' parts."""
    found = []
    for path, parts in plan.parts.items():
        for part in parts:
            group = part.group
            at = f"{ROOT}lotrbasis.{group.name}"
            U, Vt = tensors[f"{at}.lotr_U.weight"], tensors[f"{at}.lotr_V.weight"]
            (k, r), (o, i) = group.rank, group.shape
            for site in part.sites:
                if type(group.core).__name__ == "FreeCore":
                    held = tensors[f"{ROOT}{path}.lotr_C.{part.name or 'weight'}"]
                    down, across = (site.row - part.rows[0]) // o, (site.column - part.columns[0]) // i
                    C = held[down * k : (down + 1) * k, across * r : (across + 1) * r]
                else:
                    C = core(group, site, tensors)
                found.append((site, scaling * U @ C.to(U) @ Vt))
    return found


def updates(plan: Plan, tensors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Path of a module → `ΔW`, `(out, in)`, before the magnitude."""
    dense = {target.path: torch.zeros(target.shape) for target in plan.targets}
    for site, dW in site_updates(plan, tensors, scaling):
        o, i = site.shape
        block = dense[site.module][site.row : site.row + o, site.column : site.column + i]
        assert not block.any(), "sites of a module do not overlap"
        block += dW
    return dense


def rescaled(
    W: Tensor, dW: Tensor, magnitude: str, numbers: Mapping[str, Tensor], constant: bool = False
) -> Tensor:
    """The adapted weight, by the equations of the three papers on dense matrices.

    With `constant` no gradient flows through a norm.
    """

    def norm(matrix: Tensor, **along: Any) -> Tensor:
        size = matrix.norm(**along)
        return size.detach() if constant else size

    if magnitude == "none":
        return W + dW
    if magnitude == "base_and_update":
        return numbers["alpha"] * W / norm(W) + numbers["beta"] * dW / norm(dW)
    rows = (W + dW) / norm(W + dW, dim=1, keepdim=True)
    if magnitude == "per_output":
        return numbers["m"][:, None] * rows
    Z = numbers["m_out"][:, None] * rows
    return Z / norm(Z, dim=0) * numbers["m_in"]


def weight_of(module: nn.Module) -> Tensor:  # (out, in), a view
    return module.weight.T if isinstance(module, Conv1D) else module.weight


@torch.no_grad()
def adapt(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], scaling: float = 1.0) -> nn.Module:
    """Write the adapted weights into a plain model."""
    for path, dW in updates(plan, tensors, scaling).items():
        at = f"{ROOT}{path}.lotr_magnitude."
        numbers = {key.removeprefix(at): tensor for key, tensor in tensors.items() if key.startswith(at)}
        W = weight_of(model.get_submodule(path))
        W.copy_(rescaled(W, dW, plan.magnitude, numbers))
    return model
