"""What every core must do. A new core is tested by a subclass that names its cores, its oracle and its count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Generator, Tensor

from lotr.math.cores import Core, Region

Numbers = dict[str, Tensor]
Pair = tuple[int, int]


class CoreContract:
    """Set `core_class`, `sizes` and `ranks`; define `oracle` and `count`."""

    core_class: type[Core]
    #: Extents of the modes that the structure allows.
    sizes: tuple[tuple[int, ...], ...] = ((5,), (3, 4), (2, 3, 4))
    #: `(k, r)` that it allows.
    ranks: tuple[Pair, ...] = ((3, 3), (3, 4), (4, 3))

    def oracle(self, core: Core, numbers: Numbers) -> Tensor:  # (*sizes, k, r)
        """Return the dense tensor, by code that is not ours."""
        raise NotImplementedError

    def count(self, core: Core) -> int:
        """Return how many numbers the structure has, by its closed formula."""
        raise NotImplementedError

    def cores(self) -> list[Core]:
        return [self.core_class(k, r, sizes) for sizes, (k, r) in itertools.product(self.sizes, self.ranks)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for fixture in {"core", "storing"} & set(metafunc.fixturenames):
            cores = [core for core in self.cores() if core.shapes or fixture == "core"]
            names = [f"{core.sizes}{core.ranks or ''} k={core.k} r={core.r}" for core in cores]
            metafunc.parametrize(fixture, cores, ids=names)

    def draw(self, core: Core, dtype: torch.dtype = torch.float64) -> Numbers:
        return {name: torch.randn(shape, dtype=dtype) for name, shape in core.shapes.items()}

    def started(self, core: Core) -> Numbers:
        """Return the numbers as training finds them: one at zero, the others as they start."""
        numbers = {name: core.init(name, Generator().manual_seed(0)) for name in core.shapes}
        return {name: t.zero_() if name == core.zero else t for name, t in numbers.items()}

    # ---- the tensor

    def test_the_tensor_is_the_oracles(self, core: Core) -> None:
        numbers = self.draw(core)
        tensor = core.to_tensor(numbers)
        assert tensor.shape == (*core.sizes, core.k, core.r)
        torch.testing.assert_close(tensor.double(), self.oracle(core, numbers).double())

    def test_the_cores_of_a_region_are_a_block_of_the_tensor(self, core: Core) -> None:
        numbers = self.draw(core)
        tensor = core.to_tensor(numbers)
        runs = [[slice(0, n), slice(0, 1), slice(1, n), slice(n - 1, n)] for n in core.sizes]
        regions: list[Region] = list(itertools.product(*runs))
        for region in regions:
            torch.testing.assert_close(core.block(numbers, region), tensor[region])

    # ---- the numbers

    def test_the_count_is_that_of_the_numbers_and_of_the_formula(self, core: Core) -> None:
        held = sum(number.numel() for number in self.draw(core).values())
        assert core.n_parameters(math.prod(core.sizes)) == held == self.count(core)

    def test_gradients_are_those_of_the_oracle(self, storing: Core) -> None:
        weights = torch.randn(*storing.sizes, storing.k, storing.r, dtype=torch.float64)
        numbers = {name: number.requires_grad_() for name, number in self.draw(storing).items()}
        ours, theirs = (
            torch.autograd.grad((tensor * weights).sin().sum(), list(numbers.values()))
            for tensor in (storing.to_tensor(numbers), self.oracle(storing, numbers))
        )
        assert all(gradient.any() for gradient in ours)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
    def test_the_tensor_has_the_type_of_the_numbers(
        self, storing: Core, dtype: torch.dtype, tolerance: float
    ) -> None:
        numbers = self.draw(storing)
        tensor = storing.to_tensor({name: number.to(dtype) for name, number in numbers.items()})
        assert storing.to_tensor(numbers).dtype == torch.float64 and tensor.dtype == dtype
        error = (tensor.double() - storing.to_tensor(numbers)).norm() / tensor.double().norm()
        assert error < tolerance

    def test_the_tensor_is_on_the_device_of_the_numbers(self, storing: Core) -> None:
        numbers = {name: number.to("meta") for name, number in self.draw(storing).items()}
        assert storing.to_tensor(numbers).is_meta

    # ---- the start

    def test_one_number_at_zero_makes_every_core_zero(self, storing: Core) -> None:
        numbers = self.started(storing)
        assert {name: tuple(number.shape) for name, number in numbers.items()} == storing.shapes
        assert [name for name, number in numbers.items() if not number.any()] == [storing.zero]
        assert not storing.to_tensor(numbers).any()

    def test_from_there_the_gradient_moves_that_number_alone(self, storing: Core) -> None:
        numbers = {name: number.requires_grad_() for name, number in self.started(storing).items()}
        (storing.to_tensor(numbers) * torch.randn(*storing.sizes, storing.k, storing.r)).sum().backward()
        assert [name for name, number in numbers.items() if number.grad.any()] == [storing.zero]

    def test_without_a_zero_the_start_is_a_tensor_that_the_generator_decides(self, storing: Core) -> None:
        before = torch.get_rng_state()
        first, again, other = (
            {name: storing.init(name, generator) for name in storing.shapes}
            for generator in (Generator().manual_seed(seed) for seed in (0, 0, 1))
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert storing.to_tensor(first).any()
        assert torch.equal(storing.to_tensor(first), storing.to_tensor(again))
        assert not torch.equal(storing.to_tensor(first), storing.to_tensor(other))
