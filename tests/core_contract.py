"""What every core must do. A new core is tested by subclassing and naming its oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lotr.cores import Core

SIZES = [(), (5,), (3, 4)]


class CoreContract:
    """Set `core_class`; `own` and `shared` numbers are drawn from its shapes."""

    core_class: type[Core]

    @pytest.fixture(params=SIZES, ids=str)
    def core(self, request: pytest.FixtureRequest) -> Core:
        return self.core_class(k=3, r=4, sizes=request.param)

    def draw(self, core: Core) -> tuple[dict[str, Tensor], dict[tuple[int, ...], dict[str, Tensor]]]:
        shared = {name: torch.randn(shape) for name, shape in core.shared_shapes.items()}
        places = itertools.product(*(range(n) for n in core.sizes))
        owns = {
            place: {name: torch.randn(shape) for name, shape in core.own_shapes.items()} for place in places
        }
        return shared, owns

    def test_the_core_of_a_site_is_a_k_by_r_matrix(self, core: Core) -> None:
        shared, owns = self.draw(core)
        assert all(core.matrix(place, shared, own).shape == (3, 4) for place, own in owns.items())

    def test_the_tensor_holds_the_matrix_of_every_site(self, core: Core) -> None:
        shared, owns = self.draw(core)
        tensor = core.to_tensor(shared, owns)
        assert tensor.shape == (*core.sizes, 3, 4)
        for place, own in owns.items():
            torch.testing.assert_close(tensor[place], core.matrix(place, shared, own))

    def test_numbers_made_from_a_tensor_give_the_tensor_back(self, core: Core) -> None:
        tensor = core.to_tensor(*self.draw(core))
        torch.testing.assert_close(core.to_tensor(*core.from_tensor(tensor)), tensor)

    def test_a_place_without_a_site_is_zero(self) -> None:
        core = self.core_class(k=3, r=4, sizes=(5,))
        shared, owns = self.draw(core)
        del owns[(2,)]
        tensor = core.to_tensor(shared, owns)
        assert not tensor[2].any() and tensor[3].any()

    def test_the_count_is_that_of_the_numbers(self, core: Core) -> None:
        shared, owns = self.draw(core)
        numbers = [*shared.values(), *(tensor for own in owns.values() for tensor in own.values())]
        assert core.n_parameters(len(owns)) == sum(tensor.numel() for tensor in numbers)

    def test_gradients_reach_every_number(self, core: Core) -> None:
        shared, owns = self.draw(core)
        numbers = [*shared.values(), *(tensor for own in owns.values() for tensor in own.values())]
        for tensor in numbers:
            tensor.requires_grad_()
        sum(core.matrix(place, shared, own).square().sum() for place, own in owns.items()).backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in numbers)
