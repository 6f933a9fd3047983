"""The one step of autograd equals plain operations, forward, backward and twice, in every order."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lotr.math import update as delta
from lotr.math.fused_linear import adapted_linear
from lotr.math.linear_products import PartOfLinear, Place
from lotr.math.orders import ORDERS, Order, choose_order, extra_work

EVERY_ORDER = [Order(*merged) for merged in itertools.product((False, True), repeat=2)]


def plain(x: Tensor, W: Tensor, bias: Tensor | None, parts: list[PartOfLinear]) -> Tensor:
    """The same by operations that autograd knows."""
    y = torch.nn.functional.linear(x, W, bias)
    for part in parts:
        (a, b), (o, _), (_, i) = part.place.grid, part.U.shape, part.Vt.shape
        update = delta.apply(
            x.narrow(-1, part.place.column, b * i),
            lambda h, V=part.Vt.T: h @ V,
            lambda h, C=part.C: h @ C.T,
            lambda h, U=part.U: h @ U.T,
            1.0,
            part.place.grid,
        )
        after = len(W) - part.place.row - a * o
        y = y + torch.nn.functional.pad(update, (part.place.row, after))
    return y


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor | None, list[PartOfLinear]]:
    """Shapes, places, ranks and what trains, drawn by seed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def numbers(*shape: int, trains: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trains)

    a, b, o, i = (draw.choice([1, 1, 2, 3]) for _ in range(4))
    o, i = o + draw.randint(1, 4), i + draw.randint(1, 4)
    out, width = a * o + draw.choice([0, 0, 3]), b * i
    lead = draw.choice([(4,), (2, 3), (1,), (2, 1, 2), ()])
    k, r = draw.choice([(1, 1), (2, 3), (17, 18)])
    trains = [draw.random() < 0.7 for _ in range(3)]
    parts = [
        PartOfLinear(
            Place(draw.randint(0, out - a * o), 0, (a, b)),
            numbers(r, i, trains=trains[0]),
            numbers(a * k, b * r, trains=trains[1]),
            numbers(o, k, trains=trains[2]),
        )
    ]
    if draw.random() < 0.5:  # a second one, over a piece of the rows and columns
        rows, columns = draw.randint(1, out), draw.randint(1, width)
        place = Place(draw.randint(0, out - rows), draw.randint(0, width - columns))
        parts.append(PartOfLinear(place, numbers(2, columns), numbers(3, 2), numbers(rows, 3)))
    bias = numbers(out, trains=draw.random() < 0.5) if draw.random() < 0.7 else None
    return numbers(*lead, width), numbers(out, width, trains=False), bias, parts


