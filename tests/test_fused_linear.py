"""The fused function equals plain operations, forward, backward and twice, with and without merging."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lotr.math import fused_linear
from lotr.math import update as formula
from lotr.math.fused_linear import adapted_linear
from lotr.math.update import FactoredUpdate

PLAIN, MERGED = 1e9, 0.0


@pytest.fixture(params=[PLAIN, MERGED], ids=["plain", "merged"])
def margin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(fused_linear, "_MARGIN", request.param)
    yield request.param


def plain(x: Tensor, W: Tensor, bias: Tensor | None, updates: list[FactoredUpdate]) -> Tensor:
    """The same by operations that autograd knows."""
    y = torch.nn.functional.linear(x, W, bias)
    for update in updates:
        part = formula.apply(
            x,
            lambda h, V=update.V: h @ V,
            lambda h, C=update.C: h @ C.T,
            lambda h, U=update.U: h @ U.T,
            update.scaling,
            update.grid,
        )
        y = y + torch.nn.functional.pad(part, (update.rows.start, len(W) - update.rows.stop))
    return y


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor | None, list[FactoredUpdate]]:
    """Shapes, positions, ranks, scaling and what trains, drawn by seed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def tensor(*shape: int, trains: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trains)

    a, o, width = draw.choice([1, 1, 2, 3]), draw.randint(2, 6), draw.randint(2, 9)
    out = a * o + draw.choice([0, 0, 3])
    lead = draw.choice([(4,), (2, 3), (1,), (2, 1, 2), ()])
    k, r = draw.choice([(1, 1), (2, 3), (17, 18)])
    trains = [draw.random() < 0.7 for _ in range(3)]
    shapes = (o, k), (a * k, r), (width, r)
    factors = [tensor(*shape, trains=t) for shape, t in zip(shapes, trains, strict=True)]
    updates = [FactoredUpdate(*factors, draw.choice([1.0, 0.5]), (a, 1), draw.randint(0, out - a * o))]
    if draw.random() < 0.5:  # a second part, over some of the rows
        rows = draw.randint(1, out)
        first = draw.randint(0, out - rows)
        updates.append(FactoredUpdate(tensor(rows, 3), tensor(3, 2), tensor(width, 2), 2.0, first_row=first))
    bias = tensor(out, trains=draw.random() < 0.5) if draw.random() < 0.7 else None
    return tensor(*lead, width), tensor(out, width, trains=False), bias, updates


def leaves(x: Tensor, bias: Tensor | None, updates: list[FactoredUpdate]) -> list[Tensor]:
    every = [x, bias, *(tensor for update in updates for tensor in (update.U, update.C, update.V))]
    return [tensor for tensor in every if tensor is not None and tensor.requires_grad]


@pytest.mark.parametrize("seed", range(40))
def test_output_and_gradients_are_those_of_plain_operations(seed: int, margin: float) -> None:
    x, W, bias, updates = random_case(seed)
    wanted, found = plain(x, W, bias, updates), adapted_linear(x, W, bias, updates)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(adapted_linear(x, W, bias, updates), wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weights).sum(), leaves(x, bias, updates)) for y in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_can_be_differentiated_again(seed: int, margin: float) -> None:
    x, W, bias, updates = random_case(seed)

    def output(x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        given = [
            replace(update, U=factors[3 * n], C=factors[3 * n + 1], V=factors[3 * n + 2])
            for n, update in enumerate(updates)
        ]
        return adapted_linear(x, W, bias, given).sin()

    factors = [tensor for update in updates for tensor in (update.U, update.C, update.V)]
    assert torch.autograd.gradgradcheck(output, (x, bias, *factors))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen factors", "trained factors"])
def test_the_input_is_kept_only_where_v_trains(trains: bool, margin: float) -> None:
    x = torch.randn(50, 40, requires_grad=True)
    W, bias = torch.randn(30, 40), torch.randn(30)
    U, V = (torch.randn(size, 4, requires_grad=trains) for size in (30, 40))
    saved: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        C = torch.randn(4, 4, requires_grad=True)
        y = adapted_linear(x, W, bias, [FactoredUpdate(U, C, V, 1.0)])
    y.sum().backward()
    activations = [shape for shape in saved if shape[0] == 50]
    assert sorted(activations) == ([(50, 4), (50, 40)] if trains else [(50, 4)])


@pytest.mark.parametrize("zero", ["U", "C", "V"])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_update_of_zero_leaves_every_bit(zero: str, gradients: bool, margin: float) -> None:
    x, W, bias = torch.randn(33, 20), torch.randn(12, 20), torch.randn(12)
    update = FactoredUpdate(torch.randn(12, 3), torch.randn(3, 3), torch.randn(20, 3), 1.0)
    getattr(update, zero).zero_()
    with torch.set_grad_enabled(gradients):
        y = adapted_linear(x, W, bias, [update])
    assert torch.equal(y, torch.nn.functional.linear(x, W, bias))


def test_many_tokens_are_merged_few_are_not_and_half_precision_never() -> None:
    W = torch.empty(512, 512, device="meta")
    merges = fused_linear._merging_pays
    assert [merges(tokens * 512, W) for tokens in (64, 4096)] == [False, True]
    assert not merges(10**9, W.bfloat16()), "the sum of weight and update would lose the update"
