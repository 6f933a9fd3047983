"""Norms without a dense update: they equal the dense ones to 1e-12 in float64 and to 1e-5 in float32, relative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lotr.math import norms
from lotr.math.norms import BaseWeight, Placed, column_energy, row_energy, update_energy
from factored_parts import IN, LAYOUTS, OUT, dense, leaves, place

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ROWS = 0.5 + torch.arange(OUT, dtype=torch.float64) / 8  # exact in every type
#: Name → the factored energy, and the dense one.
ENERGIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rows": (row_energy, lambda W, dW: (W + dW).square().sum(1)),
    "columns": (
        lambda base, parts: column_energy(base, parts, ROWS.to(base.weight().dtype)),
        lambda W, dW: (ROWS[:, None] * (W + dW)).square().sum(0),
    ),
    "update": (lambda base, parts: update_energy(parts), lambda W, dW: dW.square().sum()[None]),
}
PLACED = [layout for layout in LAYOUTS if layout != "no part"]
every_energy = pytest.mark.parametrize("name", ENERGIES)
every_layout = pytest.mark.parametrize("layout", PLACED)


def _weight(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(OUT, IN, dtype=torch.float64).to(dtype)


class Counted:
    """A weight that knows how often it was asked for."""

    def __init__(self, W: Tensor) -> None:
        self.W, self.times = W, 0

    def __call__(self) -> Tensor:
        self.times += 1
        return self.W


@every_energy
@every_layout
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_factored_norms_are_the_dense_norms(name: str, layout: str, dtype: torch.dtype) -> None:
    W, parts = _weight(dtype), place(layout, dtype)
    ours, theirs = ENERGIES[name]
    energy = ours(BaseWeight(lambda: W), parts)
    assert energy.dtype == dtype
    expected = theirs(W.double(), dense(parts))
    torch.testing.assert_close(energy.sqrt().double(), expected.sqrt(), rtol=TOLERANCE[dtype], atol=0)


@every_energy
@every_layout
@pytest.mark.parametrize("frozen", [False, True], ids=["trained V", "frozen V"])
def test_gradients_of_factored_norms_are_the_dense_ones(name: str, layout: str, frozen: bool) -> None:
    W, parts = _weight(), place(layout, frozen=frozen)
    found = []
    for energy in (ENERGIES[name][0](BaseWeight(lambda: W), parts), ENERGIES[name][1](W, dense(parts))):
        found.append(torch.autograd.grad(energy.sqrt().sin().sum(), leaves(parts)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@every_energy
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", ["float32", "half"])
def test_norms_of_half_precision_are_computed_in_float32(name: str, half: torch.dtype, factors: str) -> None:
    W = _weight(half)
    parts = place("one part", torch.float32 if factors == "float32" else half)
    ours, theirs = ENERGIES[name]
    energy = ours(BaseWeight(lambda: W), parts)
    assert energy.dtype == torch.float32
    # `left` multiplies in the type of the factors, three digits in bfloat16; all after it is float32
    rtol = 1e-5 if factors == "float32" else 4 * torch.finfo(half).eps
    torch.testing.assert_close(
        energy.sqrt().double(), theirs(W.double(), dense(parts)).sqrt(), rtol=rtol, atol=rtol
    )


@every_energy
def test_a_weight_in_double_takes_factors_in_single(name: str) -> None:
    W, parts = _weight(), place("both are split", torch.float32)
    energy = ENERGIES[name][0](BaseWeight(lambda: W), parts)
    expected = ENERGIES[name][1](W, dense(parts))
    torch.testing.assert_close(energy.sqrt().double(), expected.sqrt(), rtol=1e-5, atol=0)


def test_without_an_update_the_norms_are_those_of_the_weight() -> None:
    W = _weight()
    base, one = BaseWeight(lambda: W), torch.ones(OUT, dtype=torch.float64)
    torch.testing.assert_close(row_energy(base, []).sqrt(), W.norm(dim=1))
    torch.testing.assert_close(column_energy(base, [], one).sqrt(), W.norm(dim=0))


def test_a_norm_is_the_same_whatever_is_squared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    W = _weight()
    for chunk in (1, 5 * IN, 1000):
        monkeypatch.setattr(norms, "_CHUNK", chunk)
        torch.testing.assert_close(BaseWeight(lambda: W).row_energy(), W.square().sum(1))
        torch.testing.assert_close(
            column_energy(BaseWeight(lambda: W), [], ROWS), (ROWS[:, None] * W).square().sum(0)
        )


# ---- what is kept


def test_with_frozen_factors_the_weight_is_read_once() -> None:
    weight, parts = Counted(_weight()), place("rows are split", frozen=True)
    base = BaseWeight(weight)
    first = row_energy(base, parts)
    times = weight.times
    assert torch.equal(row_energy(base, parts), first)
    assert weight.times == times


@every_layout
def test_what_is_kept_gives_the_value_of_what_is_not(layout: str) -> None:
    W, frozen = _weight(), place(layout, frozen=True)
    trained = [Placed(part.update, part.row, part.column) for part in frozen]
    base = BaseWeight(lambda: W)
    row_energy(base, frozen)
    torch.testing.assert_close(row_energy(base, frozen), row_energy(BaseWeight(lambda: W), trained))


def test_a_kept_product_serves_any_core() -> None:
    W, (part,) = _weight(), place("one part of a grid", frozen=True)
    base = BaseWeight(lambda: W)
    row_energy(base, [part])
    with torch.no_grad():
        part.update.C.mul_(3)
    torch.testing.assert_close(row_energy(base, [part]), (W + dense([part])).square().sum(1))


def test_factors_that_train_are_never_kept() -> None:
    W, (part,) = _weight(), place("one part")
    base = BaseWeight(lambda: W)
    row_energy(base, [part])
    with torch.no_grad():
        part.update.V.mul_(3)
    torch.testing.assert_close(row_energy(base, [part]), (W + dense([part])).square().sum(1))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained V", "frozen V"])
def test_a_weight_of_another_version_is_read_again(frozen: bool) -> None:
    weight, parts = Counted(_weight()), place("both are split", frozen=frozen)
    base = BaseWeight(weight, lambda: weight.W.data_ptr())
    stale = row_energy(base, parts)
    weight.W = _weight()
    expected = (weight.W + dense(parts)).square().sum(1)
    torch.testing.assert_close(row_energy(base, parts), expected)
    assert not torch.allclose(stale, expected)


def test_a_weight_that_moved_keeps_its_norms() -> None:
    weight = Counted(_weight())
    base = BaseWeight(weight, lambda: weight.W.data_ptr())
    before, kept = base.version(), base.row_energy()
    weight.W = weight.W.clone()
    base.moved(before, weight.W.device)
    assert base.row_energy() is kept


def test_the_norms_of_the_weight_are_kept_without_gradient() -> None:
    W = _weight().requires_grad_()
    assert not BaseWeight(lambda: W).row_energy().requires_grad
