"""Heads of tasks: each row has logits of its own task's labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn

from banks import assert_same_contents, contents
from conftest import ARCHITECTURES, SIZES, VOCABULARY, bert, pico, tokens
from lotr import CoreBank, LotrConfig, Task
from lotr.bank.heads import row_losses
from test_bank_rows import alone, logits, numbers_of

LABELS = {"two": 2, "five": 5, "number": 1}
MASKED = torch.finfo(torch.float32).min


def head_of(module: nn.Module, path: str, n: int, seed: int) -> dict[str, Tensor]:
    """Random numbers for a head with `n` outputs."""
    generator = torch.Generator().manual_seed(seed)
    last = [name for name, _ in module.named_parameters()][-1].rpartition(".")[0]
    found = {}
    for name, parameter in module.named_parameters():
        shape = list(parameter.shape)
        if name.rpartition(".")[0] == last:
            shape[0] = n
        found[f"base_model.model.{path}.{name}"] = torch.randn(shape, generator=generator) / 4
    return found


def with_heads(folder: Path, base: nn.Module, path: str) -> CoreBank:
    """A bank on a model with a head, and tasks with heads of two, five and one outputs."""
    targets = ["q_proj", "v_proj"] if path == "score" else ["query", "value"]
    get_peft_model(base, LotrConfig(r=4, target_modules=targets)).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", basis=folder / "basis", dtype="float32")
    for seed, (name, n) in enumerate(LABELS.items()):
        kind = "regression" if n == 1 else "classification"
        head = head_of(getattr(base, path), path, n, seed)
        bank.add(Task(name, numbers_of(bank, seed), head, tuple(map(str, range(n))), kind))
    return bank


def own_head(bank: CoreBank, base: nn.Module, path: str, name: str) -> nn.Module:
    """The base model with one task, cores and head, as an ordinary model."""
    module = getattr(base, path)
    own = {key.removeprefix(f"base_model.model.{path}."): v for key, v in bank.get(name).head.items()}
    for key, value in own.items():
        parent = module.get_submodule(key.rpartition(".")[0])
        setattr(parent, key.rpartition(".")[2], nn.Parameter(value))
    base.config.num_labels = base.num_labels = LABELS[name]
    return alone(bank, base, name)


def roberta() -> nn.Module:
    more = {"num_labels": 3, "max_position_embeddings": 64}
    return pico("RobertaForSequenceClassification", vocab_size=VOCABULARY, **SIZES, **more)


def llama() -> nn.Module:
    config = ARCHITECTURES["llama"].make().config
    config.num_labels = 3
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(config).eval()


MODELS = {
    "bert": (ARCHITECTURES["bert"].make, "classifier"),
    "roberta": (roberta, "classifier"),
    "llama": (llama, "score"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_each_row_goes_through_the_head_of_its_task(name: str, tmp_path: Path) -> None:
    make, path = MODELS[name]
    bank = with_heads(tmp_path, make(), path)
    inputs = ARCHITECTURES["bert"].inputs()
    model = bank.wrap(make())
    ids = ["five", "two", None, "number"]
    mixed = logits(model, inputs, task_ids=ids)
    assert mixed.shape == (4, 5)
    for row, task in enumerate(ids):
        single = make() if task is None else own_head(bank, make(), path, task)
        expected = logits(single, inputs)[row]
        assert torch.allclose(mixed[row, : len(expected)], expected, atol=1e-5)
        assert (mixed[row, len(expected) :] == MASKED).all()
    assert torch.softmax(mixed[1], -1)[2:].eq(0).all()
    assert logits(model, inputs, task_ids=["two"] * 4).shape == (4, 2)
    assert torch.equal(logits(model, inputs), logits(make(), inputs))


def test_the_loss_is_the_mean_over_rows_of_each_tasks_own(tmp_path: Path) -> None:
    make, path = MODELS["bert"]
    bank, inputs = with_heads(tmp_path, make(), path), ARCHITECTURES["bert"].inputs()
    labels, ids = torch.tensor([4.0, 1.0, 0.0, 2.5]), ["five", "two", "two", "number"]
    output = bank.wrap(make())(**inputs, labels=labels, task_ids=ids)
    expected = []
    for row, task in enumerate(ids):
        target = labels[row : row + 1] if task == "number" else labels[row : row + 1].long()
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        expected.append(own_head(bank, make(), path, task)(**own, labels=target).loss)
    assert torch.allclose(output.loss, torch.stack(expected).mean(), atol=1e-5)
    assert output.to_tuple()[0] is output.loss


def test_gradients_reach_the_own_head_alone(tmp_path: Path) -> None:
    make, path = MODELS["bert"]
    bank, inputs = with_heads(tmp_path, make(), path), ARCHITECTURES["bert"].inputs()
    model = bank.wrap(make())
    heads = {}
    for name in LABELS:
        model.tasks.cache.training[name] = loaded = model.tasks.load(bank.get(name))
        heads[name] = loaded.head.parameters["weight"].requires_grad_()
    labels = torch.tensor([1, 0, 0, 1])
    model(**inputs, labels=labels, task_ids=["two", None, "two", "two"]).loss.backward()
    assert heads["two"].grad.any() and heads["five"].grad is heads["number"].grad is None


def test_row_losses_are_torchs_losses_row_by_row() -> None:
    scores, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[1, 2:] = -100
    expected = [nn.functional.cross_entropy(s, y) for s, y in zip(scores, labels, strict=True)]
    assert torch.allclose(row_losses(scores, labels), torch.stack(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_unloaded_model_keeps_nothing_of_the_bank(checkpointing: bool, tmp_path: Path) -> None:
    bank, base = with_heads(tmp_path, bert(), "classifier"), bert()
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
