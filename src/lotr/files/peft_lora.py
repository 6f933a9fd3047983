"""Reads the folder of a PEFT LoRA, one module at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sharing.paths import normalise
from .adapter_folder import CONFIG, AdapterFolder, opened, read_adapter

#: `A` and `B` of a module; older PEFT had the adapter's name in the key, and not always the root in front.
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_ROOT = "base_model.model."
#: Parameters of experts in the order in which models have them: PEFT wraps one after the other, the last is outermost.
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
#: Starts of a LoRA that leave the base weight as it is; the others subtract something from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_CONVERT = "save_pretrained(…, path_initial_model_for_weight_conversion=…)"


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA on disk, `ΔW = B A` a module, checked. A parameter of experts counts as a module with many of them."""

    folder: AdapterFolder

    @cached_property
    def keys(self) -> dict[str, tuple[str, str]]:
        """Path of a module → its keys of `A` and `B` in the file."""
        sides: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            if match := _KEY.fullmatch(key):
                module = self._target(normalise(match["module"]))
                if match["side"] in sides.setdefault(module, {}):
                    raise CheckpointError(
                        f"{self.folder.path} holds two LoRAs for {module!r}, {sides[module][match['side']]!r} and "
                        f"{key!r}. Save one of them alone."
                    )
                sides[module][match["side"]] = key
        half = [module for module, keys in sides.items() if len(keys) < 2]
        if half:
            raise CheckpointError(
                f"{self.folder.path} holds one matrix of two for {half[0]!r}. The file is not whole; copy it again."
            )
        return {module: (keys["A"], keys["B"]) for module, keys in sides.items()}

    def _target(self, path: str) -> str:
        """Return what matrices at a path change: the module, or the parameter of experts that PEFT wrapped there."""
        module = path.replace(".base_layer", "")
        named = self.folder.config.get("target_parameters")
        at = set()
        for name in named if isinstance(named, list) else ():
            parent, _, own = str(name).rpartition(".")
            # "weight" is that of a linear module; a name alone means experts wherever they are
            if own != "weight" and f".{module}".endswith(f".{parent}" if parent else "experts"):
                at.add(own)
        if not at:
            return path
        depth = path.count(".base_layer")
        if depth >= len(at) or (len(at) > 1 and not at <= set(_PARAMETERS)):
            raise CheckpointError(
                f"{self.folder.path} holds LoRAs for parameters of {module!r}, and it cannot be told which of "
                f"{', '.join(sorted(at))} is whose. Train it on {', '.join(_PARAMETERS)} alone."
            )
        return f"{module}.{sorted(at, key=_PARAMETERS.index if len(at) > 1 else None)[-1 - depth]}"

    def n_experts(self, path: str) -> int:
        """Return how many experts a parameter of them holds, `0` for a module."""
        key = self.keys[path][0]
        module = re.sub(r"\.lora_A.*|^" + re.escape(_ROOT), "", key)
        if path == normalise(module):
            return 0
        rows, rank = self.tensors[key][0], self._in_pattern("rank_pattern", "r", path)
        if type(rank) is not int or rank < 1 or rows % rank:
            raise CheckpointError(
                f"{self.folder.path} holds {rows} rows for the experts of {path!r}, and {CONFIG} tells rank {rank!r}, "
                "of which that is no multiple. They are of different adapters."
            )
        return int(rows // rank)

    def _in_pattern(self, patterns: str, default: str, path: str) -> Any:
        """Return a value that PEFT has for a module: that of the first pattern that matches, or the default."""
        config = self.folder.config
        of_names = config.get(patterns)
        items = of_names.items() if isinstance(of_names, dict) else ()
        own = (value for name, value in items if re.match(rf"(.*\.)?({name})$", path))
        return next(own, config.get(default))

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Key and shape of every tensor in the file."""
        return self.folder.shapes()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of a module → shape `(*experts, out, in)` of its update; refuses what is no product of two matrices."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (key_A, key_B) in self.keys.items():
            A, B = self.tensors[key_A], self.tensors[key_B]
            if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
                raise CheckpointError(
                    f"{self.folder.path} holds a LoRA of shapes {A} and {B} for {module!r}, which is not that of a "
                    "linear module. Leave such modules out when you train it."
                )
            experts = self.n_experts(module)
            shapes[module] = (experts, B[0], A[1]) if experts else (B[0], A[1])
        return shapes

    @cached_property
    def head_keys(self) -> dict[str, str]:
        """Key in the file of every tensor that was trained in full → its key as PEFT saves it today."""
        paths = {key: normalise(key.removeprefix(_ROOT)) for key in self.tensors if not _KEY.fullmatch(key)}
        return {
            key: _ROOT + re.sub(r"\.modules_to_save(\.default)?\.", ".", path) for key, path in paths.items()
        }

    def scaling(self, module: str, rank: int) -> float:
        """Return what PEFT multiplies `B A` by: `alpha / r`, or `alpha / √r`."""
        alpha = self._in_pattern("alpha_pattern", "lora_alpha", module)
        if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
            raise CheckpointError(
                f"{self.folder.path / CONFIG} tells no size of the update of {module!r}: lora_alpha, or its entry in "
                f"alpha_pattern, is {str(alpha)[:80]!r}."
            )
        return float(alpha / (rank**0.5 if self.folder.config.get("use_rslora") else rank))

    @contextmanager
    def reader(self) -> Iterator[Any]:
        """Open the file once, and give a function that reads `A` and `B` of a module in float32, finite.

        Of experts it reads those that a slice names, and no more.
        """
        with opened(self.folder.weights) as file:

            def read(module: str, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
                self.shapes  # noqa: B018 - checks them
                A, B = (file.get_slice(key) for key in self.keys[module])
                if experts := self.n_experts(module):
                    # the `A` are below each other, the columns of the `B` in turn
                    q, (begin, end, _) = A.get_shape()[0] // experts, own.indices(experts)
                    columns = [B[:, at + begin : at + end] for at in range(0, q * experts, experts)]
                    A, B = (
                        A[begin * q : end * q].unflatten(0, (-1, q)),
                        torch.stack(columns, -1).movedim(1, 0),
                    )
                else:
                    A, B = A[:], B[:]
                A, B = A.float(), B.float()
                if not (A.isfinite().all() and B.isfinite().all()):
                    raise CheckpointError(
                        f"The LoRA of {module!r} in {self.folder.path} is not finite. Train it again."
                    )
                return A, B * self.scaling(module, A.shape[-2])

            yield read

    def head(self) -> dict[str, Tensor]:
        """Read what was trained in full (`modules_to_save`), by the keys under which PEFT saves it."""
        with opened(self.folder.weights) as file:
            return {name: file.get_tensor(key) for key, name in self.head_keys.items()}


def read_lora(path: str | Path | AdapterFolder) -> LoraFolder:
    """Open the folder of a PEFT LoRA, or that of a hub id, and check that it is a plain one.

    Raises:
        CheckpointError: The folder is not whole or not a LoRA, its weights are pickled, or its update is not `B A`
            beside the base weight (DoRA, trained biases, starts that change the base weight).
    """
    folder = path if isinstance(path, AdapterFolder) else read_adapter(path)
    kind = folder.config["peft_type"]
    if kind != "LORA":
        raise CheckpointError(f"{folder.path} holds an adapter of type {kind}, and not a LoRA.")
    init = folder.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"The LoRA in {folder.path} started with init_lora_weights={init!r}, which changes the base weight too. "
            f"Convert it when you save it: {_CONVERT}."
        )
    lora = LoraFolder(folder)
    other = [key for key in lora.tensors if ".lora_" in key and not _KEY.fullmatch(key)]
    if folder.config.get("use_dora") or other:
        kind = "is a DoRA" if folder.config.get("use_dora") else f"holds {other[0]!r}"
        raise CheckpointError(
            f"The LoRA in {folder.path} {kind}, so its update is not B A alone. Train it without use_dora, lora_bias "
            "and embeddings."
        )
    if not lora.keys:
        raise CheckpointError(f"{folder.path} holds no matrices of a LoRA (….lora_A.weight).")
    for module in lora.keys:
        lora.scaling(module, 1)
    return lora
