from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lotr.math import update as delta
from lotr.math.update import FactoredUpdate, Grid

GRIDS = [(1, 1), (3, 1), (1, 4), (2, 3)]
O, I = 8, 6  # noqa: E741 features of a block
Numbers = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=GRIDS, ids=str)
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


@pytest.fixture(params=[(4, 4), (2, 5), (5, 2)], ids=str)
def numbers(request: pytest.FixtureRequest, grid: Grid) -> Numbers:
    """`U`, the cores of all blocks `(a, b, k, r)`, and `V`."""
    k, r = request.param
    shapes = [(O, k), (*grid, k, r), (I, r)]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def _plain(U: Tensor, cores: Tensor, V: Tensor, scaling: float | Tensor) -> Tensor:
    """Return `ΔW` by its definition, block by block."""
    blocks = torch.einsum("ok,abkr,ir->aobi", U, cores, V)
    return scaling * blocks.flatten(2).flatten(0, 1)


def _factored(numbers: Numbers, scaling: float | Tensor = 0.5) -> FactoredUpdate:
    U, cores, V = numbers
    grid = cores.shape[0], cores.shape[1]
    return FactoredUpdate(U, delta.side_by_side(cores, grid), V, scaling, grid)


def _apply(x: Tensor, update: FactoredUpdate) -> Tensor:
    return delta.apply(
        x,
        lambda x: x @ update.V,
        lambda h: h @ update.C.T,
        lambda h: h @ update.U.T,
        update.scaling,
        update.grid,
    )


# tolerances: torch's own for float64, 1e-7 relative


def test_the_dense_update_is_the_formula(numbers: Numbers) -> None:
    torch.testing.assert_close(_factored(numbers).dense(), _plain(*numbers, 0.5))


def test_the_left_half_times_the_input_factor_is_the_update(numbers: Numbers, grid: Grid) -> None:
    update = _factored(numbers)
    right = torch.block_diag(*[update.V] * grid[1])
    torch.testing.assert_close(update.left() @ right.T, _plain(*numbers, 0.5))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_applying_equals_multiplying_by_the_dense_update(
    numbers: Numbers, grid: Grid, leading: tuple[int, ...]
) -> None:
    x = torch.randn(*leading, grid[1] * I, dtype=torch.float64)
    torch.testing.assert_close(_apply(x, _factored(numbers)), x @ _plain(*numbers, 0.5).T)


@pytest.mark.parametrize("way", ["apply", "dense", "lora"])
def test_gradients_are_those_of_the_definition(numbers: Numbers, grid: Grid, way: str) -> None:
    x = torch.randn(3, grid[1] * I, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*numbers, torch.tensor(0.5, dtype=torch.float64))]
    update = _factored((leaves[0], leaves[1], leaves[2]), leaves[3])
    if way == "apply":
        y = _apply(x, update)
    elif way == "dense":
        y = x @ update.dense().T
    else:
        A, B = update.as_lora()
        y = x @ A.T @ B.T
    ours = torch.autograd.grad(y.square().sum(), leaves)
    theirs = torch.autograd.grad((x @ _plain(*leaves).T).square().sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_the_lora_form_is_exact_and_of_the_smaller_rank(numbers: Numbers, grid: Grid) -> None:
    A, B = _factored(numbers).as_lora()
    (a, b), (k, r) = grid, numbers[1].shape[2:]
    q = min(a * k, b * r)
    assert A.shape == (q, b * I) and B.shape == (a * O, q)
    torch.testing.assert_close(B @ A, _plain(*numbers, 0.5))


def test_cores_side_by_side_are_taken_apart_again(numbers: Numbers, grid: Grid) -> None:
    cores = numbers[1]
    laid = delta.side_by_side(cores.flatten(0, 1), grid)
    assert torch.equal(laid, torch.cat([torch.cat(list(row), 1) for row in cores]))
    assert torch.equal(delta.one_by_one(laid, grid), cores.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_update_has_the_type_of_its_factors(dtype: torch.dtype) -> None:
    tensors = (torch.randn(O, 2), torch.randn(2, 1, 2, 3), torch.randn(I, 3))
    update = _factored((tensors[0].to(dtype), tensors[1].to(dtype), tensors[2].to(dtype)))
    assert {update.dense().dtype, *(matrix.dtype for matrix in update.as_lora())} == {dtype}
