"""Products by oneDNN are those of the matrices, to rounding; the frozen model's own output keeps every bit."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from conftest import bert, tokens
from lotr import LotrConfig, kernels
from lotr.kernels import product
from lotr.linear import PartOfLinear, Place, adapted_linear
from lotr.orders import Order

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and the size: with oneDNN."""
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(kernels, "_WORTH", 0)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the shape of every product that oneDNN takes."""
    seen: list[tuple[int, ...]] = []
    linear = kernels._linear

    def counted(X: Tensor, W: Tensor) -> Tensor:
        result = linear(X, W)
        seen.append(tuple(result.shape))
        return result

    monkeypatch.setattr(kernels, "_linear", counted)
    return seen


@pytest.mark.parametrize("size", [(70, 33, 4), (128, 96, 16), (5, 300, 200), (1, 1, 1), (64, 7, 1)], ids=str)
@pytest.mark.parametrize("turned", ["neither", "first", "second", "both"])
def test_a_product_is_that_of_the_matrices(
    size: tuple[int, int, int], turned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m, r = size
    seen = calls(monkeypatch)
    A = torch.randn(m, n).T if turned in ("first", "both") else torch.randn(n, m)
    B = torch.randn(r, m).T if turned in ("second", "both") else torch.randn(m, r)
    with torch.no_grad():
        found = product(A, B)
    assert len(seen) == 1
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)


def test_pieces_of_wider_matrices_are_taken_too() -> None:
    A, B = torch.randn(40, 90)[:, 10:70], torch.randn(60, 50)[:, 5:21]
    with torch.no_grad():
        torch.testing.assert_close(product(A, B).double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_pytorchs_own_switch_leave_it_to_pytorch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    A, B = torch.randn(64, 32), torch.randn(32, 16)
    with torch.no_grad():
        assert torch.equal(product(A.to(dtype), B.to(dtype)), A.to(dtype) @ B.to(dtype))
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(product(A, B), A @ B)
    assert seen == []


def test_whoever_watches_operations_sees_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        product(torch.randn(64, 32), torch.randn(32, 16))
    assert counter.get_total_flops() == 2 * 64 * 32 * 16


def case() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    numbers = [torch.randn(8, 48), torch.randn(8, 8), torch.randn(40, 8)]
    return torch.randn(3, 50, 48), torch.randn(40, 48), torch.randn(40), numbers


def output(x: Tensor, W: Tensor, bias: Tensor, numbers: list[Tensor], order: Order) -> Tensor:
    return adapted_linear(x, W, bias, [PartOfLinear(Place(0, 0), *numbers)], order)[0]


@pytest.mark.parametrize("order", [Order(), Order(True, True)], ids=str)
def test_gradients_are_those_in_double_precision(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, W, bias, numbers = case()
        leaves = [t.to(dtype).requires_grad_() for t in (x, *numbers)]
        y = output(leaves[0], W.to(dtype), bias.to(dtype), leaves[1:], order)
        return [t.double() for t in torch.autograd.grad(y.square().sum(), leaves)]

    found, wanted = gradients(torch.float32), gradients(torch.float64)
    assert (150, 48) in seen  # the gradient of the input
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_gradients_can_be_differentiated_again() -> None:
    def twice(dtype: torch.dtype) -> list[Tensor]:
        x, W, bias, numbers = case()
        leaves = [t.to(dtype).requires_grad_() for t in (x, *numbers)]
        y = output(leaves[0], W.to(dtype), bias.to(dtype), leaves[1:], Order())
        once = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return [t.double() for t in torch.autograd.grad(sum(g.square().sum() for g in once), leaves)]

    for one, other in zip(twice(torch.float32), twice(torch.float64), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_an_update_of_zero_leaves_every_bit() -> None:
    x, W, bias, (Vt, C, U) = case()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = output(x, W, bias, [Vt, torch.zeros_like(C), U], Order())
        assert torch.equal(y, nn.functional.linear(x, W, bias))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("train", ["all", "cores"])
def test_a_compiled_graph_takes_them_and_computes_the_same(
    train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    config = LotrConfig(r=4, train=train, target_modules=["query", "value"], init_weights=False)
    model = get_peft_model(bert(), config).eval()

    def run(call: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = call(input_ids=tokens()).logits
        logits.square().sum().backward()
        return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(model)
    seen = calls(monkeypatch)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    assert seen
