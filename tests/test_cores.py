from __future__ import annotations

import itertools
import math

import pytest
import tensorly as tl
import torch
from torch import Generator, Tensor

from core_contract import CoreContract, Numbers
from lotr import ConfigError
from lotr.math.cores import CORES, Core, CPCore, FreeCore, IdentityCore, ScaledCPCore, TTCore, TuckerCore

# ---- the contract, core by core


class TestFreeCore(CoreContract):
    core_class = FreeCore
    sizes = ((), *CoreContract.sizes)

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        return numbers["C"]

    def count(self, core: Core) -> int:
        return math.prod(core.sizes) * core.k * core.r


class TestIdentityCore(CoreContract):
    core_class = IdentityCore
    sizes, ranks = ((),), ((3, 3), (1, 1))

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        return torch.eye(core.r)

    def count(self, core: Core) -> int:
        return 0


class TestTuckerCore(CoreContract):
    core_class = TuckerCore

    def cores(self) -> list[Core]:
        ranks = {(5,): [(2,), (5,), (6,)], (3, 4): [(2, 3), (1, 6)], (2, 3, 4): [(2, 2, 2)]}
        return [
            TuckerCore(k, r, sizes, along)
            for (k, r), (sizes, choices) in itertools.product(self.ranks, ranks.items())
            for along in choices
        ]

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        factors = [numbers[f"factor_{n}"] for n in range(len(core.sizes))]
        sides = [torch.eye(n, dtype=torch.float64) for n in (core.k, core.r)]
        with tl.backend_context("pytorch"):
            return tl.tucker_to_tensor((numbers["core"], [*factors, *sides]))

    def count(self, core: Core) -> int:
        along = zip(core.sizes, core.ranks, strict=True)
        return math.prod(core.ranks) * core.k * core.r + sum(size * rank for size, rank in along)


class TestCPCore(CoreContract):
    core_class = CPCore
    sizes, ranks = ((), *CoreContract.sizes), ((3, 3), (1, 1))

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        weights = numbers.get("diagonal", torch.ones(core.r, dtype=torch.float64))
        factors = [numbers[f"factor_{n}"] for n in range(len(core.sizes))]
        sides = [torch.eye(core.r, dtype=torch.float64)] * 2
        with tl.backend_context("pytorch"):
            return tl.cp_to_tensor((weights, [*factors, *sides]))

    def count(self, core: Core) -> int:
        return core.r * sum(core.sizes) if core.sizes else core.r


class TestScaledCPCore(TestCPCore):
    core_class = ScaledCPCore
    sizes = CoreContract.sizes

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        factors = [numbers[f"factor_{n}"] for n in range(len(core.sizes))]
        sides = [torch.eye(core.r, dtype=torch.float64)] * 2
        with tl.backend_context("pytorch"):
            return tl.cp_to_tensor((numbers["weights"], [*factors, *sides]))

    def count(self, core: Core) -> int:
        return core.r * (1 + sum(core.sizes))


class TestTTCore(CoreContract):
    core_class = TTCore
    ranks = (*CoreContract.ranks, (1, 5))

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:
        """Return the train between two identities, whose open ends are the rows and columns of every `C_s`."""
        middle = [numbers[f"core_{n}"].movedim(0, 1) for n in range(len(core.sizes))]
        k, r = (torch.eye(n, dtype=torch.float64) for n in (core.k, core.r))
        with tl.backend_context("pytorch"):
            return tl.tt_to_tensor([k[None], *middle, r[..., None]]).movedim(0, -2)

    def count(self, core: Core) -> int:
        return core.sizes[0] * core.k * core.r + sum(core.sizes[1:]) * core.r**2


def test_every_core_is_under_contract() -> None:
    assert {contract.core_class for contract in (*CoreContract.__subclasses__(), TestScaledCPCore)} >= set(
        CORES.values()
    )


# ---- identities between cores


def test_a_tensor_train_over_one_mode_is_free() -> None:
    train, free, C = TTCore(3, 4, (5,)), FreeCore(3, 4, (5,)), torch.randn(5, 3, 4)
    assert torch.equal(train.to_tensor({"core_0": C}), free.to_tensor({"C": C}))
    assert train.shapes == {"core_0": free.shapes["C"]}


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 4)], ids=str)
def test_a_tucker_core_of_full_rank_is_free(sizes: tuple[int, ...]) -> None:
    tensor = torch.randn(*sizes, 3, 4, dtype=torch.float64)
    eyes = {f"factor_{n}": torch.eye(size, dtype=torch.float64) for n, size in enumerate(sizes)}
    assert torch.equal(TuckerCore(3, 4, sizes, ranks=sizes).to_tensor({"core": tensor, **eyes}), tensor)


def test_a_cp_core_without_modes_is_a_diagonal_and_over_one_mode_a_diagonal_a_site() -> None:
    diagonal, table = torch.randn(3), torch.randn(5, 3)
    assert torch.equal(CPCore(3, 3, ()).to_tensor({"diagonal": diagonal}), diagonal.diag())
    assert torch.equal(CPCore(3, 3, (5,)).to_tensor({"factor_0": table})[2], table[2].diag())


def _stack() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors, the core tensor, and the updates of all layers that our core gives."""
    U, V, C = torch.randn(6, 3), torch.randn(5, 4), torch.randn(7, 3, 4)
    return U, V, C, U @ FreeCore(k=3, r=4, sizes=(7,)).to_tensor({"C": C}) @ V.T


def test_tucker_2_with_an_identity_layer_mode_is_the_free_core() -> None:
    U, V, C, updates = _stack()
    tucker = tl.tucker_to_tensor((C.numpy(), [torch.eye(7).numpy(), U.numpy(), V.numpy()]))
    torch.testing.assert_close(torch.as_tensor(tucker), updates)


def test_a_tensor_train_with_the_layer_in_the_middle_is_the_free_core() -> None:
    U, V, C, updates = _stack()
    train = [U[None].numpy(), C.movedim(0, 1).numpy(), V.T[:, :, None].numpy()]
    torch.testing.assert_close(torch.as_tensor(tl.tt_to_tensor(train)).movedim(1, 0), updates)


# ---- what single cores promise


def test_a_free_core_counts_sites_and_not_places() -> None:
    assert FreeCore(2, 3, (4, 5)).n_parameters(n_sites=7) == 7 * 2 * 3


@pytest.mark.parametrize("size, rank", [(12, 4), (4, 4), (3, 5)])
def test_tucker_factors_start_orthonormal(size: int, rank: int) -> None:
    factor = TuckerCore(2, 2, (size,), (rank,)).init("factor_0", Generator().manual_seed(0))
    gram = factor.T @ factor if size >= rank else factor @ factor.T
    assert factor.shape == (size, rank)
    torch.testing.assert_close(gram, torch.eye(min(size, rank)))


@pytest.mark.parametrize("name", CORES)
def test_what_is_not_refused_works(name: str) -> None:
    pairs, choices = [(2, 2), (2, 3)], [(), ("layer",), ("layer", "head")]
    accepted = 0
    for (k, r), modes in itertools.product(pairs, choices):
        try:
            CORES[name].check(k, r, modes)
        except ConfigError:
            continue
        core = CORES[name](k, r, (3,) * len(modes), (2,) * len(modes))
        numbers = {number: core.init(number, Generator()) for number in core.shapes}
        assert core.to_tensor(numbers).shape == (*core.sizes, k, r)
        accepted += 1
    assert accepted == {"free": 6, "identity": 1, "tucker": 4, "cp": 3, "scaled_cp": 3, "tt": 4}[name]
