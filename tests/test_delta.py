from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lotr import delta


@pytest.fixture(params=[(4, 4), (2, 5), (5, 2)], ids=str)
def factors(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    k, r = request.param
    shapes = [(8, k), (k, r), (6, r)]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def _apply(x: Tensor, U: Tensor, C: Tensor, V: Tensor, scaling: float) -> Tensor:
    return delta.apply(x, lambda x: x @ V, lambda h: h @ C.T, lambda h: h @ U.T, scaling)


def test_the_dense_update_is_the_formula(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    U, C, V = factors
    expected = 0.5 * torch.einsum("ok,kr,ir->oi", U, C, V)
    torch.testing.assert_close(delta.dense(U, C, V, 0.5), expected)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=str)
def test_applying_equals_multiplying_by_the_dense_update(
    factors: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(_apply(x, *factors, 0.5), x @ delta.dense(*factors, 0.5).T)


def test_gradients_are_those_of_the_dense_update(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    gradients = []
    for dense in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in factors]
        y = x @ delta.dense(*leaves, 0.5).T if dense else _apply(x, *leaves, 0.5)
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_the_lora_form_is_exact_and_of_the_smaller_rank(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B = delta.as_lora(*factors, 0.5)
    assert A.shape[0] == B.shape[1] == min(factors[1].shape)
    torch.testing.assert_close(B @ A, delta.dense(*factors, 0.5))
