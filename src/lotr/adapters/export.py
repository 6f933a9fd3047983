"""Ways out: a plain LoRA that any server reads, and a plain model with the update merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..files.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, save_tensors, write_task
from ..files.atomic import check_apart, check_free, whole_folder, write_json
from ..math.magnitude import MAGNITUDES
from ..math.update import FactoredUpdate
from ..sharing.blocks import Target
from ..sharing.groups import Part
from ..sharing.keys import file_shapes, lora_keys
from ..tuner.saved_adapter import read_saved
from .inspection import updates

_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, peft]
---

# LoRA of a LoTR adapter

An exact copy: `lora_A = Vᵀ`, `lora_B = σ U C`, so the outputs are equal to rounding. PEFT loads it with nothing
else installed: `AutoPeftModel.from_pretrained("path/or/hub-id")`.
"""


def export(adapter: str | Path, output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write a saved adapter as plain PEFT LoRA, exactly and without the base model.

    Args:
        adapter: Folder or hub id of a LoTR adapter whose magnitude adds: `W + ΔW`.
        output: Folder to make.
        overwrite: Replace the folder when it is not empty.

    Returns:
        Counts: modules, rank, numbers and bytes before and after; and under `peft_only` the tensors (of a head, of
        modules trained in full, of new tokens) that PEFT reads and servers of LoRA do not.

    Raises:
        CheckpointError: The adapter is of another method, has no LoRA form, or has trained biases.
        ConfigError: `output` is not free, or is what the adapter is read from.
    """
    saved, output = read_saved(adapter), Path(output)
    config = saved.config
    check_apart(output, "adapter", saved.path)
    check_apart(output, "basis", config.basis)
    check_apart(output, "base model", config.base_model_name_or_path)
    if not MAGNITUDES[config.magnitude].additive:
        raise CheckpointError(
            f"{saved.path} has magnitude={config.magnitude!r}, which rescales the weight, so no LoRA equals it. "
            "Use `lotr merge` to leave with a plain model."
        )
    if not saved.plan.targets:
        raise CheckpointError(f"{saved.path} adapts no module: it holds a trained head alone.")
    if any(target.experts for target in saved.plan.targets):
        raise CheckpointError(
            f"{saved.path} adapts experts that one parameter holds, for which servers of LoRA have no common form. Use "
            "`lotr merge` to leave with a plain model."
        )
    tensors = saved.tensors()
    others = tensors.keys() - file_shapes(saved.plan).keys()
    if config.bias != "none":
        raise CheckpointError(
            f"{saved.path} has bias={config.bias!r}: biases of the base model were trained with it, and no server that "
            "reads LoRA takes them. Use `lotr merge` to leave with a plain model."
        )
    parts: dict[str, list[tuple[Part, FactoredUpdate]]] = {}
    for part, update in updates(saved, tensors):
        parts.setdefault(part.sites[0].module, []).append((part, update))
    lora = {key: tensors[key] for key in others}
    ranks: dict[str, int] = {}
    for target in saved.plan.targets:
        for key, matrix in zip(lora_keys(target), lora_of(target, parts[target.path]), strict=True):
            lora[key] = matrix.clone()  # safetensors refuses what shares memory
        ranks[target.path] = len(lora[lora_keys(target)[0]])
    lora_config = _lora_config(saved.folder, ranks)
    with whole_folder(output, overwrite) as made:
        save_tensors(lora, made)
        write_json(made / CONFIG, lora_config)
        (made / "README.md").write_text(
            _CARD.format(base=lora_config["base_model_name_or_path"] or ""), encoding="utf-8"
        )
        if saved.folder.task:
            write_task(made, {**saved.folder.task, "method": "peft_lora"})
    return {
        "modules": len(ranks),
        "rank": max(ranks.values()),
        "numbers": sum(tensor.numel() for key, tensor in lora.items() if ".lora_" in key),
        "bytes": (output / WEIGHTS).stat().st_size,
        "bytes_before": saved.folder.size,
        "peft_only": sorted(others),
        "output": str(output),
    }


def lora_of(target: Target, parts: list[tuple[Part, FactoredUpdate]]) -> tuple[Tensor, Tensor]:
    """Return the two matrices of plain LoRA for one module; the ranks of its parts add up.

    Args:
        target: The module.
        parts: Its parts, each in factored form.

    Returns:
        `A` of shape `(q, in)` and `B` of shape `(out, q)` with `ΔW = B · A`.
    """
    if len(parts) == 1:
        return parts[0][1].as_lora()
    out, width = target.shape
    As, Bs = [], []
    for part, update in parts:
        A, B = update.as_lora()
        (row, n_rows), (column, n_columns) = part.rows, part.columns
        As.append(F.pad(A, (column, width - column - n_columns)))
        Bs.append(F.pad(B, (0, 0, row, out - row - n_rows)))
    return torch.cat(As), torch.cat(Bs, 1)


def _lora_config(adapter: AdapterFolder, ranks: dict[str, int]) -> dict[str, Any]:
    """Return the configuration of the LoRA; `lora_alpha = r`, because the scaling is in the matrices."""
    from peft import LoraConfig

    most = max(ranks.values())
    # anchored at the whole path, so that no rank reaches a module whose name merely ends alike
    other = {f"^{path.replace('.', chr(92) + '.')}": rank for path, rank in ranks.items() if rank != most}
    of_model = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    trained = ("modules_to_save", "trainable_token_indices")
    copied: dict[str, Any] = {name: adapter.config.get(name) for name in (*of_model, *trained)}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        inference_mode=True,
        **copied,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def merge(model: Any, output: str | Path, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a plain transformers model with the active adapter merged into its weights.

    Args:
        model: A PEFT model; it is merged and must not be used as an adapter afterwards.
        output: Folder to make.
        tokenizer: Saved beside the model, or `None`.
        overwrite: Replace the folder when it is not empty.

    Raises:
        CheckpointError: The merged weights are not finite.
        ConfigError: `output` is not free, or is where the base model or the basis lies.
    """
    output = Path(output)
    check_free(output, overwrite)
    for config in model.peft_config.values():
        check_apart(output, "base model", config.base_model_name_or_path)
        check_apart(output, "basis", getattr(config, "basis", None))
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"The adapter cannot be merged: {error}") from error
    with whole_folder(output, overwrite) as made:
        plain.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
