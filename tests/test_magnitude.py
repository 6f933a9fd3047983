"""Magnitudes against their papers' formulas on dense weights: 1e-12 relative in float64, where nothing else is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_truth import rescaled
from factored_parts import IN, LAYOUTS, OUT, dense, leaves, place
from lotr.math import norms
from lotr.math.magnitude import MAGNITUDES, Gains
from lotr.math.norms import BaseWeight, column_energy, row_energy

Numbers = dict[str, Tensor]
RESCALING = [name for name, rule in MAGNITUDES.items() if not rule.additive]
PLACED = [layout for layout in LAYOUTS if layout != "no part"]
every_rule = pytest.mark.parametrize("name", RESCALING)
every_layout = pytest.mark.parametrize("layout", PLACED)


def _weight(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(OUT, IN, dtype=torch.float64).to(dtype)


def _trained(name: str, W: Tensor) -> Numbers:
    """Return numbers away from their start."""
    started = MAGNITUDES[name].init(BaseWeight(lambda: W))
    return {key: (number + torch.rand_like(number)).requires_grad_() for key, number in started.items()}


# ---- the formulas


@every_rule
@every_layout
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_adapted_weight_is_the_papers_formula(
    name: str, layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    W, parts = _weight(dtype), place(layout, dtype)
    numbers = _trained(name, W)
    adapted = MAGNITUDES[name].gains(numbers, BaseWeight(lambda: W), parts).weight(W, dense(parts))
    expected = rescaled(W.double(), dense(parts), name, numbers)
    torch.testing.assert_close(adapted.double(), expected, rtol=tolerance, atol=tolerance / 10)


@every_rule
@every_layout
@pytest.mark.parametrize("constant", [True, False], ids=["norms are constants", "norms have gradients"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained V", "frozen V"])
def test_gradients_are_those_of_the_dense_formula(
    name: str, layout: str, constant: bool, frozen: bool
) -> None:
    W, parts, weights = _weight(), place(layout, frozen=frozen), _weight()
    numbers = _trained(name, W)
    gains = MAGNITUDES[name].gains(numbers, BaseWeight(lambda: W), parts, constant=constant)
    found, expected = (
        torch.autograd.grad((adapted * weights).sum(), [*numbers.values(), *leaves(parts)])
        for adapted in (
            gains.weight(W, dense(parts)),
            rescaled(W, dense(parts), name, numbers, constant=constant),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@every_rule
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", ["float32", "half"])
def test_norms_of_half_precision_are_computed_in_float32(name: str, half: torch.dtype, factors: str) -> None:
    W, parts = _weight(half), place("one part", torch.float32 if factors == "float32" else half)
    numbers = _trained(name, W)
    gains = MAGNITUDES[name].gains(numbers, BaseWeight(lambda: W), parts)
    assert {gain.dtype for gain in (gains.base, gains.update)} == {torch.float32}
    # `left` multiplies in the type of the factors, three digits in bfloat16; all after it is float32
    rtol = 1e-5 if factors == "float32" else 4 * torch.finfo(half).eps
    found = gains.weight(W.double(), dense(parts))
    expected = rescaled(W.double(), dense(parts), name, numbers)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_adapted_output_is_that_of_the_adapted_weight(name: str, bias: bool) -> None:
    W, parts, x = _weight(), place("both are split"), torch.randn(2, 3, IN, dtype=torch.float64)
    b = torch.randn(OUT, dtype=torch.float64) if bias else None
    gains = MAGNITUDES[name].gains(_trained(name, W), BaseWeight(lambda: W), parts)
    scaled = x if gains.input is None else x * gains.input
    base = torch.nn.functional.linear(scaled, W, b)
    output = gains.output(base, b, scaled @ dense(parts).T)
    expected = torch.nn.functional.linear(x, gains.weight(W, dense(parts)), b)
    torch.testing.assert_close(output, expected)


def test_without_a_magnitude_the_adapted_weight_is_the_sum() -> None:
    W, parts, rule = _weight(), place("one part"), MAGNITUDES["none"]
    gains = rule.gains({}, BaseWeight(lambda: W), parts)
    assert torch.equal(gains.weight(W, dense(parts)), W + dense(parts))
    assert rule.shapes(OUT, IN) == {} == rule.init(BaseWeight(lambda: W))


# ---- the start


@every_rule
@pytest.mark.parametrize("layout", ["one part", "both are split", "rows are left out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_the_start_weight_and_output_are_the_base_bit_for_bit(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    W, rule = _weight(dtype), MAGNITUDES[name]
    wide = dtype if dtype == torch.float64 else torch.float32
    parts, base = place(layout, wide, zero=not rule.divides_by_update), BaseWeight(lambda: W)
    started = rule.init(base)
    assert {key: tuple(number.shape) for key, number in started.items()} == rule.shapes(OUT, IN)
    gains, dW, bias = rule.gains(started, base, parts), dense(parts, wide), torch.randn(OUT).to(wide)
    assert gains.base.eq(1).all() and (gains.input is None or gains.input.eq(1).all())
    assert gains.update.eq(0 if rule.divides_by_update else 1).all()
    assert torch.equal(gains.weight(W.to(wide), dW), W.to(wide))
    x = torch.randn(5, IN, dtype=wide)
    y = torch.nn.functional.linear(x, W.to(wide), bias)
    assert torch.equal(gains.output(y, bias, x @ dW.T), y)


def test_the_norms_of_the_start_are_those_of_the_weight() -> None:
    W = _weight()
    base = BaseWeight(lambda: W)
    rows, columns, whole = W.norm(dim=1), W.norm(dim=0), W.norm()[None]
    torch.testing.assert_close(MAGNITUDES["per_output"].init(base), {"m": rows})
    torch.testing.assert_close(
        MAGNITUDES["per_output_and_input"].init(base), {"m_out": rows, "m_in": columns}
    )
    expected = {"alpha": whole, "beta": torch.zeros(1, dtype=torch.float64)}
    torch.testing.assert_close(MAGNITUDES["base_and_update"].init(base), expected)


# ---- where a norm is zero


@every_rule
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("update", ["zero", "one part", "rows are left out"])
@pytest.mark.parametrize("where", ["row", "column", "everywhere"])
def test_zeros_of_the_weight_are_divided_by_nothing(
    name: str, constant: bool, update: str, where: str
) -> None:
    W, rule = _weight(torch.float32), MAGNITUDES[name]
    W[{"row": (5,), "column": (slice(None), 5), "everywhere": ()}[where]] = 0
    parts = place("one part" if update == "zero" else update, torch.float32, zero=update == "zero")
    base, dW = BaseWeight(lambda: W), dense(parts, torch.float32)
    numbers = {key: number.requires_grad_() for key, number in rule.init(base).items()}
    adapted = rule.gains(numbers, base, parts, constant=constant).weight(W, dW)
    if update == "zero":
        assert torch.equal(adapted, W)
    adapted.sum().backward()
    gradients = [tensor.grad for tensor in (*numbers.values(), *leaves(parts))]
    assert adapted.isfinite().all()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_an_update_of_zero_is_divided_by_no_less_than_1e_8_of_the_base_norm() -> None:
    W, parts = _weight(), place("one part", zero=True)
    numbers = {"alpha": W.norm()[None], "beta": torch.ones(1, dtype=torch.float64)}
    gains = MAGNITUDES["base_and_update"].gains(numbers, BaseWeight(lambda: W), parts)
    torch.testing.assert_close(gains.update, 1 / (1e-8 * W.norm()[None]))


def test_a_row_that_was_zero_and_is_updated_trains() -> None:
    W, rule = _weight(), MAGNITUDES["per_output"]
    W[5] = 0
    base, parts = BaseWeight(lambda: W), place("one part")
    m = rule.init(base)["m"].requires_grad_()
    rule.gains({"m": m}, base, parts).weight(W, dense(parts))[5].sum().backward()
    row = dense(parts)[5].detach()
    torch.testing.assert_close(m.grad[5], (row / row.norm()).sum())


@pytest.mark.parametrize("with_bias", [True, False])
def test_scaling_a_sum_is_the_formula_and_can_be_differentiated_twice(with_bias: bool) -> None:
    y = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_bias else None
    gains = Gains(gain, gain)
    torch.testing.assert_close(gains.of_sum(y, bias), gains.output(y, bias, torch.zeros_like(y)))

    def scaled(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return Gains(gain, gain).of_sum(y, bias)

    assert torch.autograd.gradcheck(scaled, (y, gain, bias))
    assert torch.autograd.gradgradcheck(scaled, (y[:1], gain, bias))


def test_gains_of_one_leave_every_bit_of_a_sum() -> None:
    y, one = torch.randn(7, 9), torch.ones(9)
    assert torch.equal(Gains(one, one).of_sum(y, torch.randn(9)), y)


# ---- norms of the weight


def test_without_an_update_the_norms_are_those_of_the_weight() -> None:
    W = _weight()
    base, one = BaseWeight(lambda: W), torch.ones(OUT, dtype=torch.float64)
    torch.testing.assert_close(row_energy(base, []).sqrt(), W.norm(dim=1))
    torch.testing.assert_close(column_energy(base, [], one).sqrt(), W.norm(dim=0))


def test_a_norm_is_the_same_whatever_is_squared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    W, rows = _weight(), torch.rand(OUT, dtype=torch.float64)
    for chunk in (1, 5 * IN, 1000):
        monkeypatch.setattr(norms, "_CHUNK", chunk)
        torch.testing.assert_close(BaseWeight(lambda: W).row_energy(), W.square().sum(1))
        torch.testing.assert_close(
            column_energy(BaseWeight(lambda: W), [], rows), (rows[:, None] * W).square().sum(0)
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
