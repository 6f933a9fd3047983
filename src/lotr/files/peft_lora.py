"""Reads the folder of a PEFT LoRA, one module at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..sharing.paths import normalise
from .adapter_folder import AdapterFolder, read_adapter

_A, _B = ".lora_A.weight", ".lora_B.weight"
#: Starts of a LoRA that leave the base weight as it is; the others subtract something from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA on disk, `ΔW = B A` a module, checked.

    Args:
        folder: The adapter's folder.
    """

    folder: AdapterFolder

    @cached_property
    def keys(self) -> dict[str, str]:
        """Path of a module → what its keys in the file begin with."""
        prefixes = (key.removesuffix(_A) for key in self.folder.shapes() if key.endswith(_A))
        return {normalise(prefix.removeprefix("base_model.model.")): prefix for prefix in prefixes}

    def scaling(self, module: str, rank: int) -> float:
        """Return what PEFT multiplies `B A` by: `alpha / r`, or `alpha / √r`."""
        config = self.folder.config
        patterns = config.get("alpha_pattern") or {}
        alphas = (alpha for name, alpha in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
        alpha: float = next(alphas, config["lora_alpha"])
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def matrices(self, module: str) -> tuple[Tensor, Tensor]:  # (q, in), (out, q)
        """Read `A` and `B` of a module in float32, with the scaling in `B`.

        Raises:
            CheckpointError: They are no two matrices of one rank, or hold NaN or infinity.
        """
        prefix = self.keys[module]
        with safe_open(self.folder.weights, framework="pt") as file:
            A, B = (file.get_tensor(prefix + side).float() for side in (_A, _B))
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
            raise CheckpointError(
                f"{self.folder.path} holds a LoRA of shapes {tuple(A.shape)} and {tuple(B.shape)} for {module!r}, "
                "which is not that of a linear module. Leave such modules out when you train it."
            )
        if not (A.isfinite().all() and B.isfinite().all()):
            raise CheckpointError(
                f"The LoRA of {module!r} in {self.folder.path} is not finite. Train it again."
            )
        return A, B * self.scaling(module, len(A))


def read_lora(path: str | Path) -> LoraFolder:
    """Open the folder of a PEFT LoRA and check that it is a plain one.

    Args:
        path: Folder, or hub id (then it is downloaded).

    Raises:
        CheckpointError: The folder is not whole or not a LoRA, its weights are pickled, or its update is not `B A`
            beside the base weight (DoRA, trained biases, starts that change the base weight).
    """
    folder = read_adapter(path)
    kind = folder.config["peft_type"]
    if kind != "LORA":
        raise CheckpointError(f"{folder.path} holds an adapter of type {kind}, and not a LoRA.")
    init = folder.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"The LoRA in {folder.path} started with init_lora_weights={init!r}, which changes the base weight too. "
            "Convert it when you save it: save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    other = [key for key in folder.shapes() if ".lora_" in key and not key.endswith((_A, _B))]
    if folder.config.get("use_dora") or other:
        kind = "is a DoRA" if folder.config.get("use_dora") else f"holds {other[0]!r}"
        raise CheckpointError(
            f"The LoRA in {folder.path} {kind}, so its update is not B A alone. Train it without use_dora, lora_bias "
            "and embeddings."
        )
    lora = LoraFolder(folder)
    if not lora.keys:
        raise CheckpointError(f"{folder.path} holds no matrices of a LoRA (…{_A}).")
    return lora
