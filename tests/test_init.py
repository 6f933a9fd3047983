from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lotr.math.init import (
    CORE_INITS,
    INITS,
    gaussian,
    generator_for,
    kaiming,
    orthonormal,
    weight,
    weight_values,
)


@pytest.mark.parametrize("n, rank", [(8, 8), (64, 5), (7, 1)])
def test_orthonormal_columns_are_orthonormal(n: int, rank: int) -> None:
    U = orthonormal(n, rank, generator_for(0))
    torch.testing.assert_close(U.T @ U, torch.eye(rank))


def test_gaussian_numbers_have_mean_zero_and_variance_one() -> None:
    U = gaussian(1000, 20, generator_for(0))
    assert abs(U.mean()) < 0.02 and abs(U.var() - 1) < 0.03


@pytest.mark.parametrize("start", INITS)
def test_a_start_follows_its_generator_and_leaves_the_global_random_state(start: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (INITS[start](9, 4, generator_for(seed)) for seed in (0, 0, 1))
    assert first.shape == (9, 4) and first.dtype == torch.float32
    assert torch.equal(first, again) and torch.equal(first, other) == (start == "identity")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_depends_on_seed_and_names_and_not_on_order() -> None:
    def draw(seed: int, *names: str) -> list[float]:
        return torch.randn(4, generator=generator_for(seed, *names)).tolist()

    given = [
        (0, "query", "U"),
        (0, "query", "V"),
        (1, "query", "U"),
        (0, "ab"),
        (0, "a", "b"),
        (-1,),
        (2**80,),
    ]
    first = [draw(*names) for names in given]
    assert [draw(*names) for names in reversed(given)] == first[::-1]
    assert len(set(map(tuple, first))) == len(given)


# ---- LoRA's own start


@pytest.mark.parametrize("n, rank", [(16, 3), (768, 8)])
def test_kaiming_numbers_are_those_that_torch_draws_for_lora(n: int, rank: int) -> None:
    A = torch.nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5), generator=generator_for(0))
    ours = kaiming(n, rank, generator_for(0))
    torch.testing.assert_close(ours.flatten(), A.flatten())


@pytest.mark.parametrize("n", [4, 100, 4096])
def test_kaiming_numbers_fill_the_bound_of_torch(n: int) -> None:
    bound = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5)) * math.sqrt(3 / n)
    assert math.isclose(bound, 1 / math.sqrt(n))
    V = kaiming(n, 4096 // n * 4, generator_for(0))
    assert 0.99 * bound < V.max() <= bound and -bound <= V.min() < -0.99 * bound


# ---- the weight start


def _decaying(out: int = 40, width: int = 30, rate: float = 0.7) -> Tensor:
    """Return a matrix whose singular values fall by a factor."""
    left, right = (torch.linalg.qr(torch.randn(n, width)).Q for n in (out, width))
    return left @ torch.diag(rate ** torch.arange(width)) @ right.T


def _energy(weights: list[Tensor], U: Tensor) -> Tensor:
    return sum((U.T @ W).square().sum() for W in weights)


def _largest_energy(weights: list[Tensor], rank: int) -> Tensor:
    return torch.linalg.eigvalsh(sum(W @ W.T for W in weights)).flip(0)[:rank].sum()


@pytest.mark.parametrize("k, r", [(3, 5), (40, 30), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_start_is_orthonormal_whatever_the_weight(k: int, r: int, dtype: torch.dtype) -> None:
    for W in (_decaying(), torch.zeros(40, 30), torch.ones(40, 30)):
        U, V = weight([W.to(dtype)] * 2, k, r, generator_for(0))
        assert U.shape == (40, k) and V.shape == (30, r) and U.dtype == V.dtype == torch.float32
        torch.testing.assert_close(U.T @ U, torch.eye(k), rtol=0, atol=1e-5)
        torch.testing.assert_close(V.T @ V, torch.eye(r), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k, r", [(3, 5), (5, 3)])
def test_the_weight_start_of_one_weight_spans_its_singular_vectors(k: int, r: int) -> None:
    W = _decaying()
    U, V = weight([W], k, r, generator_for(0))
    left, _, right = torch.linalg.svd(W)
    torch.testing.assert_close((U.T @ W).norm(dim=1), 0.7 ** torch.arange(k), rtol=1e-4, atol=0)
    torch.testing.assert_close(U @ U.T, left[:, :k] @ left[:, :k].T, rtol=0, atol=1e-4)
    torch.testing.assert_close(V @ V.T, right[:r].T @ right[:r], rtol=0, atol=1e-4)


@pytest.mark.parametrize("spectrum, share", [("decaying", 0.9999), ("flat", 0.98)])
def test_the_weight_start_holds_nearly_all_that_a_shared_basis_can(spectrum: str, share: float) -> None:
    weights = [_decaying() if spectrum == "decaying" else torch.randn(40, 30) for _ in range(4)]
    U, V = weight(weights, 4, 6, generator_for(0))
    across = [W.T for W in weights]
    assert share < _energy(weights, U) / _largest_energy(weights, 4) <= 1 + 1e-5
    assert share < _energy(across, V) / _largest_energy(across, 6) <= 1 + 1e-5


def test_the_weight_start_follows_its_generator_and_leaves_the_global_random_state() -> None:
    W, before = _decaying().requires_grad_(), torch.get_rng_state()
    first, again = (weight([W], 3, 4, generator_for(0, "g")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not first[0].requires_grad and not first[1].requires_grad


def test_the_values_of_a_weight_go_to_the_input_side() -> None:
    W = _decaying().double()
    U, V = weight_values([W], 3, 3, generator_for(0))
    left, S, right = torch.linalg.svd(W)
    torch.testing.assert_close(U @ U.T, left[:, :3] @ left[:, :3].T)
    torch.testing.assert_close(V @ V.T, right[:3].T @ S[:3].square().diag() @ right[:3])


# ---- starts of the rows


def test_starts_of_cores_are_those_of_the_authors_modules() -> None:
    def bound(name: str, *shape: int) -> float:
        numbers = CORE_INITS[name](shape, generator_for(0))
        assert numbers.shape == shape and numbers.dtype == torch.float32
        return float(numbers.abs().max())

    # as linear layers that read the last extent, one or several
    assert 0.99 / 5 < bound("uniform", 400, 25) <= 1 / 5 and 0.99 / 5 < bound("uniform", 4, 100, 25) <= 1 / 5
    assert 0.99 * 3**0.5 / 16 < bound("xavier", 16, 16, 16) <= 3**0.5 / 16  # FacT's core of rank 16
    assert float(CORE_INITS["tiny"]((100, 100), generator_for(0)).std()) == pytest.approx(1e-5, rel=0.05)
    assert torch.equal(CORE_INITS["identity"]((3, 2, 2), generator_for(0)), torch.eye(2).expand(3, 2, 2))


@pytest.mark.parametrize("start", INITS)
def test_starts_are_the_same_numbers_whatever_torchs_default_type_is(start: str) -> None:
    single = INITS[start](9, 4, generator_for(0))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(INITS[start](9, 4, generator_for(0)), single)
    finally:
        torch.set_default_dtype(torch.float32)
