from __future__ import annotations

import pytest
import torch

from lotr import delta
from lotr.starts import STARTS, gaussian, generator_for, orthonormal


@pytest.mark.parametrize("n, rank", [(8, 8), (64, 5), (7, 1)])
def test_orthonormal_columns_are_orthonormal(n: int, rank: int) -> None:
    U = orthonormal(n, rank, generator_for(0))
    torch.testing.assert_close(U.T @ U, torch.eye(rank))


def test_with_orthonormal_factors_the_update_is_as_large_as_the_core() -> None:
    C = torch.randn(4, 4)
    for width in (16, 512):
        U, V = orthonormal(width, 4, generator_for(0)), orthonormal(width, 4, generator_for(1))
        torch.testing.assert_close(delta.dense(U, C, V, 0.5).norm(), 0.5 * C.norm())


def test_orthonormal_directions_have_no_preferred_sign() -> None:
    firsts = torch.stack([orthonormal(3, 2, generator_for(seed)) for seed in range(400)])
    assert firsts.mean(0).abs().max() < 0.1


def test_gaussian_numbers_have_mean_zero_and_variance_one() -> None:
    U = gaussian(1000, 20, generator_for(0))
    assert abs(U.mean()) < 0.02 and abs(U.var() - 1) < 0.03


@pytest.mark.parametrize("start", STARTS)
def test_a_start_gives_the_asked_shape_and_leaves_the_global_random_state(start: str) -> None:
    before = torch.get_rng_state()
    factor = STARTS[start](9, 4, generator_for(0, "g", "U"))
    assert factor.shape == (9, 4) and factor.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_depends_on_seed_and_names_and_not_on_order() -> None:
    def draw(seed: int, *names: str) -> list[float]:
        return torch.randn(4, generator=generator_for(seed, *names)).tolist()

    first = draw(0, "default", "query", "U")
    other = draw(0, "default", "query", "V")
    assert draw(0, "default", "query", "U") == first
    assert (
        len(
            {
                tuple(d)
                for d in (first, other, draw(1, "default", "query", "U"), draw(0, "ab"), draw(0, "a", "b"))
            }
        )
        == 5
    )


def test_negative_and_huge_seeds_are_seeds() -> None:
    assert not torch.equal(gaussian(3, 2, generator_for(-1)), gaussian(3, 2, generator_for(2**80)))
