"""State dicts: which entries belong to an adapter, their names in a file, and what must be there."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..math.magnitude import MAGNITUDES
from ..sharing.blocks import Target
from ..sharing.parts import Part
from ..sharing.paths import normalise
from ..sharing.plan import Group, Plan
from .group import LotrLayer
from .register import PREFIX
from .targets import BASIS

_ROOT = "base_model.model."
FACTORS = ("lotr_U", "lotr_V")


def select(model: nn.Module, state_dict: dict[str, Tensor], factors: bool = True) -> dict[str, Tensor]:
    """Return the entries that belong to this method, also under wrappers' names; without `factors`, those aside.

    The place of a number is found from the modules, so a base model that happens to have `lotr_` in a
    name is left alone.
    """
    prefixes = tuple(
        f"{normalise(path)}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        if isinstance(module, LotrLayer)
        for name in module.adapter_layer_names
        if factors or name not in FACTORS
    )
    return {key: value for key, value in state_dict.items() if normalise(key).startswith(prefixes)}


def file_key(key: str) -> str:
    """Return the name in a file of an entry: wrappers removed, the basis at the root of the model.

    Example:
        >>> file_key("base_model.model.0.lotrbasis.query_8x8.lotr_U.weight")
        'base_model.model.lotrbasis.query_8x8.lotr_U.weight'
    """
    key = normalise(key)
    before, found, after = f".{key}".partition(f".{BASIS}.")
    if not found:
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


def group_keys(group: Group) -> dict[str, str]:
    """Return the names in a file of what a group shares: `U`, `V` (transposed) and the numbers of its core."""
    root = f"{_ROOT}{BASIS}.{group.name}"
    core = {} if group.core.by_site else {n: f"{root}.lotr_core.{n}" for n in group.core.shapes}
    return {"U": f"{root}.lotr_U.weight", "V": f"{root}.lotr_V.weight", **core}


def core_key(part: Part) -> str:
    """Return the name in a file of the cores that belong to the sites of a part."""
    return f"{_ROOT}{normalise(part.sites[0].module)}.lotr_C.{part.name or 'weight'}"


def magnitude_keys(plan: Plan, target: Target) -> dict[str, str]:
    """Return the names in a file of the numbers of a module's magnitude."""
    names = MAGNITUDES[plan.magnitude].shapes(*target.shape)
    return {name: f"{_ROOT}{normalise(target.path)}.lotr_magnitude.{name}" for name in names}


def file_shapes(plan: Plan, factors: bool = True) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that an adapter of this plan has in its file.

    Args:
        plan: The plan.
        factors: Whether the factors are in it, or in the file of a basis.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        (o, i), (k, r) = group.shape, group.rank
        known = {"U": (o, k), "V": (r, i), **group.core.shapes}
        shapes |= {key: known[name] for name, key in group_keys(group).items()}
    for target in plan.targets:
        for part in plan.parts[target.path]:
            if part.group.core.by_site:
                (k, r), (a, b) = part.group.rank, part.grid
                shapes[core_key(part)] = (a * k, b * r)
        known = MAGNITUDES[plan.magnitude].shapes(*target.shape)
        shapes |= {key: known[name] for name, key in magnitude_keys(plan, target).items()}
    return {
        key: shape for key, shape in shapes.items() if factors or not any(f".{f}." in key for f in FACTORS)
    }


def inner_names(plan: Plan) -> frozenset[str]:
    """Return the last components of all keys of an adapter, at which PEFT looks for an adapter's name."""
    return frozenset(part for key in file_shapes(plan) for part in key.split(".")[-2:])


def check_names(adapters: Iterable[str], inner: frozenset[str]) -> None:
    """Refuse an adapter that is called like a number inside an adapter: PEFT would take one for the other.

    Raises:
        ConfigError: A name is taken.
    """
    taken = sorted(name for name in adapters if name in inner)
    if taken:
        raise ConfigError(
            f"An adapter cannot be called {taken[0]!r}: numbers inside an adapter have that name, and PEFT would "
            "leave them out of the file. Choose another adapter_name."
        )


def match_groups(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename groups of a file that the model knows under a longer or shorter path.

    A module without a number names its group by its whole path, so an architecture whose prefix was renamed
    gives another name; the group with the longest common tail is the same one.
    """
    mine = _groups(model, adapter)
    theirs = {group for key in state_dict if (group := _group_in(key))}
    free = mine - theirs
    renamed: dict[str, str] = {}
    for group in sorted(theirs - mine):
        # the whole name of one is the tail of the other: the module's own name and the shape agree
        same = [
            other for other in free if f"-{other}".endswith(f"-{group}") or f"-{group}".endswith(f"-{other}")
        ]
        if same:
            renamed[group] = max(same, key=len)
            free.discard(renamed[group])
    if not renamed:
        return state_dict
    return {_in_group(key, renamed): value for key, value in state_dict.items()}


def _in_group(key: str, renamed: dict[str, str]) -> str:
    group = _group_in(key)
    return key.replace(f"{BASIS}.{group}.", f"{BASIS}.{renamed[group]}.") if group in renamed else key


def check_complete(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse to load a part of an adapter.

    Raises:
        CheckpointError: Entries of the method are missing or unexpected.
    """
    expected = _entries(model, adapter)
    given = {normalise(key) for key in state_dict if f".{PREFIX}" in key}
    missing, extra = sorted(expected - given), sorted(given - expected)
    if missing or extra:
        said = [
            f"{len(keys)} {what}, first {keys[0]!r}"
            for keys, what in ((missing, "missing"), (extra, "unexpected"))
            if keys
        ]
        raise CheckpointError(
            f"The adapter's file does not fit the model: {'; '.join(said)}. It was made for another base "
            "model or another configuration; compare base_model_name_or_path and target_modules in its "
            "adapter_config.json."
        )


def _entries(model: nn.Module, adapter: str) -> set[str]:
    return {
        normalise(f"{path}.{name}.{adapter}.{number}")
        for path, module in model.named_modules()
        if isinstance(module, LotrLayer)
        for name in module.adapter_layer_names
        if adapter in getattr(module, name)
        for number, _ in getattr(module, name)[adapter].named_parameters()
    }


def _groups(model: nn.Module, adapter: str) -> set[str]:
    return {group for key in _entries(model, adapter) if (group := _group_in(key))}


def _group_in(key: str) -> str:
    """Return the name of the group in a key, or an empty string."""
    parts = key.split(".")
    return parts[parts.index(BASIS) + 1] if BASIS in parts else ""
