"""The joint fit against the dense stack."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lotr.compression import diagonal, fit
from lotr.compression.ranks import Curve, bytes_of, chosen_ranks, error_of
from lotr.math.moments import SecondMoment, Strongest

OUT, WIDTH, TASKS, Q = 24, 18, 9, 3


def _updates(tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 0.1, OUT)[:, None]
    B = scale * torch.randn(tasks, OUT, Q, generator=generator, dtype=torch.float64)
    return B, torch.randn(tasks, Q, WIDTH, generator=generator, dtype=torch.float64)


def _total(B: Tensor, A: Tensor, size: int) -> fit.Total:
    def batches() -> Iterator[fit.Batch]:
        for own in zip(B.split(size), A.split(size), strict=True):
            yield {"g": [own]}

    return lambda add_up: add_up(batches())


@pytest.mark.parametrize("tasks", [4, TASKS])  # fewer and more directions than the block is wide
@pytest.mark.parametrize("rank", [2, 5])
def test_every_error_is_that_of_the_dense_stack_and_falls_to_that_of_tensorly(rank: int, tasks: int) -> None:
    B, A = _updates(tasks)
    total, stack = _total(B, A, 4), B @ A
    fits = fit.directions({"g": (OUT, WIDTH)}, total)
    group = fits["g"]
    fit.begin(fits, {"g": (rank, rank)}, total)
    group.turn_back()
    for _ in range(60):
        U, V = group.factors((rank, rank))
        left = stack - U @ (U.T @ stack @ V) @ V.T
        assert group.errors[-1] == pytest.approx(float(left.norm() / stack.norm()), rel=1e-9)
        fit.sweep(fits, total)
    assert all(after <= before + 1e-12 for before, after in pairwise(group.errors))
    with tl.backend_context("pytorch"):
        (core, (U, V)), _ = partial_tucker(stack, [rank, rank], modes=[1, 2], n_iter_max=200, tol=1e-12)
    dense = float((stack - U @ core @ V.T).norm() / stack.norm())
    assert group.errors[-1] == pytest.approx(dense, rel=1e-3)


@pytest.mark.parametrize("kind", [fit, diagonal])
def test_the_batches_do_not_change_the_fit(kind: ModuleType) -> None:
    B, A = _updates()
    factors = []
    for size in (1, 4, TASKS):
        total = _total(B, A, size)
        fits = fit.directions({"g": (OUT, WIDTH)}, total)
        kind.begin(fits, {"g": (4, 4)}, total)
        kind.sweep(fits, total)
        U, V = fits["g"].factors((4, 4))
        assert all(
            factor.gather(0, factor.abs().argmax(0)[None]).min() > 0 for factor in (U, V)
        )  # definite signs
        factors.append(torch.cat([U, V]))
    for other in factors[1:]:
        torch.testing.assert_close(other, factors[0], rtol=0, atol=1e-9)


def test_in_a_wide_space_the_leading_directions_are_followed() -> None:
    """What is dropped is told; what shared directions carry is not lost."""
    generator = torch.Generator().manual_seed(0)
    common = torch.linalg.qr(torch.randn(60, 4, generator=generator, dtype=torch.float64)).Q
    moment = SecondMoment(60, widest=8)
    total = torch.zeros(60, 60, dtype=torch.float64)
    for _ in range(30):
        P = common @ torch.randn(4, 3, generator=generator, dtype=torch.float64)
        P += 0.01 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
        moment.add(P)
        total += P @ P.T
    vectors, energies = moment.leading(4)
    torch.testing.assert_close(energies, torch.linalg.eigvalsh(total).flip(0)[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close(vectors @ vectors.T, common @ common.T, rtol=0, atol=1e-2)
    whole = float(total.trace())
    assert float(moment.leading()[1].sum()) + moment.lost == pytest.approx(whole, rel=1e-9)
    assert 0 < moment.lost < 0.01 * whole


def test_what_a_projection_leaves_is_exact_where_it_is_tiny() -> None:
    B, A = _updates()
    U, V = torch.linalg.qr(torch.cat([*B], 1)).Q, torch.linalg.qr(torch.cat([*A], 0).T).Q
    noise = 1e-9 * torch.randn(OUT, Q, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few = U[:, : B.shape[2]]
    near = few @ few.T @ B[0] + noise
    _, lost = fit.project(near[None], A[:1], few, V)
    expected = float(((noise - few @ few.T @ noise) @ A[0]).square().sum())
    assert float(lost) == pytest.approx(expected, rel=1e-6)


def test_diagonals_never_get_worse_and_are_those_of_least_squares() -> None:
    B, A = _updates()
    total = _total(B, A, 4)
    fits = fit.directions({"g": (OUT, WIDTH)}, total)
    diagonal.begin(fits, {"g": (4, 4)}, total)
    for _ in range(20):
        diagonal.sweep(fits, total)
    errors = fits["g"].errors
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    U, V = fits["g"].factors((4, 4))
    columns = torch.einsum("or,ir->oir", U, V).flatten(0, 1)
    solved = torch.linalg.lstsq(columns, (B[0] @ A[0]).flatten()).solution
    torch.testing.assert_close(diagonal.diagonals(U, V, B, A)[0], solved)


def _curve(left: list[float], right: list[float]) -> Curve:
    """What ranks buy where each side alone would leave such energies."""
    kept = torch.minimum(torch.tensor(left)[:, None], torch.tensor(right))
    return Curve(1.0, kept.double(), (100, 60), 10)


STEEP, FLAT = [0.9, 0.99, 0.999, 1.0], [0.4, 0.7, 0.9, 1.0]


def test_ranks_go_to_where_they_keep_most_energy_a_byte() -> None:
    curves = {"steep": _curve(STEEP, STEEP), "flat": _curve(FLAT, FLAT)}
    ranks = chosen_ranks(curves, max_error=0.25)
    assert error_of(curves, ranks) <= 0.25
    assert ranks["steep"] < ranks["flat"]
    size = bytes_of(curves, ranks)
    assert chosen_ranks(curves, max_bytes=size) == ranks
    assert bytes_of(curves, chosen_ranks(curves, max_bytes=size - 1)) < size


@pytest.mark.parametrize("sides", [(FLAT, STEEP), (STEEP, FLAT), (FLAT, [0.9, 1.0])])
def test_each_side_has_the_rank_that_it_needs(sides: tuple[list[float], list[float]]) -> None:
    curves = {"g": _curve(*sides)}
    K, L = curves["g"].most
    pairs = [(k + 1, r + 1) for k in range(K) for r in range(L)]
    for goal in (0.6, 0.4, 0.2, 1e-9):
        ranks = chosen_ranks(curves, max_error=goal)
        least = min(curves["g"].bytes(pair) for pair in pairs if 1 - curves["g"].at(pair) <= goal**2 + 1e-12)
        assert bytes_of(curves, ranks) == least


def test_bytes_are_spent_where_large_steps_pay_most() -> None:
    """Updates that share nothing keep more a byte the larger the ranks; a step that is too large is not the last."""
    n = torch.arange(1, 25).double()
    convex = Curve(1.0, (torch.minimum(n[:, None], n) / 24) ** 2, (100, 100), 3)
    for given in (2_000, 3_000, 4_000):
        ranks = chosen_ranks({"g": convex}, max_bytes=given)
        pairs = [(k, r) for k in range(1, 25) for r in range(1, 25)]
        best = max(convex.at(pair) for pair in pairs if convex.bytes(pair) <= given)
        assert convex.at(ranks["g"]) > 0.9 * best


def test_the_strongest_directions_are_those_of_the_dense_updates_however_they_come() -> None:
    B, A = _updates()
    values = torch.linalg.svdvals(B @ A).square()[:, :Q].flatten().sort(descending=True).values
    one, other = Strongest(7, (OUT, WIDTH)), Strongest(7, (OUT, WIDTH))
    for t in range(4):
        one.add(B[t : t + 1], A[t : t + 1])
    other.add(B[4:], A[4:])
    one += other
    torch.testing.assert_close(one.energies, values[:7])
    products = torch.einsum("or,toi,ir->tr", one.U, B @ A, one.V).abs().amax(0)
    torch.testing.assert_close(products, one.energies.sqrt())  # each is a pair of its own update


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive after an operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: own for key, own in self.storages.items() if not own[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return made


def test_a_fit_holds_the_directions_of_the_updates_and_a_batch_and_little_more() -> None:
    """An eighth of the dense stack in float32; with all columns of both sides kept until the end it was a sixth."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(32, *shape, generator=generator) for shape in ((768, 8), (8, 768)))

    def batches() -> Iterator[fit.Batch]:
        for own_B, own_A in zip(B.split(8), A.split(8), strict=True):
            yield {"g": [(own_B.double(), own_A.double())]}

    with Alive() as alive:
        fits = fit.directions({"g": (768, 768)}, lambda add_up: add_up(batches()))
        fit.begin(fits, {"g": (32, 32)}, lambda add_up: add_up(batches()))
        fit.sweep(fits, lambda add_up: add_up(batches()))
    assert alive.most < (B.nbytes * 768 / 8) / 7
