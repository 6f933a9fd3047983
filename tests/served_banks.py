"""Small banks on saved models, for what serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

import banks
from lotr import CoreBank, Task
from moe_models import EXPERTS
from saved_models import save_bert, save_llama, save_mixtral

HEAD = "base_model.model.classifier"


def encoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved encoder."""
    base = tf.AutoModelForSequenceClassification.from_pretrained(save_bert(folder / "model"))
    bank = banks.on(folder, base, target_modules=["query", "value"])
    bank.add_many(encoder_task(bank, f"task-{n}", seed=n) for n in range(tasks))
    return bank


def bare_encoder_bank(folder: Path, tasks: int) -> CoreBank:
    """The same on an encoder without a head, as embedding models are trained."""
    base = tf.AutoModel.from_pretrained(save_bert(folder / "model"))
    return banks.on(folder, base, [f"task-{n}" for n in range(tasks)], target_modules=["query", "value"])


def decoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved language model."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_llama(folder / "model"))
    bank = banks.on(folder, base, target_modules=["q_proj", "v_proj"])
    bank.add_many(decoder_task(bank, f"task-{n}", seed=n) for n in range(tasks))
    return bank


def expert_bank(folder: Path, tasks: int = 0, parameters: list[str] = EXPERTS) -> CoreBank:
    """A bank in `folder/bank` on a saved language model with experts."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_mixtral(folder / "model"))
    names = [f"task-{n}" for n in range(tasks)]
    return banks.on(folder, base, names, target_modules=["q_proj"], target_parameters=parameters)


def encoder_task(
    bank: CoreBank, name: str, seed: int = 0, labels: tuple[str, ...] = ("a", "b", "c"), **metadata: Any
) -> Task:
    """A task of random numbers with a head; without labels it is a regression."""
    generator = torch.Generator().manual_seed(seed)
    outputs = len(labels) or 1
    shapes = {f"{HEAD}.weight": (outputs, 32), f"{HEAD}.bias": (outputs,)}
    head = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    numbers = torch.randn(bank.layout.size, generator=generator)
    return Task(name, numbers, head, labels, "classification" if labels else "regression", metadata)


def decoder_task(bank: CoreBank, name: str, seed: int = 0) -> Task:
    """A task of random numbers of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return Task(name, torch.randn(bank.layout.size, generator=generator), task="causal-lm")
