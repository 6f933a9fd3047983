"""The flat order of a task's numbers, and the types they are kept in."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lotr import ConfigError
from lotr.bank.codec import DTYPES, decode, encode, n_bytes
from lotr.bank.layout import Layout
from lotr.errors import CheckpointError
from lotr.math.cores import CORES
from lotr.math.update import side_by_side
from lotr.sharing.blocks import Heads, Target
from lotr.sharing.keys import core_key
from lotr.sharing.make_plan import make_plan
from lotr.sharing.plan import Plan

PATHS = [f"layers.{layer}.{name}" for layer in range(3) for name in ("q", "v")]


def plan(core: str = "free", modes: tuple[str, ...] = ("layer", "projection"), **fields) -> Plan:
    heads = Heads(4) if fields.get("blocks") == "head" else None
    return make_plan([Target(path, (16, 16), (4, 4), heads=heads) for path in PATHS], modes, core, **fields)


def tensors(layout: Layout) -> dict[str, Tensor]:
    return {entry.key: torch.randn(entry.shape) for entry in layout.entries}


@pytest.mark.parametrize("core", ["free", "tucker", "cp", "tt"])
def test_numbers_of_every_core_survive_being_laid_flat(core: str) -> None:
    made = plan(core)
    layout = Layout.of(made)
    before = tensors(layout)
    after = layout.unflatten(layout.flatten(before))
    assert layout.size == made.n_cores == sum(t.numel() for t in before.values())
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_tasks_are_a_leading_mode_and_tensors_are_views_of_it() -> None:
    layout = Layout.of(plan())
    slab = torch.zeros(5, 2, layout.size)
    for key, tensor in layout.unflatten(slab).items():
        assert tensor.shape[:2] == (5, 2) and tensor.untyped_storage().data_ptr() == slab.data_ptr(), key


def test_every_core_of_a_grid_of_blocks_is_one_core() -> None:
    made = plan(modes=("layer", "head"), blocks="head")
    layout = Layout.of(made)
    assert layout.n_cores == made.n_sites == 6 * 4
    parts = [part for path in PATHS for part in made.parts[path]]
    named = {
        core_key(part): side_by_side(torch.ones(4, 4, 4) * torch.arange(4)[:, None, None], part.grid)
        for part in parts
    }
    of_site = layout.core_of % 4  # four heads a module, in order
    assert torch.equal(layout.flatten(named).long(), of_site)


def test_a_square_of_blocks_counts_its_cores_one_by_one() -> None:
    made = make_plan(
        [Target("up", (32, 16), (4, 4)), Target("down", (16, 32), (4, 4))], ("site",), blocks="square"
    )
    layout = Layout.of(made)
    assert layout.n_cores == 4 and layout.core_of.bincount().tolist() == [16] * 4


def test_what_has_no_numbers_of_its_own_cannot_be_a_basis() -> None:
    with pytest.raises(ConfigError, match="basis without cores"):
        Layout.of(plan("identity"))
    with pytest.raises(ConfigError, match="magnitude='per_output'"):
        Layout.of(plan(magnitude="per_output"))


def test_a_tensor_of_another_rank_is_named() -> None:
    layout = Layout.of(plan())
    given = tensors(layout)
    given[layout.entries[1].key] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"layers.0.v.*has shape \(3, 3\).*shape \(4, 4\)"):
        layout.flatten(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_as_many_as_foretold_and_the_error_is_that_of_the_type(dtype: str) -> None:
    layout = Layout.of(plan())
    numbers = torch.randn(layout.size) * 10 ** torch.linspace(-3, 3, layout.size)
    blob = encode(numbers, layout, dtype)
    assert len(blob) == n_bytes(layout, dtype)
    kept = decode([blob, blob], layout, dtype)
    assert kept.shape == (2, layout.size) and kept.dtype == torch.float32
    if dtype == "int8":  # half a step of the core's own scale
        peaks = torch.stack([numbers[layout.core_of == core].abs().max() for core in range(layout.n_cores)])
        assert ((kept[1] - numbers).abs() <= peaks[layout.core_of] / 254 * 1.0001).all()
    else:
        assert torch.equal(kept[1], numbers.to(getattr(torch, dtype)).float())


def test_int8_keeps_a_core_of_zeros_and_a_small_one_beside_a_large_one() -> None:
    layout = Layout.of(plan())
    numbers = torch.zeros(layout.size)
    numbers[layout.core_of == 1] = 1e4
    numbers[layout.core_of == 2] = 1e-4
    torch.testing.assert_close(
        decode([encode(numbers, layout, "int8")], layout, "int8")[0], numbers, rtol=1e-6, atol=0
    )


def test_numbers_that_a_type_cannot_hold_are_refused() -> None:
    layout = Layout.of(plan())
    large = torch.full((layout.size,), 1e5)
    with pytest.raises(ConfigError, match=r"1e\+05 is too large for float16.*bfloat16"):
        encode(large, layout, "float16")
    for dtype, odd in itertools.product(DTYPES, (torch.nan, torch.inf)):
        large[3] = odd
        with pytest.raises(ConfigError, match=f"1 of its {layout.size} numbers are not finite"):
            encode(large, layout, dtype)


def test_every_core_is_covered() -> None:
    assert set(CORES) == {"free", "identity", "tucker", "cp", "tt"}
