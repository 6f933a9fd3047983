"""Ways out: a plain LoRA that any server reads, and a plain model with the update merged in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import CONFIG, WEIGHTS, check_replaceable, save_tensors, write_task
from ..files.atomic import check_apart, whole_folder, write_json
from ..files.card import Card
from ..math.magnitude import MAGNITUDES
from ..math.update import loras_of
from ..sharing.groups import bias_of
from ..sharing.keys import file_shapes, group_keys, lora_keys, magnitude_keys
from ..sharing.paths import exactly
from ..tuner.expert_names import PARAMETERS
from ..tuner.saved_adapter import SavedAdapter, read_saved
from .inspection import updates

_EXACT = """An exact copy of a LoTR adapter: `lora_A = Vᵀ`, `lora_B = σ U C`, so the outputs are equal to rounding. PEFT
loads it with nothing else installed: `AutoPeftModel.from_pretrained("path/or/hub-id")`."""


def export(
    adapter: str | Path,
    output: str | Path,
    overwrite: bool = False,
    pad_rank: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write a saved adapter as plain PEFT LoRA, exactly and without the base model.

    A `dora` adapter becomes DoRA of PEFT, and experts that one parameter holds its `target_parameters`.

    Args:
        adapter: Folder or hub id of a LoTR adapter whose magnitude adds, `W + ΔW`, or is DoRA's.
        output: Folder to make.
        overwrite: Replace the folder when it is not empty.
        pad_rank: Rank that every module is brought to with zeros, for servers that take one rank; of several, the
            smallest that no module is above.

    Returns:
        Counts: modules, rank, numbers and bytes before and after; and under `peft_only` the tensors (of a head,
        modules trained in full, new tokens, DoRA's norms, biases, experts) that PEFT reads and servers of LoRA do not.

    Raises:
        CheckpointError: The adapter is of another method, has no LoRA form, or has trained biases.
        ConfigError: `output` is not free, or is what the adapter is read from; or `pad_rank` is below its rank.
    """
    saved, output = read_saved(adapter), Path(output)
    check_replaceable(output, overwrite)
    config = saved.config
    check_apart(output, "adapter", saved.path)
    check_apart(output, "basis", config.basis)
    check_apart(output, "base model", config.base_model_name_or_path)
    if not MAGNITUDES[config.magnitude].has_lora_form:
        raise CheckpointError(
            f"{saved.path} has magnitude={config.magnitude!r}, which rescales the weight, so no LoRA equals it. "
            "Use `lotr merge` to leave with a plain model."
        )
    if not saved.plan.targets:
        raise CheckpointError(f"{saved.path} adapts no module: it holds a trained head alone.")
    if config.bias != "none":
        raise CheckpointError(
            f"{saved.path} has bias={config.bias!r}: biases of the base model were trained with it, and no server that "
            "reads LoRA takes them. Use `lotr merge` to leave with a plain model."
        )
    if saved.plan.has_biases and any(target.experts for target in saved.plan.targets):
        raise CheckpointError(
            f"{saved.path} has lora_bias=True beside experts that one parameter holds, and PEFT's LoRA has one of the "
            "two. Use `lotr merge` to leave with a plain model."
        )
    tensors = saved.tensors()
    others = tensors.keys() - file_shapes(saved.plan).keys()
    lora, ranks = _lora(saved, tensors, pad_rank)
    matrices = [target for target in saved.plan.targets if not target.experts]
    plain = {key for target in matrices for key in lora_keys(saved.plan, target)[:2]}
    numbers = sum(tensor.numel() for tensor in lora.values())
    lora |= {key: tensors[key] for key in others}
    lora_config = _lora_config(saved, ranks)
    with whole_folder(output, overwrite) as made:
        save_tensors(lora, made)
        write_json(made / CONFIG, lora_config)
        card = Card("lora", lora_config["base_model_name_or_path"], is_lotr=False)
        (made / "README.md").write_text(card.text(_EXACT), encoding="utf-8")
        if saved.folder.task:
            write_task(made, {**saved.folder.task, "method": "peft_lora"})
    return {
        "modules": len(ranks),
        "rank": max(ranks.values()),
        "numbers": numbers,
        "bytes": (output / WEIGHTS).stat().st_size,
        "bytes_before": saved.folder.size,
        "peft_only": sorted(lora.keys() - plain),
        "output": str(output),
    }


