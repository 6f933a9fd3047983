"""`lotr.init_from_lora`: the factors of a fresh adapter turn towards a LoRA that the user trained."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, near
from ..files.peft_lora import LoraFolder, read_lora
from ..math.hooi import tucker2
from ..sharing.groups import Part
from .factors import check_fresh, find_adapter, parts_of, set_factors
from .weight import AdaptedWeight


def init_from_lora(model: nn.Module, lora: str | Path, adapter: str | None = None) -> None:
    """Turn the shared factors of a fresh adapter towards a trained LoRA, without changing what the model computes.

    The factors become those that maximise `Σ_s ‖Uᵀ B_s A_s V‖²` over the sites of a group; the cores stay at zero, so
    training begins at the base model. No `ΔW` is built.

    Args:
        model: A model with an adapter whose update is zero.
        lora: Folder (or hub id) of a PEFT LoRA that was trained on the same base model. Its `modules_to_save` are not
            read. Modules that only one of both adapts are named in a warning.
        adapter: Name of the adapter; default: the active one.

    Raises:
        ConfigError: The LoRA is of a base model with other shapes, changes no module of a group, or the adapter's
            factors may not turn (see `lotr.init_from_data`).
        CheckpointError: The folder holds no plain LoRA as safetensors; see `lotr.files.peft_lora.read_lora`.

    Source: HOSVD and HOOI (De Lathauwer et al., 2000).
    """
    name, config = find_adapter(model, adapter)
    parts = parts_of(model, name)
    check_fresh(name, config, parts)
    folder = read_lora(lora)
    adapted = {part.sites[0].module for of_group in parts.values() for _, part in of_group}
    factors = {}
    for group, of_group in tqdm(
        parts.items(), desc="LoRA", unit=" groups", delay=2, leave=False, disable=None
    ):
        known = [(layer, part) for layer, part in of_group if part.sites[0].module in folder.keys]
        updates = [update for layer, part in known for update in _updates(folder, layer, part)]
        if not any(bool(B.any()) for B, _ in updates):
            plan, module = of_group[0][1].group, of_group[0][1].sites[0].module
            raise ConfigError(
                f"The LoRA in {lora} changes no module of group {plan.name!r}, for example {module!r}: "
                f"it has none of them, or was never trained. {near(module, folder.keys)} Name modules of the LoRA as "
                "target_modules."
            )
        U, V = (side[name].weight.detach().cpu() for side in (group.lotr_U, group.lotr_V))
        factors[group] = tucker2(updates, U, V.T)
    for group, (U, V) in factors.items():
        set_factors(group, name, U, V)
    config.init = "lora"
    _warn(f"The LoRA in {lora} does not adapt", adapted - set(folder.keys), "they had no say in the factors.")
    only_lora = set(folder.keys) - adapted
    _warn(f"Adapter {name!r} does not adapt", only_lora, "what the LoRA changes there is left out.")


def _updates(folder: LoraFolder, layer: AdaptedWeight, part: Part) -> list[tuple[Tensor, Tensor]]:
    """Return `B` `(o, q)` and `A` `(q, i)` of every site of a part."""
    module = part.sites[0].module
    with folder.reader() as read:
        A, B = read(module)
    if (len(B), A.shape[1]) != (layer.out_features, layer.in_features):
        raise ConfigError(
            f"The LoRA in {folder.folder.path} changes a weight of shape {(len(B), A.shape[1])} at {module!r}, and the "
            f"model's has {(layer.out_features, layer.in_features)}: it was trained on another base model, "
            f"{folder.folder.config.get('base_model_name_or_path')!r}. Load that one."
        )
    right, left = part.as_seen(A, B.T)
    return [(left[:, n].T, right[:, m]) for n in range(left.shape[1]) for m in range(right.shape[1])]


def _warn(subject: str, modules: set[str], consequence: str) -> None:
    if modules:
        names = sorted(modules)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(f"{subject} {', '.join(names[:5])}{more}; {consequence}", stacklevel=3)
