"""Small banks on saved models, for what serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model

from lotr import CoreBank, LotrConfig, Task
from moe_models import EXPERTS
from saved_models import save_bert, save_llama, save_mixtral

HEAD = "base_model.model.classifier"


def encoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved encoder."""
    name = save_bert(folder / "model")
    base = tf.AutoModelForSequenceClassification.from_pretrained(name)
    return _bank(folder, base, ["query", "value"], [encoder_task, tasks])


def decoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved language model."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_llama(folder / "model"))
    return _bank(folder, base, ["q_proj", "v_proj"], [decoder_task, tasks])


def expert_bank(folder: Path, tasks: int = 0, parameters: list[str] = EXPERTS) -> CoreBank:
    """A bank in `folder/bank` on a saved language model with experts."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_mixtral(folder / "model"))
    return _bank(folder, base, ["q_proj"], [decoder_task, tasks], target_parameters=parameters)


def _bank(folder: Path, base: Any, targets: list[str], tasks: list[Any], **fields: Any) -> CoreBank:
    config = LotrConfig(r=4, target_modules=targets, **fields)
    get_peft_model(base, config).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", folder / "basis", dtype="float32")
    make, count = tasks
    bank.add_many(make(bank, f"task-{n}", seed=n) for n in range(count))
    return bank


def encoder_task(
    bank: CoreBank, name: str, seed: int = 0, labels: tuple[str, ...] = ("a", "b", "c"), **metadata: Any
) -> Task:
    """A task of random numbers with a head; without labels it is a regression."""
    generator = torch.Generator().manual_seed(seed)
    outputs = len(labels) or 1
    head = {
        f"{HEAD}.weight": torch.randn(outputs, 32, generator=generator),
        f"{HEAD}.bias": torch.randn(outputs, generator=generator),
    }
    numbers = torch.randn(bank.layout.size, generator=generator)
    return Task(name, numbers, head, labels, "classification" if labels else "regression", metadata)


def decoder_task(bank: CoreBank, name: str, seed: int = 0) -> Task:
    """A task of random numbers of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return Task(name, torch.randn(bank.layout.size, generator=generator), task="causal-lm")
