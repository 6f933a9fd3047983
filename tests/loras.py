"""LoRAs of PEFT with random numbers on the pico encoder, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import bert, tokens
from lotr import CoreBank

BASE, WEIGHTS = "pico", "adapter_model.safetensors"


def lora(
    folder: Path, seed: int = 0, make: Callable[[], nn.Module] = bert, base: object = BASE, **fields: Any
) -> PeftModel:
    """Save a LoRA whose numbers, those of a head included, are random; return its model."""
    asked = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], **fields}
    model = get_peft_model(make(), LoraConfig(**asked)).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def on_one_basis(folder: Path, tasks: int, rank: int, noise: float = 0.0, **fields: Any) -> list[Path]:
    """Save LoRAs whose updates all lie in shared subspaces of some rank, up to noise."""
    drawn: dict[str, Tensor] = {}
    for n in range(tasks):
        model = lora(folder / f"task-{n}", n, **fields)
        generator = torch.Generator().manual_seed(1000 + n)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    wide = max(parameter.shape)
                    if name not in drawn:
                        drawn[name] = torch.linalg.qr(torch.randn(wide, rank))[0]
                    mixed = drawn[name] @ torch.randn(rank, min(parameter.shape), generator=generator)
                    mixed += noise * torch.randn(mixed.shape, generator=generator)
                    parameter.copy_(mixed if parameter.shape[0] == wide else mixed.T)
        model.save_pretrained(str(folder / f"task-{n}"), save_embedding_layers=False)
    return [folder / f"task-{n}" for n in range(tasks)]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a saved adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_answers(
    bank: Path, task: str, folder: Path, make: Callable[[], nn.Module] = bert, tol: float = 1e-4
) -> None:
    """Check that a task of a bank computes what PEFT computes with the adapter it was."""
    batch = tokens(2)
    with torch.no_grad(), CoreBank.open(bank) as opened:
        own = PeftModel.from_pretrained(make(), str(folder)).eval()(input_ids=batch).logits
        mixed = opened.wrap(make())(input_ids=batch, task_ids=[None, task]).logits
        torch.testing.assert_close(mixed[1:], own[1:], rtol=tol, atol=tol)
        torch.testing.assert_close(mixed[:1], make()(input_ids=batch[:1]).logits, rtol=tol, atol=tol)


def dense(model: PeftModel) -> dict[str, Tensor]:
    """Return the update of every module that a LoRA changes, as PEFT computes it."""
    return {
        path: module.get_delta_weight("default").detach()
        for path, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
