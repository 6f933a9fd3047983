"""State dicts of a model: which entries belong to an adapter, and what must be there when one is loaded."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.adapter_folder import check_finite
from ..sharing.keys import BASIS, FACTORS, PREFIX, file_key, group_in, without_adapter
from ..sharing.paths import normalise
from .group import LotrLayer

_ROOT = "base_model.model."


def of_adapter(
    model: nn.Module, adapter: str, state_dict: dict[str, Tensor], factors: bool = True
) -> dict[str, Tensor]:
    """Return the entries of an adapter, also under wrappers' names; without `factors`, those aside.

    The place of a number is found from the modules, so a base model that happens to have `lotr_` in a
    name is left alone.
    """
    prefixes = [
        normalise(f"{path}.{name}.{adapter}.").removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, LotrLayer)
        for name in module.adapter_layer_names
        if factors or name not in FACTORS
    ]
    return {key: value for key, value in state_dict.items() if normalise(key).startswith(tuple(prefixes))}


def to_load(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of an adapter's file, those of the method under their names in the model.

    Raises:
        CheckpointError: Entries of the method are missing or unexpected, or a number is not finite.
    """
    check_finite(state_dict, "The adapter's file")
    names = of_adapter(model, adapter, model.state_dict())
    name_of = {file_key(without_adapter(name, adapter)).removeprefix(_ROOT): name for name in names}
    groups = _same_groups({group_in(name) for name in name_of}, {group_in(key) for key in state_dict})
    entries: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        group = group_in(key)
        in_file = key.replace(f"{BASIS}.{group}.", f"{BASIS}.{groups.get(group, group)}.")
        entries[name_of.get(in_file.removeprefix(_ROOT), in_file)] = tensor

    missing = sorted(names.keys() - entries.keys())
    extra = sorted(key for key in entries if f".{PREFIX}" in key and key not in names)
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
    return entries


def _same_groups(in_model: set[str], in_file: set[str]) -> dict[str, str]:
    """Return the groups of a file that the model knows under a longer or shorter path, with their names there.

    A module without a number names its group by its whole path, so an architecture whose prefix was renamed
    gives another name; the group with the longest common tail is the same one.
    """
    free, same = in_model - in_file, {}
    for group in sorted(in_file - in_model):
        # the whole name of one is the tail of the other: the module's own name and the shape agree
        tails = [o for o in free if f"-{o}".endswith(f"-{group}") or f"-{group}".endswith(f"-{o}")]
        if tails:
            same[group] = max(tails, key=len)
            free.discard(same[group])
    return same
