"""Norms without a dense update: they equal the dense ones to 1e-12 in float64 and to 1e-5 in float32, relative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from factored_parts import IN, LAYOUTS, OUT, dense, leaves, place
from lotr.math import norms
from lotr.math.norms import BaseWeight, column_energy, row_energy, update_energy

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ROWS = 0.5 + torch.arange(OUT, dtype=torch.float64) / 8  # exact in every type
#: Name → the factored energy, and the dense one.
ENERGIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rows": (row_energy, lambda W, dW: (W + dW).square().sum(1)),
    "columns": (
        lambda base, parts: column_energy(base, parts, ROWS.to(base.read().dtype)),
        lambda W, dW: (ROWS[:, None] * (W + dW)).square().sum(0),
    ),
    "update": (lambda base, parts: update_energy(parts), lambda W, dW: dW.square().sum()[None]),
}
PLACED = [layout for layout in LAYOUTS if layout != "no part"]
every_energy = pytest.mark.parametrize("name", ENERGIES)
every_layout = pytest.mark.parametrize("layout", PLACED)


def _weight(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(OUT, IN, dtype=torch.float64).to(dtype)


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


def test_the_norms_of_the_weight_are_computed_once_and_until_the_cache_is_cleared() -> None:
    weights = [_weight()]
    base = BaseWeight(lambda: weights[-1])
    first = base.row_energy()
    weights.append(_weight())
    assert base.row_energy() is first
    base.cache.clear()
    torch.testing.assert_close(base.row_energy(), weights[-1].square().sum(1))


def test_the_norms_of_the_weight_carry_no_gradient_and_serve_training_after_inference() -> None:
    W, parts = _weight().requires_grad_(), place("one part")
    base = BaseWeight(lambda: W)
    with torch.inference_mode():
        row_energy(base, parts)
    assert not base.row_energy().requires_grad and not base.row_energy().is_inference()
    row_energy(base, parts).sum().backward()
    assert W.grad is None and all(leaf.grad is not None for leaf in leaves(parts))
