"""Heads of tasks: each row has logits of its own task's labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import banks
from banks import alone, assert_same_contents, contents
from conftest import ARCHITECTURES, SIZES, VOCABULARY, bert, pico, tokens
from lotr import CoreBank, Task
from lotr.bank.heads import row_losses
from test_bank_rows import logits

LABELS = {"two": 2, "five": 5, "number": 1}
MASKED = torch.finfo(torch.float32).min


def roberta(num_labels: int = 3) -> nn.Module:
    more = {"num_labels": num_labels, "max_position_embeddings": 64}
    return pico("RobertaForSequenceClassification", vocab_size=VOCABULARY, **SIZES, **more)


def llama(num_labels: int = 3) -> nn.Module:
    more = {"num_labels": num_labels, "num_key_value_heads": 2, "pad_token_id": 0}
    return pico("LlamaForSequenceClassification", vocab_size=VOCABULARY, **SIZES, **more)


#: A model with so many labels, its head, and what a bank adapts.
MODELS = {
    "bert": (bert, "classifier", ["query", "value"]),
    "roberta": (roberta, "classifier", ["query", "value"]),
    "llama": (llama, "score", ["q_proj", "v_proj"]),
}
INPUTS = ARCHITECTURES["bert"].inputs()


def with_heads(folder: Path, name: str = "bert") -> CoreBank:
    """A bank on a model with a head, and tasks with heads of two, five and one outputs."""
    make, path, targets = MODELS[name]
    bank = banks.on(folder, make(), target_modules=targets, modules_to_save=[path])
    for seed, (task, n) in enumerate(LABELS.items()):
        draw = torch.Generator().manual_seed(seed)
        head = {
            f"base_model.model.{path}.{key}": torch.randn(own.shape, generator=draw) / 4
            for key, own in getattr(make(num_labels=n), path).named_parameters()
        }
        kind = "regression" if n == 1 else "classification"
        bank.add(Task(task, banks.numbers(bank, seed), head, tuple(map(str, range(n))), kind))
    return bank


def own_model(bank: CoreBank, name: str, task: str | None) -> nn.Module:
    """The base model with one task, cores and head, as an ordinary model."""
    return alone(bank, MODELS[name][0](num_labels=LABELS.get(str(task), 3)), task)


@pytest.mark.parametrize("name", list(MODELS))
def test_each_row_goes_through_the_head_of_its_task(name: str, tmp_path: Path) -> None:
    bank = with_heads(tmp_path, name)
    model = bank.wrap(MODELS[name][0]())
    ids = ["five", "two", None, "number"]
    mixed = logits(model, task_ids=ids)
    assert mixed.shape == (4, 5)
    for row, task in enumerate(ids):
        expected = logits(own_model(bank, name, task))[row]
        assert torch.allclose(mixed[row, : len(expected)], expected, atol=1e-5)
        assert (mixed[row, len(expected) :] == MASKED).all()
    assert torch.softmax(mixed[1], -1)[2:].eq(0).all()
    assert logits(model, task_ids=["two"] * 4).shape == (4, 2)
    assert torch.equal(logits(model), logits(MODELS[name][0]()))


def test_the_loss_is_the_mean_over_rows_of_each_tasks_own(tmp_path: Path) -> None:
    bank = with_heads(tmp_path)
    labels, ids = torch.tensor([4.0, 1.0, 0.0, 2.5]), ["five", "two", "two", "number"]
    output = bank.wrap(bert())(**INPUTS, labels=labels, task_ids=ids)
    expected = []
    for row, task in enumerate(ids):
        target = labels[row : row + 1] if task == "number" else labels[row : row + 1].long()
        own = {key: value[row : row + 1] for key, value in INPUTS.items()}
        expected.append(own_model(bank, "bert", task)(**own, labels=target).loss)
    assert torch.allclose(output.loss, torch.stack(expected).mean(), atol=1e-5)
    assert output.to_tuple()[0] is output.loss


def test_gradients_reach_the_own_head_alone(tmp_path: Path) -> None:
    bank = with_heads(tmp_path)
    model, heads = bank.wrap(bert()), {}
    for name in LABELS:
        model.tasks.cache.training[name] = loaded = model.tasks.load(bank.get(name))
        heads[name] = loaded.head.parameters["weight"].requires_grad_()
    labels = torch.tensor([1, 0, 0, 1])
    model(**INPUTS, labels=labels, task_ids=["two", None, "two", "two"]).loss.backward()
    assert heads["two"].grad.any() and heads["five"].grad is heads["number"].grad is None


def test_row_losses_are_torchs_losses_row_by_row() -> None:
    scores, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[1, 2:] = -100
    expected = [nn.functional.cross_entropy(s, y) for s, y in zip(scores, labels, strict=True)]
    assert torch.allclose(row_losses(scores, labels), torch.stack(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_unloaded_model_keeps_nothing_of_the_bank(checkpointing: bool, tmp_path: Path) -> None:
    bank, base = with_heads(tmp_path), bert()
    if checkpointing:
        base.gradient_checkpointing_enable()
    before = contents(base)
    expected = base(input_ids=tokens(2)).logits
    model = bank.wrap(base).train()
    model(input_ids=tokens(2), task_ids=["two", "five"])
    plain = model.eval().unload()
    assert plain is base
    assert_same_contents(before, base)
    assert torch.equal(base(input_ids=tokens(2)).logits, expected)