def _lora(
    saved: SavedAdapter, tensors: dict[str, Tensor], pad_rank: int | Sequence[int] | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of the LoRA as PEFT names and lays them, and the rank of each target."""
    lora, loras = {}, {}
    for target, parts in updates(saved, tensors):
        loras[target] = loras_of([update for _, update in parts], target.shape, target.experts)
    ranks = {target.path: max(len(A) for A, _ in own) for target, own in loras.items()}
    widest = max(ranks, key=ranks.__getitem__)
    if pad_rank is not None:
        several = [pad_rank] if isinstance(pad_rank, int) else sorted(pad_rank)
        rank = next((rank for rank in several if rank >= ranks[widest]), None)
        if rank is None:
            raise ConfigError(
                f"pad_rank={pad_rank} is below the rank {ranks[widest]} of {widest!r}, and padding adds zeros alone. "
                f"Name {ranks[widest]} or more, or cut the adapter down first with `lotr.truncate` or `lotr compress`."
            )
        ranks = dict.fromkeys(ranks, rank)
    for target, own in loras.items():
        rank = ranks[target.path]
        As = [F.pad(A, (0, 0, 0, rank - len(A))) for A, _ in own]
        Bs = [F.pad(B, (0, rank - len(A))) for A, B in own]
        A_key, B_key, norms_key = lora_keys(saved.plan, target)
        if saved.plan.has_biases:  # PEFT's LoRA has them in all modules or in none
            members = [
                (part, {name: tensors[key] for name, key in group_keys(part.group).items()})
                for part in saved.plan.parts[target.path]
            ]
            bias = bias_of(members, saved.config.scaling)
            lora[f"{B_key.removesuffix('.weight')}.bias"] = (
                torch.zeros(target.shape[0]) if bias is None else bias
            )
        # of experts, PEFT has the `A` below each other and the columns of the `B` in turn
        lora[A_key], lora[B_key] = torch.cat(As), torch.stack(Bs, -1).flatten(1)
        for key in magnitude_keys(saved.plan, target).values():
            lora[norms_key] = tensors[key]
    return lora, ranks


def _lora_config(saved: SavedAdapter, ranks: dict[str, int]) -> dict[str, Any]:
    """Return the configuration of the LoRA; `lora_alpha = r`, because the scaling is in the matrices."""
    from peft import LoraConfig

    experts = {target.path for target in saved.plan.targets if target.experts}
    # beside experts, PEFT takes these names among `target_modules` for theirs; it does not if they are parameters
    beside = any(re.search(r"experts?\.[a-z]", path) for path in ranks)
    old = {path for path in ranks.keys() - experts if beside and path.rpartition(".")[2] in PARAMETERS}
    parameters = {path: path for path in experts} | {path: f"{path}.weight" for path in old}
    most = max(ranks.values())
    other = {exactly(parameters.get(path, path)): rank for path, rank in ranks.items() if rank != most}
    of_model = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    trained = ("modules_to_save", "trainable_token_indices")
    copied: dict[str, Any] = {name: saved.folder.config.get(name) for name in (*of_model, *trained)}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks.keys() - parameters.keys()),
        target_parameters=sorted(parameters.values()) or None,
        use_dora=not MAGNITUDES[saved.config.magnitude].additive,
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        lora_bias=saved.plan.has_biases,
        inference_mode=True,
        **copied,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def merge(model: Any, output: str | Path, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a plain transformers model with the active adapter of a PEFT model, which is used up, in its weights."""
    output = Path(output)
    for config in model.peft_config.values():
        check_apart(output, "base model", config.base_model_name_or_path)
        check_apart(output, "basis", getattr(config, "basis", None))
        # PEFT adds the updates of all copies to the one weight
        if getattr(config, "layer_replication", None):
            raise CheckpointError(
                "The adapter cannot be merged: copies of a layer (layer_replication) share one weight, and each has an "
                "update of its own. Keep the adapter."
            )
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"The adapter cannot be merged: {error}") from error
    if any(isinstance(module, ModulesToSaveWrapper) for module in plain.modules()):
        raise CheckpointError(
            "The adapter cannot be merged: PEFT leaves its trained head apart, and transformers would start a new one. "
            "Keep the adapter."
        )
    with whole_folder(output, overwrite) as made:
        plain.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
