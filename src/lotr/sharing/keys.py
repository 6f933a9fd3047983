"""The names of an adapter's tensors in its file."""

from __future__ import annotations

import re

from ..math.magnitude import MAGNITUDES
from .blocks import Target
from .groups import Group, Part
from .paths import normalise
from .plan import Plan

#: What every name of this method begins with, as PEFT's registry has it.
PREFIX = "lotr_"
#: The one module that holds the shared factors of a model.
BASIS = "lotrbasis"
#: Names of the shared factors `U` and `V`, and of the numbers of a core that are kept with them.
FACTORS = ("lotr_U", "lotr_V", "lotr_shared")
_ROOT = "base_model.model."


def file_key(key: str) -> str:
    """Return the name in a file of a state dict's entry: wrappers removed, the basis at the root of the model.

    Example:
        >>> file_key("base_model.model.0.lotrbasis.query_8x8.lotr_U.weight")
        'base_model.model.lotrbasis.query_8x8.lotr_U.weight'
    """
    key = normalise(key)
    before, basis, after = f".{key}".partition(f".{BASIS}.")
    if not basis:
        return key
    root = _ROOT if before.startswith(f".{_ROOT}") or f".{_ROOT}".startswith(f"{before}.") else ""
    return f"{root if before else ''}{BASIS}.{after}"


def without_adapter(key: str, adapter: str) -> str:
    """Return a key of this method without the adapter's name, which stands right behind the method's own component.

    Example:
        >>> without_adapter("h.0.c_attn.lotr_C.default.query", "default")
        'h.0.c_attn.lotr_C.query'
    """
    return re.sub(rf"(\.{PREFIX}\w+)\.{re.escape(adapter)}(?=\.[^.]+$)", r"\1", key)


def group_in(key: str) -> str:
    """Return the name of the group in a key, or an empty string."""
    parts = key.split(".")
    return parts[parts.index(BASIS) + 1] if BASIS in parts else ""


def is_factor(key: str) -> bool:
    """Whether a key names a shared factor `U` or `V`."""
    return any(f".{name}." in key for name in FACTORS)


def group_keys(group: Group) -> dict[str, str]:
    """Return the names in a file of what a group shares: `U`, `V` (transposed), the numbers of its core, and biases."""
    root = f"{_ROOT}{BASIS}.{group.name}"
    place = dict.fromkeys(group.core.shapes, "lotr_core") | dict.fromkeys(group.core.of_basis, "lotr_shared")
    core = {} if group.core.by_site else {name: f"{root}.{place[name]}.{name}" for name in place}
    biases = {name: f"{root}.lotr_core.{name}" for name in group.biases}
    return {"U": f"{root}.lotr_U.weight", "V": f"{root}.lotr_V.weight", **core, **biases}


def core_key(part: Part) -> str:
    """Return the name in a file of the cores that belong to the sites of a part."""
    return f"{_ROOT}{normalise(part.sites[0].module)}.lotr_C.{part.name}"


def magnitude_keys(plan: Plan, target: Target) -> dict[str, str]:
    """Return the names in a file of the numbers of a module's magnitude."""
    names = MAGNITUDES[plan.magnitude].shapes(*target.shape)
    return {name: f"{_ROOT}{normalise(target.path)}.lotr_magnitude.{name}" for name in names}


def lora_keys(plan: Plan, target: Target) -> tuple[str, str, str]:
    """Return the names of `A`, `B` and DoRA's norms in the file of a plain LoRA.

    PEFT wraps a module once for each of its adapted parameters, the last one outermost.
    """
    path = target.path
    if target.experts:
        path = path.rpartition(".")[0]
        siblings = [other for other in plan.targets if other.path.rpartition(".")[0] == path]
        path += ".base_layer" * (len(siblings) - 1 - siblings.index(target))
    path = f"{_ROOT}{path}"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_magnitude_vector"


def file_shapes(plan: Plan, factors: bool = True) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that an adapter of this plan has in its file.

    Args:
        plan: The plan.
        factors: Whether the factors are in it, or in the file of a basis.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        (o, i), (k, r) = group.shape, group.rank
        known = {"U": (o, k), "V": (r, i), **group.core.shapes, **group.biases}
        shapes |= {key: known[name] for name, key in group_keys(group).items()}
    for target in plan.targets:
        for part in plan.parts[target.path]:
            if part.group.core.by_site:
                shapes[core_key(part)] = part.core_shape
        known = MAGNITUDES[plan.magnitude].shapes(*target.shape)
        shapes |= {key: known[name] for name, key in magnitude_keys(plan, target).items()}
    return {key: shape for key, shape in shapes.items() if factors or not is_factor(key)}
