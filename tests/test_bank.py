"""A bank on disk: what goes in comes out, and changes are whole."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import banks
from conftest import bert, gpt2, tokens
from lotr import CheckpointError, ConfigError, CoreBank, LotrConfig, Task, UnknownTaskError
from lotr.files.adapter_folder import WEIGHTS
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}
NAMES = ["../../etc/passwd", "a/b\\c", "'; DROP TABLE task; --", "задача", "任务 🙂", "a b", "%", "[red]"]
NAMES += ["nul", "." * 200]


def test_a_task_comes_out_as_it_went_in(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path)
    given = banks.task(bank, "one", note={"nested": ["α", 1.5, None]})
    assert bank.add(given) == 0.0
    found = CoreBank.open(tmp_path / "bank").get("one")
    assert torch.equal(found.numbers, given.numbers)
    assert found.head.keys() == given.head.keys()
    assert all(torch.equal(found.head[key], tensor) for key, tensor in given.head.items())
    assert (found.labels, found.task, found.metadata) == (given.labels, given.task, given.metadata)


@pytest.mark.parametrize("kind", ["classification", None])
def test_labels_and_metadata_leave_with_an_exported_task_and_come_back(
    tmp_path: Path, kind: str | None
) -> None:
    bank = banks.bank(tmp_path)
    given = replace(banks.task(bank, "one", note="α"), task=kind)
    bank.add_many([given, Task("bare", given.numbers, metadata={"note": "β"})])
    bank.export("one", tmp_path / "one")
    bank.export("bare", tmp_path / "bare")
    back, bare = (bank.from_adapter("back", tmp_path / name) for name in ("one", "bare"))
    assert (back.labels, back.task, back.metadata) == (given.labels, "classification", given.metadata)
    assert (bare.labels, bare.task, bare.metadata) == ((), None, {"note": "β"})


@pytest.mark.parametrize("dtype, most", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_the_error_of_rounding_is_told_and_true(tmp_path: Path, dtype: str, most: float) -> None:
    bank = banks.bank(tmp_path, dtype=dtype)
    given = banks.task(bank, "one")
    error = bank.add(given)
    kept = bank.get("one").numbers
    assert 0 < error < most
    assert error == pytest.approx(float((kept - given.numbers).norm() / given.numbers.norm()), rel=1e-5)
    assert bank.about("one")["rounding_error"] == bank.stats()["worst_rounding_error"] == error


def test_many_are_read_in_the_order_asked_for_with_duplicates(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=5)
    asked = ["task-3", "task-0", "task-3"]
    numbers, tasks = bank.read(asked)
    assert numbers.shape == (3, bank.layout.size) and [task.name for task in tasks] == asked
    for row, name in zip(numbers, asked, strict=True):
        assert torch.equal(row, bank.get(name).numbers)
    assert bank.read([])[0].shape == (0, bank.layout.size)


def test_names_are_data(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path)
    bank.add_many(banks.task(bank, name, seed) for seed, name in enumerate(NAMES))
    assert list(bank.names()) == sorted(NAMES) and len(bank) == len(NAMES)
    for seed, name in enumerate(NAMES):
        assert name in bank and bank.get(name).metadata["seed"] == seed
        bank.export(name, tmp_path / f"out-{seed}")
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "basis", *(f"out-{n}" for n in range(len(NAMES)))}


NO_TEXT = ["", "  ", "__base__", 3, None, "x" * 201, "x" * 2**20]
UNSEEN = [f"a{c}b" for c in "\n\x00\x1b\ud800\u202e\u2066\u200b\ufeff\u2028"]


def test_a_name_that_no_table_can_show_is_refused(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=1)
    for name in (*NO_TEXT, *UNSEEN):
        for use in (partial(banks.task, bank), partial(bank.rename, "task-0")):
            with pytest.raises(ConfigError, match="cannot be called"):
                use(name)
        with pytest.raises(UnknownTaskError, match="no task"):
            bank.get(name)  # type: ignore[arg-type]
        assert name not in bank and list(bank.names()) == ["task-0"]


def test_tasks_are_replaced_renamed_and_removed(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=3)
    bank.add(replace(banks.task(bank, "task-1", seed=7), head={}), replace=True)
    found = bank.get("task-1")
    assert found.metadata["seed"] == 7 and not found.head and len(bank) == 3
    bank.rename("task-1", "другая")
    assert bank.get("другая").metadata["seed"] == 7 and "task-1" not in bank
    bank.remove("task-0", "другая")
    assert list(bank.names()) == ["task-2"] and bank.verify()["ok"]
    assert bank.stats()["tasks"] == 1


def _wrong_size(bank: CoreBank, folder: Path) -> None:
    bank.add(replace(banks.task(bank, "wrong"), numbers=torch.zeros(6 * 9)))


def _open(folder: Path) -> CoreBank:
    return CoreBank.open(folder / "bank")


@pytest.mark.parametrize(
    "use, error, says",
    [
        (lambda b, f: b.add(banks.task(b, "task-1", 7)), ConfigError, r"a task 'task-1' already.*replace"),
        (lambda b, f: b.add_many(banks.task(b, n) for n in ("x", "task-1")), ConfigError, "task-1"),
        (
            lambda b, f: b.add_many(banks.task(b, f"x{1 // (2 - n)}") for n in range(3)),
            ZeroDivisionError,
            "by zero",
        ),
        (lambda b, f: b.rename("task-0", "task-2"), ConfigError, "'task-2' already"),
        (lambda b, f: b.remove("task-0", "nothing"), UnknownTaskError, "no task 'nothing'"),
        (lambda b, f: b.get("task-400"), UnknownTaskError, "no task 'task-400'. Near matches: .*task-4"),
        (lambda b, f: b.get("zzz"), UnknownTaskError, "no task 'zzz'. `lotr bank list` shows"),
        (lambda b, f: _open(f).remove("task-0"), ConfigError, "for reading. Open it with writable=True"),
        (
            lambda b, f: _open(f).add(banks.task(b, "x")),
            ConfigError,
            "for reading. Open it with writable=True",
        ),
        (
            _wrong_size,
            ConfigError,
            r"'wrong' has numbers of shape \(54,\), and a task of this bank has \(96,\)",
        ),
        (lambda b, f: b.add(banks.task(b, "x", note=object())), ConfigError, "'x' cannot be kept: .*JSON"),
        (lambda b, f: b.add(banks.task(b, "x", note=math.nan)), ConfigError, "'x' cannot be kept: .*JSON"),
        (lambda b, f: b.export("task-0", f / "x", refer=True, as_lora=True), ConfigError, "stands alone"),
        (lambda b, f: b.export("task-0", f / "basis"), ConfigError, "not empty"),
        (lambda b, f: CoreBank.create(f / "bank", f / "basis"), ConfigError, "is a bank already"),
        (lambda b, f: CoreBank.create(f / "basis", f / "basis"), ConfigError, "not an empty folder"),
        (lambda b, f: CoreBank.create(f / "x", f / "basis", dtype="int4"), ConfigError, "'int4'.*float16"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, use: Callable[..., Any], error: type[Exception], says: str
) -> None:
    bank = banks.bank(tmp_path, tasks=40)
    before, names = bank.read(list(bank.names()))[0], list(bank.names())
    with pytest.raises(error, match=says):
        use(bank, tmp_path)
    assert list(bank.names()) == names and torch.equal(bank.read(names)[0], before) and bank.verify()["ok"]
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "basis"}


def test_a_bank_tells_what_it_is_and_travels_to_another_process(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=2)
    numbers = bank.get("task-0").numbers
    for same in (bank, pickle.loads(pickle.dumps(bank))):
        assert f"{tmp_path / 'bank'}': 2 tasks of 96 numbers, 384 bytes each in float32" in repr(same)
        assert torch.equal(same.get("task-0").numbers, numbers)
        same.close()
    counted = CoreBank.open(tmp_path / "bank").stats()
    assert counted["bytes_of_numbers"] == 2 * bank.task_bytes
    assert counted["bytes_of_tasks"] == (tmp_path / "bank" / "tasks.sqlite").stat().st_size


# ---- adapters in and out


@pytest.mark.parametrize("method", ["lotr", "metatt_5d", "tenslora_att_qkv"])
def test_an_adapter_trained_on_the_bank_comes_back_the_same(tmp_path: Path, method: str) -> None:
    bank = banks.bank(tmp_path, method=method)
    model = banks.stirred(bank.config, seed=1)
    model.save_pretrained(tmp_path / "task")
    bank.add_adapter("task", tmp_path / "task")
    for words in ({}, {"refer": True}, {"as_lora": True}):
        output = tmp_path / f"out-{len(words)}-{words.get('refer', False)}"
        bank.export("task", output, **words)
        loaded = PeftModel.from_pretrained(bert(), output).eval()
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if words.get("as_lora") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(outputs(loaded, INPUTS), outputs(model, INPUTS), **tolerance)


def test_an_adapter_that_refers_holds_cores_alone(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path, tasks=1)
    whole = bank.export("task-0", tmp_path / "whole")
    refers = bank.export("task-0", tmp_path / "refers", refer=True)
    assert whole["numbers"] - refers["numbers"] == bank.plan.n_factors
    assert refers["numbers"] == bank.layout.size
    assert not [key for key in load_file(tmp_path / "refers" / WEIGHTS) if "lotr_U" in key]


def test_the_basis_itself_is_a_task_too(tmp_path: Path) -> None:
    bank = banks.bank(tmp_path)
    bank.add_adapter("basis", tmp_path / "basis", note="the first")
    bank.export("basis", tmp_path / "out")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("basis", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert bank.get("basis").metadata == {"note": "the first"}


@pytest.mark.parametrize("copied", [False, True])
def test_a_bank_can_be_named_as_a_basis(tmp_path: Path, copied: bool) -> None:
    bank = banks.bank(tmp_path, tasks=1)
    fields = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "basis_copy": copied}
    model = banks.stirred(LotrConfig(r=4, basis=str(tmp_path / "bank"), **fields), seed=3)
    model.save_pretrained(tmp_path / "task")
    bank.add_adapter("task", tmp_path / "task")
    other = CoreBank.create(tmp_path / "other", tmp_path / "bank")
    assert other.description.basis_hash == bank.description.basis_hash and len(other) == 0


def test_a_bank_of_an_adapter_on_some_modules_of_its_basis_gives_and_takes_adapters(tmp_path: Path) -> None:
    banks.basis(tmp_path / "basis")
    config = LotrConfig(basis=str(tmp_path / "basis"), target_modules=["query"], task_type="SEQ_CLS")
    model = banks.stirred(config, seed=1)
    model.save_pretrained(tmp_path / "some")
    bank = CoreBank.create(tmp_path / "bank", tmp_path / "some", dtype="float32")
    bank.add_adapter("refers", tmp_path / "some")
    bank.export("refers", tmp_path / "alone")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "alone").eval()
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))
    bank.add_adapter("alone", tmp_path / "alone")
    assert torch.equal(bank.get("alone").numbers, bank.get("refers").numbers)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"method": "lotr"}, r"factors with hash \w{16}, and those of the bank"),
        ({"scaling": 2.0}, "scaling=2.0, and the bank in .* has scaling=1.0"),
        ({"core": "tucker"}, "core='tucker', and the bank"),
    ],
    ids=str,
)
def test_an_adapter_on_other_factors_is_refused(tmp_path: Path, fields: dict, says: str) -> None:
    bank = banks.bank(tmp_path, tasks=1)
    torch.manual_seed(5)
    banks.basis(tmp_path / "other", seed=5, **fields)
    with pytest.raises(CheckpointError, match=says):
        bank.add_adapter("other", tmp_path / "other")
    assert list(bank.names()) == ["task-0"]


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"method": "lora"}, "without cores"),
        ({"magnitude": "per_output"}, "magnitude='per_output'"),
        ({"bias": "all"}, "bias='all'"),
    ],
    ids=str,
)
def test_what_cannot_be_a_basis_leaves_no_folder(tmp_path: Path, fields: dict, says: str) -> None:
    banks.basis(tmp_path / "basis", **fields)
    with pytest.raises(ConfigError, match=says):
        CoreBank.create(tmp_path / "bank", tmp_path / "basis")
    assert [p.name for p in tmp_path.iterdir()] == ["basis"]


# ---- the base model


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    from lotr.files.adapter_folder import read_adapter, write_task
    from lotr.files.fingerprint import fingerprint

    folder = banks.basis(tmp_path / "basis")
    paths = [target["path"] for target in read_adapter(folder).config["targets"]]
    write_task(folder, {"base_model": "pico", "base_fingerprint": fingerprint(bert())})
    bank = CoreBank.create(tmp_path / "bank", folder)
    bank.basis.check_base(bert())
    other = bert()
    with torch.no_grad():
        other.get_submodule(paths[0]).weight[0, 0] += 1
    with pytest.raises(
        CheckpointError, match=r"is for \('pico'\): the fingerprint differs in 1 tensors, first"
    ):
        bank.basis.check_base(other)
    with pytest.raises(CheckpointError, match="another structure"):
        bank.basis.check_base(gpt2())
    task = banks.stirred(bank.config)
    task.save_pretrained(tmp_path / "task")
    write_task(tmp_path / "task", {"base_model": "other", "base_fingerprint": fingerprint(other)})
    with pytest.raises(CheckpointError, match=r"another base model.*'other'"):
        bank.add_adapter("task", tmp_path / "task")


def test_verbs_of_one_adapter_are_refused_on_a_bank(tmp_path: Path) -> None:
    """They would give the base model: tasks are in the bank, and rows have their own."""
    with banks.bank(tmp_path, tasks=2) as bank:
        assert torch.equal(bank.read("task-0")[0], bank.read(["task-0"])[0])
        model = bank.wrap(bert())
        with pytest.raises(ConfigError, match=r"bank.export\(name, folder\)"):
            model.save_pretrained(tmp_path / "saved")
        with model.select(["task-0"]), pytest.raises(ConfigError, match="cannot be merged"):
            model.merge_and_unload()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(CheckpointError, match=r"is a bank of tasks.*CoreBank.open\(folder\).wrap\(base\)"):
        PeftModel.from_pretrained(bert(), tmp_path / "bank")
