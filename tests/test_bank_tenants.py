"""Many tenants on one wrapped bank: nobody gets another's answers, or an answer that the bank no longer has."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import banks
from banks import Tiny
from conftest import bert, gpt2, tokens
from lotr import CheckpointError, ConfigError, CoreBank, Task, UnknownTaskError
from lotr.bank.task import to_record
from lotr.bank.wrap import BankModel
from lotr.errors import DataError
from test_bank_processes import in_a_fork

TENANTS = [f"t{n}" for n in range(8)]
CALLS = int(os.environ.get("LOTR_CALLS", "150"))  # of each
INPUTS = {"input_ids": tokens(rows=1, length=4)}


def base() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(**sizes, **still)


def head(outputs: int, width: int = 16) -> dict[str, Tensor]:
    root = "base_model.model.classifier"
    return {f"{root}.weight": torch.randn(outputs, width), f"{root}.bias": torch.randn(outputs)}


def task(bank: CoreBank, name: str, outputs: int = 3) -> Task:
    labels = tuple(map(str, range(outputs)))
    return Task(name, 4 * torch.randn(bank.layout.size), head(outputs), labels, "classification")


@pytest.fixture
def bank(tmp_path: Path) -> CoreBank:
    return made(tmp_path, base())


def made(tmp_path: Path, model: nn.Module) -> CoreBank:
    """Make a bank of eight tenants, with two to five labels."""
    bank = banks.on(tmp_path, model, target_modules=["query", "value"])
    bank.add_many(task(bank, name, 2 + n % 4) for n, name in enumerate(TENANTS))
    return bank


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def logits(model: nn.Module, *names: str | None, **more: Any) -> Tensor:
    output: Tensor = model(input_ids=tokens(rows=len(names), length=4), task_ids=names, **more).logits
    return output


def at_once(run: Callable[[str], Any], names: list[str] = TENANTS) -> list[Any]:
    """Run for all tenants, each in a thread of its own."""
    start = threading.Barrier(len(names))

    def begin(name: str) -> Any:
        start.wait(60)
        return run(name)

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(begin, names))


# ---------------------------------------------------------------------- a selection belongs to its call


def test_of_the_calls_of_eight_threads_none_has_the_answer_of_another(
    tmp_path: Path, fast_switches: None
) -> None:
    # with so little memory tenants push each other out all the time
    model = made(tmp_path, Tiny()).wrap(Tiny(), capacity=4)
    expected = {name: logits(model, name, None) for name in TENANTS}
    assert not any(torch.equal(a[0, :2], b[0, :2]) for a, b in itertools.combinations(expected.values(), 2))

    @torch.no_grad()
    def wrong(name: str) -> int:
        return sum(not torch.equal(logits(model, name, None), expected[name]) for _ in range(CALLS))

    assert at_once(wrong) == [0] * len(TENANTS)
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, Tiny()(**INPUTS).logits)


def test_tasks_of_asyncio_and_their_threads_have_their_own_selections(bank: CoreBank) -> None:
    model = bank.wrap(base())
    expected = {name: logits(model, name) for name in TENANTS}
    inputs = {"input_ids": tokens(rows=1, length=4)}

    async def tenant(name: str) -> bool:
        equal = True
        with model.select([name]):
            for _ in range(10):
                await asyncio.sleep(0)  # the others select theirs
                equal &= torch.equal(model(**inputs).logits, expected[name])
                equal &= torch.equal((await asyncio.to_thread(model, **inputs)).logits, expected[name])
        return equal and not torch.equal(model(**inputs).logits, expected[name])

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*map(tenant, TENANTS))

    assert all(asyncio.run(all_of_them()))


def in_training(bank: CoreBank) -> BankModel:
    model = bank.wrap(base())
    for name in TENANTS:
        model.tasks.cache.training[name] = loaded = model.tasks.load(bank.get(name))
        loaded.numbers.requires_grad_()
    return model


@pytest.mark.parametrize("checkpoints", ["none", "reentrant", "not reentrant"])
def test_gradients_of_threads_are_those_of_their_own_tasks(
    bank: CoreBank, fast_switches: None, checkpoints: str
) -> None:
    model = in_training(bank)
    loaded = model.tasks.cache.training
    elsewhere = ThreadPoolExecutor(
        2
    )  # as on an accelerator, where torch has a thread a device for the backward pass

    def gradient(name: str) -> Tensor:
        loss = logits(model, name, None).square().sum()
        elsewhere.submit(loss.backward).result()
        grad, loaded[name].numbers.grad = loaded[name].numbers.grad, None
        assert grad is not None and grad.any()
        return grad

    expected = {name: gradient(name) for name in TENANTS}
    if checkpoints != "none":  # layers run again in the backward pass
        model.train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpoints == "reentrant"})
        model.get_base_model().enable_input_require_grads()
    at_once(lambda name: [torch.testing.assert_close(gradient(name), expected[name]) for _ in range(8)])


def test_two_threads_are_inside_the_model_at_the_same_time(bank: CoreBank) -> None:
    model = bank.wrap(base())
    both = threading.Barrier(2)  # which breaks where one waits for the other to leave
    layer = model.get_base_model().bert.encoder.layer[0]
    layer.register_forward_pre_hook(lambda *_: (both.wait(60), None)[1])
    at_once(lambda name: logits(model, name), TENANTS[:2])


# ---------------------------------------------------------------------- answers follow the bank


def change(bank: CoreBank) -> None:
    """What becomes of three tasks: one is removed and another takes its name, the third is replaced."""
    bank.remove("t0")
    bank.rename("t1", "t0")
    bank.add(replace(bank.get("t3"), name="t2"), replace=True)


@pytest.mark.parametrize("by", ["the same handle", "another handle", "another process"])
def test_a_task_that_changes_answers_as_the_bank_has_it_from_the_next_call_on(
    bank: CoreBank, by: str
) -> None:
    model = bank.wrap(base())
    names = ("t0", "t1", "t2", "t3")
    before = {name: logits(model, name) for name in names}
    if by == "the same handle":
        change(bank)
    elif by == "another handle":
        change(CoreBank.open(bank.path, writable=True))
    else:
        process, _ = in_a_fork(lambda tell: change(CoreBank.open(bank.path, writable=True)))
        process.join(60)
        assert process.exitcode == 0
    assert torch.equal(logits(model, "t0"), before["t1"])
    assert torch.equal(logits(model, "t2"), before["t3"]) and torch.equal(logits(model, "t3"), before["t3"])
    with pytest.raises(UnknownTaskError, match="no task 't1'"):
        logits(model, "t1")
    bank.add(replace(bank.get("t3"), name="t1"))
    assert torch.equal(logits(model, "t1"), before["t3"])


def test_a_change_that_is_taken_back_is_never_answered_with(bank: CoreBank) -> None:
    model = bank.wrap(base())
    before = logits(model, "t0")

    def tasks() -> Iterator[Task]:
        yield replace(bank.get("t1"), name="t0")
        assert torch.equal(logits(model, "t0"), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.add_many(tasks(), replace=True)
    assert torch.equal(logits(model, "t0"), before)


# ---------------------------------------------------------------------- a malformed head is its own task's alone

ROOT = "base_model.model.classifier"
BAD_HEADS = {
    "another width": head(3, width=17),
    "one axis": {f"{ROOT}.weight": torch.randn(3), f"{ROOT}.bias": torch.randn(3)},
    "more rows than labels": head(20_000),
    "weight and bias of other labels": head(3) | {f"{ROOT}.bias": torch.randn(4)},
    "no number": head(3) | {f"{ROOT}.bias": torch.tensor(1.0)},
    "another name": {key.replace("classifier", "score"): value for key, value in head(3).items()},
    "no bias": {f"{ROOT}.weight": torch.randn(3, 16)},
}


@pytest.mark.parametrize("what", BAD_HEADS)
def test_a_malformed_head_is_refused_when_added_verified_and_used_and_harms_no_one(
    bank: CoreBank, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bank.wrap(base(), capacity="100kB")
    before = {name: logits(model, name) for name in TENANTS}
    used = model.tasks.cache.used
    bad = Task("bad", torch.randn(bank.layout.size), BAD_HEADS[what], ("a", "b", "c"), "classification")
    with pytest.raises(ConfigError, match=r"'bad'.*head|head of task 'bad'"):
        bank.add(bad)
    assert len(bank) == len(TENANTS) and bank.verify()["ok"]
    monkeypatch.setattr("lotr.bank.task.check_head", lambda *_: None)  # another program writes it
    with bank.store.database.transaction():
        bank.store.write(to_record(bad, bank.layout, "float32"))
    monkeypatch.undo()
    assert [found["task"] for found in bank.verify()["damaged"]] == ["bad"]
    for names in (("bad",), ("t0", "bad"), ("bad", None)):
        with pytest.raises(CheckpointError, match="'bad'"):
            logits(model, *names)
    assert all(torch.equal(logits(model, name), before[name]) for name in TENANTS)
    assert model.tasks.cache.used == used


def test_heads_count_in_the_memory_that_was_asked_for(bank: CoreBank) -> None:
    bank.add(task(bank, "wide", outputs=5000))
    bank.add(task(bank, "fits", outputs=50))
    model = bank.wrap(base(), capacity="10kB")
    before = {name: logits(model, name) for name in TENANTS}
    with pytest.raises(ConfigError, match=r"'wide' takes 340,\d{3} bytes"):
        logits(model, "wide", "t0")
    for name in ("fits", *TENANTS):
        assert name == "fits" or torch.equal(logits(model, name), before[name])
        assert sum(loaded.nbytes for loaded, *_ in model.tasks.cache._tasks.values()) <= 10_000
    with pytest.raises(ConfigError, match="at most 10,000"):
        bank.add(task(bank, "huge", outputs=20_000))


# ---------------------------------------------------------------------- calls that make no sense


@pytest.mark.parametrize("label", [2, -1, 0.5, 4.0])
def test_a_label_outside_of_the_tasks_own_is_an_error_that_names_the_row(
    bank: CoreBank, label: float
) -> None:
    model = bank.wrap(base())
    with pytest.raises(DataError, match=rf"Row 1 has the label {label:g}, .* from 0 to 1"):
        logits(model, "t3", "t0", labels=torch.tensor([4, label]))  # of five and two labels
    for labels in ([4, 1], [[4], [1]], [-100, 0]):
        output = model(input_ids=tokens(rows=2, length=4), task_ids=["t3", "t0"], labels=torch.tensor(labels))
        assert 0 < output.loss < 100


@pytest.mark.parametrize(
    "names, says",
    [
        (["t0"], "1 tasks are named for a batch of 2 rows"),  # in a run are beams, and rows inside `select`
        (["t0", "t1", "t0", "t1"], "one task a row"),
        ([None], "one task a row"),
        ("t0", "one name a row"),
        ([], "one task a row"),
        (["t0", "nobody"], "no task 'nobody'"),
    ],
    ids=str,
)
def test_generate_and_forward_refuse_the_same_calls(tmp_path: Path, names: Any, says: str) -> None:
    bank = banks.on(tmp_path, gpt2(), ("t0", "t1"), target_modules=["c_attn"])
    model, inputs = bank.wrap(gpt2()), {"input_ids": tokens(rows=2, length=4)}
    for call in (model, model.generate):
        for way in ("task_ids", "adapter_names"):
            with pytest.raises((ConfigError, UnknownTaskError), match=says):
                call(**inputs, **{way: names})
        with pytest.raises(ConfigError, match="Leave out one"):
            call(**inputs, task_ids=["t0", "t1"], adapter_names=["t0", "t1"])
