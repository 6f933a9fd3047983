"""What an adapted weight should be, from an adapter's numbers and the equations of the papers, dense."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssForCausalLM
from transformers.pytorch_utils import Conv1D

from lotr.sharing.blocks import Site
from lotr.sharing.groups import Group
from lotr.sharing.plan import Plan

ROOT = "base_model.model."
#: Rows whose core is a matrix a site, which the file has beside the site's module.
FREE = ("lotr", "lotr_joint", "moslora", "fact_tt", "lora_xs", "lora_sb")
ONE = ("lora", "dora", "bora", "map")
_LETTERS = {"layer": "a", "projection": "b", "head": "c", "expert": "d"}


def core(row: str, n: Mapping[str, Tensor], at: dict[str, int]) -> Tensor:  # (k, r)
    """`C_s` of a core that its group keeps, as the paper of the row writes it.

    Args:
        row: Name of the row.
        n: Numbers of the core, by their last name in the file.
        at: Place of the site along each coordinate.
    """
    if row == "fact_tk":
        return torch.einsum("qkr,q->kr", n["core"], n["factor_0"][at["site"]])
    if row == "cara":
        head = n["factor_1"][at["head"]] if "head" in at else 1.0
        return torch.diag(n["weights"] * n["factor_0"][at["site"]] * head)
    if row.startswith(
        "metatt"
    ):  # x · G1 · G2[layer] · G3[matrix] (· G4[head]) · G5, cores in the file from the output
        train = [n[name].mT for name in sorted(n, reverse=True)]
        places = [at[mode] for mode in ("expert", "layer", "projection", "head") if mode in at]
        return torch.linalg.multi_dot([G[place] for G, place in zip(train, places, strict=True)]).T
    assert row == "lorta" or row.startswith("tenslora")
    along = [mode for mode in ("layer", "projection", "head", "expert") if mode in at]
    if row == "lorta" or row.endswith("_cp"):
        return torch.stack([n[f"factor_{axis}"][at[mode]] for axis, mode in enumerate(along)]).prod(0).diag()
    letters = [_LETTERS[mode] for mode in along]
    vectors = [n[f"factor_{axis}"][at[mode]] for axis, mode in enumerate(along)]
    return torch.einsum(f"{''.join(letters)}kr,{','.join(letters)}->kr", n["core"], *vectors)


def site_updates(
    row: str, plan: Plan, tensors: Mapping[str, Tensor], scaling: float
) -> list[tuple[Site, Tensor]]:
    """`σ U C_s Vᵀ` of every site, in the order of the modules' parts; narrower sites use the first rows."""
    updates = []
    shapes = {target.path: target.shape for target in plan.targets}
    of_groups = {group.name: of_group(group, tensors) for group in plan.groups}
    for path, parts in plan.parts.items():
        height, width = shapes[path]
        for part in parts:
            group = part.group
            at = f"{ROOT}lotrbasis.{group.name}"
            U, V = tensors[f"{at}.lotr_U.weight"], tensors[f"{at}.lotr_V.weight"].T
            numbers = tensors if row in FREE else of_groups[group.name]
            for site in part.sites:
                C = core_of(row, path, part.name, part.sites[0], site, group, numbers).to(U)
                (N, M), (n, m) = (len(U), len(V)), site.shape
                gain = (N / n) ** 0.5 * (M / m) ** 0.5
                dW = scaling * gain * U[:n] @ C @ V[:m].T
                # CaRA's second tensor is the transpose of all weights but those wider than high
                turned = row == "cara" and site.head is None and n == m and height >= width
                updates.append((site, dW.T if turned else dW))
    return updates


def of_group(group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Last name in the file → number of the core that a group keeps."""
    prefix = f"{ROOT}lotrbasis.{group.name}.lotr_core."
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def core_of(
    row: str, path: str, part: str, first: Site, site: Site, group: Group, numbers: Mapping[str, Tensor]
) -> Tensor:
    """`C_s` of a site, from all tensors of a file where they are free, else from those `of_group`."""
    (k, r), (o, i) = group.rank, site.shape
    if row in ONE:
        return torch.eye(r)
    if row in FREE:
        cores = numbers[f"{ROOT}{path}.lotr_C.{part}"]
        down, across = (site.row - first.row) // o, (site.column - first.column) // i
        return cores[down * k : (down + 1) * k, across * r : (across + 1) * r]
    return core(row, numbers, dict(zip(group.modes, group.index[site], strict=True)))


def updates(row: str, plan: Plan, tensors: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Path of a module → `ΔW`, `(out, in)`, before the magnitude."""
    dtype = next(iter(tensors.values())).dtype
    dense = {target.path: torch.zeros(target.shape, dtype=dtype) for target in plan.targets}
    for site, dW in site_updates(row, plan, tensors, scaling):
        o, i = site.shape
        block = dense[site.module][site.row : site.row + o, site.column : site.column + i]
        assert not block.any(), "sites of a module do not overlap"
        block += dW
    return dense


def biases(row: str, plan: Plan, tensors: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Path of a module → what CaRA adds to its bias, `s · CP_bias`: o, fc1 and fc2 have a vector each in all layers."""
    vectors: dict[str, list[Tensor]] = defaultdict(list)  # fc1's is four squares high
    for key, tensor in sorted(tensors.items()):
        if row == "cara" and (named := re.search(r"\.b-(.+?)(-\d)?$", key)):
            vectors[named[1]].append(tensor)
    added = {}
    for path in plan.parts:
        names = [name for name in vectors if f".{path}".replace(".", "-").endswith(f"-{name}")]
        if names:
            added[path] = scaling * torch.cat(vectors[max(names, key=len)])
    return added


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


def adapted(
    row: str, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """Name of a parameter of a plain model → its adapted weight, in the layout of the model."""
    weights = {}
    for path, dW in updates(row, plan, tensors, scaling).items():
        at = f"{ROOT}{path}.lotr_magnitude."
        numbers = {key.removeprefix(at): tensor for key, tensor in tensors.items() if key.startswith(at)}
        if ".experts." in path:
            stack = model.get_parameter(path)
            dW = dW.unflatten(0, (len(stack), -1))
            weights[path] = stack.detach() + (dW.mT if isinstance(model, GptOssForCausalLM) else dW)
            continue
        module = model.get_submodule(path)
        W = rescaled(weight_of(module).detach(), dW, plan.magnitude, numbers, constant=True)
        weights[f"{path}.weight"] = W.T if isinstance(module, Conv1D) else W
    for path, b in biases(row, plan, tensors, scaling).items():
        weights[f"{path}.bias"] = model.get_submodule(path).bias.detach() + b
    return weights


def adapt(
    model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], scaling: float = 1.0, row: str = "lotr"
) -> nn.Module:
    """Write the adapted weights into a plain model."""
    model.load_state_dict(adapted(row, model, plan, tensors, scaling), strict=False)
    return model