def leaves(x: Tensor, bias: Tensor | None, parts: list[PartOfLinear]) -> list[Tensor]:
    found = [x, bias, *(tensor for part in parts for tensor in (part.Vt, part.C, part.U))]
    return [tensor for tensor in found if tensor is not None and tensor.requires_grad]


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_output_and_gradients_are_those_of_plain_operations(seed: int, order: Order) -> None:
    x, W, bias, parts = random_case(seed)
    wanted = plain(x, W, bias, parts)
    found, products = adapted_linear(x, W, bias, parts, order)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert [tuple(h.shape) for h in products if h is not None] == [
        (x.numel() // x.shape[-1], part.C.shape[1]) for part in parts
    ]
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    with_respect_to = leaves(x, bias, parts)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), with_respect_to),
        torch.autograd.grad((wanted * weights).sum(), with_respect_to),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_can_be_differentiated_again(seed: int, order: Order) -> None:
    x, W, bias, parts = random_case(seed)
    names = [name for part in parts for name in (part.Vt, part.C, part.U)]

    def output(x: Tensor, bias: Tensor | None, *numbers: Tensor) -> Tensor:
        given = [
            replace(part, Vt=numbers[3 * n], C=numbers[3 * n + 1], U=numbers[3 * n + 2])
            for n, part in enumerate(parts)
        ]
        return adapted_linear(x, W, bias, given, order)[0].sin()

    assert torch.autograd.gradgradcheck(output, (x, bias, *names))


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["V trains", "V frozen"])
def test_parts_that_share_a_product_get_the_gradients_of_parts_that_do_not(
    order: Order, frozen: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(6, 7, dtype=torch.float64) for _ in range(3)]
    Vt = torch.randn(2, 7, dtype=torch.float64, requires_grad=not frozen)
    U = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    cores = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def total(shared: bool) -> Tensor:
        h, y = None, 0
        for W, C in zip(weights, cores, strict=True):
            part = PartOfLinear(Place(0, 0), Vt, C, U, h if shared else None)
            output, (h,) = adapted_linear(x, W, None, [part], order)
            y = y + output.sin().sum()
        return y

    with_respect_to = [tensor for tensor in (x, Vt, U, *cores) if tensor.requires_grad]
    once, each = (torch.autograd.grad(total(shared), with_respect_to) for shared in (True, False))
    for one, other in zip(once, each, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen factors", "trained factors"])
def test_the_input_is_kept_only_where_v_trains(order: Order, trains: bool) -> None:
    x = torch.randn(50, 40, requires_grad=True)
    W, bias = torch.randn(30, 40), torch.randn(30)
    part = PartOfLinear(
        Place(0, 0),
        torch.randn(4, 40, requires_grad=trains),
        torch.randn(4, 4, requires_grad=True),
        torch.randn(30, 4, requires_grad=trains),
    )
    kept: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y, _ = adapted_linear(x, W, bias, [part], order)
    y.sum().backward()
    activations = [shape for shape in kept if shape[0] == 50]
    assert sorted(activations) == ([(50, 4), (50, 40)] if trains else [(50, 4)])


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
def test_an_update_of_zero_leaves_every_bit(order: Order) -> None:
    x, W, bias = torch.randn(33, 20), torch.randn(12, 20), torch.randn(12)
    part = PartOfLinear(Place(0, 0), torch.randn(3, 20), torch.zeros(3, 3), torch.randn(12, 3))
    y, _ = adapted_linear(x, W, bias, [part], order)
    assert torch.equal(y, torch.nn.functional.linear(x, W, bias))


def test_many_tokens_are_merged_and_few_are_not() -> None:
    few, many = (choose_order(tokens, 512, 512, torch.float32) for tokens in (64, 4096))
    assert (few, many) == (Order(), Order(True, True))
    wide = choose_order(
        1024, 4096, 512, torch.float32
    )  # a wide output: the forward order decides by the input
    assert wide == Order(merge_forward=True, merge_backward=False)


def test_without_gradients_fewer_tokens_are_merged_and_nothing_is_left_over() -> None:
    tokens = 700
    assert choose_order(tokens, 512, 512, torch.float32) == Order()
    assert choose_order(tokens, 512, 512, torch.float32, gradients=False) == Order(merge_forward=True)
    x, W, bias, parts = random_case(0)
    with torch.no_grad():
        found, products = adapted_linear(x, W, bias, parts, Order(merge_forward=True))
    torch.testing.assert_close(found, plain(x, W, bias, parts).detach(), rtol=1e-12, atol=1e-12)
    assert products == [None] * len(parts)


def test_half_precision_is_never_merged() -> None:
    """The sum of weight and update would round the update away."""
    for asked in ORDERS:
        assert choose_order(10**6, 8, 8, torch.bfloat16, asked) == Order()


def test_a_name_overrules_the_costs() -> None:
    assert choose_order(1, 8, 8, torch.float32, "merged") == Order(True, True)
    assert choose_order(10**6, 8, 8, torch.float32, "plain") == Order()


@pytest.mark.parametrize("order", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen factors", "trained factors"])
def test_the_work_that_is_foretold_is_the_work_that_is_done(order: Order, trains: bool) -> None:
    """Counted by PyTorch, two operations a multiplication."""
    from torch.utils.flop_counter import FlopCounterMode

    def product(_: object, left: list[int], right: list[int], **more: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    tokens, o, i, k, r = 64, 24, 40, 3, 5
    x, W = torch.randn(tokens, i, requires_grad=True), torch.randn(o, i)
    part = PartOfLinear(
        Place(0, 0),
        torch.randn(r, i, requires_grad=trains),
        torch.randn(k, r, requires_grad=True),
        torch.randn(o, k, requires_grad=trains),
    )
    in_place = {torch.ops.aten.addmm_: product}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        adapted_linear(x, W, None, [part], order)[0].sum().backward()
    base = 2 * 2 * tokens * o * i
    wanted = (counter.get_total_flops() - base) / base
    found = extra_work(tokens, (o, i), (k, r), order, factors=trains)
    again = o * k * r / (2 * tokens * o * i)  # U C is made again where the update is merged on the way back
    assert found == pytest.approx(wanted - again * order.merge_backward, rel=1e-9)
