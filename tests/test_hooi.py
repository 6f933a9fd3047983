from __future__ import annotations

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Generator, Tensor

from lotr.math.hooi import Subspaces, leading, tucker2

RANK = (3, 4)


def _sites(noise: float, sizes: tuple[float, ...] = (1.0,) * 5) -> list[Tensor]:
    """Matrices that share a left and a right subspace, up to noise."""
    U, V = torch.linalg.qr(torch.randn(20, RANK[0])).Q, torch.linalg.qr(torch.randn(30, RANK[1])).Q
    return [size * (U @ torch.randn(*RANK) @ V.T + noise * torch.randn(20, 30)) for size in sizes]


def _turned(sites: list[Tensor], rounds: int = 4, normalise: bool = False) -> tuple[Tensor, Tensor]:
    spaces = Subspaces((20, 30), RANK, Generator().manual_seed(0), normalise)
    for _ in range(rounds):
        spaces.turn([M @ spaces.V for M in sites], [M.T @ spaces.U for M in sites])
    return spaces.factors()


def _kept(sites: list[Tensor], U: Tensor, V: Tensor) -> float:
    return float(sum((U.T @ M @ V).square().sum() for M in sites) / sum(M.square().sum() for M in sites))


def test_factors_are_orthonormal_and_of_the_rank() -> None:
    U, V = _turned(_sites(noise=0.3))
    assert U.shape == (20, 3) and V.shape == (30, 4)
    torch.testing.assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(V.T @ V, torch.eye(4), atol=1e-5, rtol=0)


def test_a_shared_subspace_is_found_in_one_round() -> None:
    sites = _sites(noise=0.0)
    assert _kept(sites, *_turned(sites, rounds=1)) == pytest.approx(1, abs=1e-5)


def test_the_factors_keep_as_much_as_tensorlys_tucker() -> None:
    sites = _sites(noise=0.1)
    with tl.backend_context("pytorch"):
        _, (U, V) = partial_tucker(torch.stack(sites), rank=RANK, modes=[1, 2], n_iter_max=50)[0]
    best = _kept(sites, U, V)
    assert _kept(sites, *_turned(sites)) > 0.995 * best > 0.5
    assert _kept(sites, *_turned(sites, rounds=1)) < best


def test_normalised_sites_count_alike_whatever_their_size() -> None:
    """Twenty times larger matrices of another subspace win, unless every site is weighed by its norm."""
    quiet, loud = _sites(0.0, (1.0,) * 6), _sites(0.0, (20.0,) * 2)
    plain, fair = (_kept(quiet, *_turned([*quiet, *loud], normalise=n)) for n in (False, True))
    assert plain < 0.2 and fair > 0.5


def test_sites_without_a_gradient_change_nothing() -> None:
    sites = _sites(noise=0.2)
    silent = [*sites, torch.zeros(20, 30)]
    for factor, same in zip(_turned(sites, normalise=True), _turned(silent, normalise=True), strict=True):
        torch.testing.assert_close(factor, same, atol=1e-5, rtol=0)
    before = Subspaces((20, 30), RANK, Generator().manual_seed(0)).factors()
    nothing = _turned([torch.zeros(20, 30)] * 2)
    for a, b in zip(before, nothing, strict=True):  # the columns stay, to their signs
        torch.testing.assert_close((a * b).sum(0).abs(), torch.ones(a.shape[1]))


def test_of_thin_matrices_the_factors_are_those_of_tensorlys_tucker_to_rounding() -> None:
    thin = [(torch.randn(20, q), torch.randn(q, 30)) for q in (2, 5, 7)]
    dense = [B @ A for B, A in thin]
    with tl.backend_context("pytorch"):
        stack = torch.stack(dense).double()
        _, (U, V) = partial_tucker(stack, rank=RANK, modes=[1, 2], n_iter_max=500, tol=1e-13)[0]
    ours = tucker2(thin, torch.eye(20, 3), torch.eye(30, 4))
    assert _kept(dense, *ours) == pytest.approx(_kept(dense, U.float(), V.float()), rel=1e-6)
    for factor, theirs in zip(ours, (U, V), strict=True):
        assert torch.linalg.svdvals(factor.T @ theirs.float()).min() > 0.9999


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 2)])
def test_columns_that_matrices_leave_open_are_those_of_before(shape: tuple[int, int]) -> None:
    direction = torch.nn.functional.normalize(torch.randn(shape[0], 1), dim=0)
    before = torch.linalg.qr(torch.randn(shape[0], 3)).Q
    found = leading(direction @ torch.randn(1, shape[1]), before)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close((found[:, :1].T @ direction).abs(), torch.ones(1, 1))
    both = torch.cat([direction, before[:, :2]], 1)
    assert torch.linalg.svdvals(torch.linalg.qr(both).Q.T @ found).min() > 1 - 1e-5
