"""State dicts of a model: which entries belong to an adapter, and what must be there when one is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..sharing.keys import BASIS, FACTORS, PREFIX, file_shapes, group_in
from ..sharing.paths import normalise
from ..sharing.plan import Plan
from .group import LotrLayer


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
    own = {group for key in _entries(model, adapter) if (group := group_in(key))}
    in_file = {group for key in state_dict if (group := group_in(key))}
    free = own - in_file
    renamed: dict[str, str] = {}
    for group in sorted(in_file - own):
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
    group = group_in(key)
    return key.replace(f"{BASIS}.{group}.", f"{BASIS}.{renamed[group]}.") if group in renamed else key


def check_complete(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse to load a part of an adapter.

    Raises:
        CheckpointError: Entries of the method are missing or unexpected.
    """
    expected = _entries(model, adapter)
    entries = {normalise(key) for key in state_dict if f".{PREFIX}" in key}
    missing, extra = sorted(expected - entries), sorted(entries - expected)
    if missing or extra:
        counts = [
            f"{len(keys)} {what}, first {keys[0]!r}"
            for keys, what in ((missing, "missing"), (extra, "unexpected"))
            if keys
        ]
        raise CheckpointError(
            f"The adapter's file does not fit the model: {'; '.join(counts)}. It was made for another base "
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
