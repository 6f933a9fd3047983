"""The flat order of a task's numbers, and the types they are kept in."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lotr import ConfigError, Task
from lotr.bank.layout import Layout
from lotr.bank.store import TaskStore, create_store
from lotr.bank.task import DTYPES, Record, to_record, to_task
from lotr.errors import CheckpointError
from lotr.math.cores import CORES
from lotr.sharing.blocks import Heads, Target
from lotr.sharing.make_plan import make_plan
from lotr.sharing.plan import Plan

PATHS = [f"layers.{layer}.{name}" for layer in range(3) for name in ("q", "v")]
FLAT = Layout({"cores": (96,)})


def plan(core: str = "free", modes: tuple[str, ...] = ("layer", "projection"), **fields) -> Plan:
    heads = Heads(4) if fields.get("blocks") == "head" else None
    return make_plan([Target(path, (16, 16), (4, 4), heads=heads) for path in PATHS], modes, core, **fields)


def tensors(layout: Layout) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in layout.shapes.items()}


@pytest.mark.parametrize("core", sorted(set(CORES) - {"identity"}))
def test_numbers_of_every_core_survive_being_laid_flat(core: str) -> None:
    made = plan(core)
    layout = Layout.of(made)
    before = tensors(layout)
    after = layout.unflatten(layout.flatten(before))
    assert layout.size == made.n_cores == sum(t.numel() for t in before.values())
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    many = torch.zeros(5, 2, layout.size)  # any number of tasks, whose tensors are views
    for key, tensor in layout.unflatten(many).items():
        assert tensor.shape == (5, 2, *before[key].shape) and tensor._base is many


def test_a_tensor_of_another_rank_is_named() -> None:
    layout = Layout.of(plan())
    given = tensors(layout)
    given[list(layout.shapes)[1]] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"layers.0.v.*has shape \(3, 3\).*shape \(4, 4\)"):
        layout.flatten(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_their_type_alone(dtype: str) -> None:
    numbers = torch.randn(96) * 10 ** torch.linspace(-3, 3, 96)
    record = to_record(Task("a", numbers), FLAT, dtype)
    assert len(record.numbers) == 96 * DTYPES[dtype].itemsize
    kept = to_task(record, FLAT).numbers
    assert kept.dtype == torch.float32 and torch.equal(kept, numbers.to(DTYPES[dtype]).float())


def test_numbers_that_a_type_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1e\+05 is too large for float16.*bfloat16"):
        to_record(Task("a", torch.full((96,), 1e5)), FLAT, "float16")
    for dtype, odd in itertools.product(DTYPES, (torch.nan, torch.inf)):
        numbers = torch.zeros(96)
        numbers[3] = odd
        with pytest.raises(ConfigError, match="1 of its 96 numbers are not finite"):
            to_record(Task("a", numbers), FLAT, dtype)


# modules × r² numbers of two or four bytes: from a small encoder of rank 8 to a large decoder of rank 32
@pytest.mark.parametrize("task_bytes", [2304, 4096, 6144, 12288, 16384, 24576, 36864, 131072, 458752])
def test_a_file_takes_at_most_15_percent_more_than_the_numbers_in_it(tmp_path: Path, task_bytes: int) -> None:
    create_store(tmp_path / "tasks.sqlite", "0" * 16, task_bytes)
    store, n = TaskStore(tmp_path / "tasks.sqlite", writable=True), 4_000_000 // task_bytes
    with store.database.transaction():
        for i in range(n):
            store.write(Record(f"task-{i}", "bfloat16", 0.0, 0.0, "{}", bytes(task_bytes), b""))
    store.database.close()
    assert (tmp_path / "tasks.sqlite").stat().st_size <= 1.15 * n * task_bytes + 2 * 65536
