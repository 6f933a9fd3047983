"""Products by oneDNN are those of the matrices, to rounding; an update of zero leaves every bit of the frozen model."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import bert, tokens
from lotr import METHODS, LotrConfig
from lotr.math import fused_linear, matmul
from lotr.math.fused_linear import adapted_linear
from lotr.math.matmul import product
from lotr.math.update import FactoredUpdate

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and the size: with oneDNN."""
    monkeypatch.setattr(matmul, "USE_ONEDNN", True)
    monkeypatch.setattr(matmul, "_MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(matmul, "_MIN_ROWS", 0)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every product that oneDNN takes."""
    taken: list[tuple[int, ...]] = []
    onednn = matmul._onednn

    def counted(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        result = onednn(X, W, bias)
        taken.append(tuple(result.shape))
        return result

    monkeypatch.setattr(matmul, "_onednn", counted)
    return taken


@pytest.mark.parametrize("size", [(70, 33, 4), (128, 96, 16), (5, 300, 200), (1, 1, 1), (64, 7, 1)], ids=str)
@pytest.mark.parametrize("turned", ["neither", "first", "second", "both"])
def test_a_product_is_that_of_the_matrices(
    size: tuple[int, int, int], turned: str, shapes: list[tuple[int, ...]]
) -> None:
    n, m, r = size
    A = torch.randn(m, n).T if turned in ("first", "both") else torch.randn(n, m)
    B = torch.randn(r, m).T if turned in ("second", "both") else torch.randn(m, r)
    with torch.no_grad():
        found = product(A, B)
    assert len(shapes) == 1
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)


PIECES = {
    "piece": (torch.randn(40, 90)[:, 10:70], torch.randn(60, 50)[:, 5:21]),
    "turned piece": (torch.randn(90, 40)[10:70].T, torch.randn(50, 60)[5:21].T),
    "every other row": (torch.randn(80, 60)[::2], torch.randn(120, 16)[::2]),
    "expanded": (torch.ones(()).expand(40, 60), torch.ones(16).expand(60, 16)),
    "overlapping": (torch.randn(460).unfold(0, 60, 10), torch.randn(16, 60).T),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_wider_matrices_are_taken_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN reads in any order lies densely one way or the other: else it reads number by number."""
    A, B = PIECES[name]
    operation, dense = torch.ops.mkldnn._linear_pointwise, []

    def watched(X: Tensor, W: Tensor, *more: object) -> Tensor:
        dense.append(W.is_contiguous() or W.T.is_contiguous())
        return operation(X, W, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    for left, right in ((A, B), (B.T, A.T)):
        with torch.no_grad():
            found = product(left, right)
        torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4)
    assert dense == [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    A, B = torch.randn(64, 32, dtype=dtype), torch.randn(32, 16, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(product(A, B), A @ B)
    assert shapes == []


def test_whoever_watches_operations_sees_them() -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        product(torch.randn(64, 32), torch.randn(32, 16))
    assert counter.get_total_flops() == 2 * 64 * 32 * 16


@pytest.mark.parametrize("choice", ["0", "1"])
def test_an_environment_variable_is_the_switch(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOTR_ONEDNN", choice)
    assert matmul._default() == (choice == "1")


def case() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return a case so wide that libraries differ in rounding."""
    torch.manual_seed(0)
    factors = [torch.randn(96, 8), torch.randn(8, 8), torch.randn(768, 8)]
    return torch.randn(50, 768), torch.randn(96, 768), torch.randn(96), factors


@pytest.mark.parametrize("margin", [1e9, 0.0], ids=["plain", "merged"])
@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
def test_outputs_and_gradients_are_those_in_double_precision(
    turned: bool, margin: float, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "_MARGIN", margin)

    def run(dtype: torch.dtype) -> list[Tensor]:
        x, W, bias, factors = case()
        leaves = [t.to(dtype).requires_grad_() for t in (x, *factors)]
        W = W.to(dtype).T.contiguous().T if turned else W.to(dtype)
        y = adapted_linear(leaves[0], W, bias.to(dtype), [FactoredUpdate(*leaves[1:], 1.0)])
        return [t.double() for t in (y, *torch.autograd.grad(y.sin().sum(), leaves))]

    found, wanted = run(torch.float32), run(torch.float64)
    assert {(50, 96), (50, 768)} <= set(shapes), "the base's product, and the gradient of the input"
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_few_rows_are_left_to_pytorch(
    rows: int, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_MIN_ROWS", 4)
    _, W, bias, factors = case()
    with torch.no_grad():
        adapted_linear(torch.randn(rows, 768), W, bias, [FactoredUpdate(*factors, 1.0)])
    assert ((rows, 96) in shapes) == (rows == 4)


@pytest.mark.parametrize("method", METHODS)
def test_step_0_of_every_row_is_the_base_bit_for_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn = matmul._onednn  # at these sizes the libraries round alike, so this one is made to differ
    monkeypatch.setattr(matmul, "_onednn", lambda *given: onednn(*given) * (1 + 1e-3))
    model: nn.Module = get_peft_model(
        bert(num_hidden_layers=2), LotrConfig(method=method, r=4, target_modules=["query", "value", "dense"])
    )
    logits = model.eval()(input_ids=tokens()).logits
    expected = bert(num_hidden_layers=2)(input_ids=tokens()).logits
    assert torch.equal(logits, expected) == (method != "lora_xs"), "whose cores start random"
