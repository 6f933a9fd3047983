"""The adapted module takes the one step where it can, calls the modules where it must, and the result is the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import bert, tokens
from lotr import LotrConfig
from lotr.math.orders import AUTOGRAD, ORDERS
from lotr.methods import METHODS
from lotr.tuner import direct
from lotr.tuner.layer import LotrLinear


class Attention(nn.Module):
    """Three projections of one input, and one of their sum."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        for name in ("query", "key", "value", "output"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output((self.query(x) * self.key(x)).tanh() + self.value(x))


class Tower(nn.Module):
    """A few layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


TARGETS = ["query", "key", "value", "output"]


def adapted(order: str = "auto", dtype: torch.dtype = torch.float64, **fields: object) -> nn.Module:
    config = LotrConfig(
        **{"r": 4, "target_modules": TARGETS, "seed": 0, "order": order, "init_weights": False, **fields}
    )
    return get_peft_model(Tower().to(dtype), config)


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = model(x)
    model.zero_grad()
    y.sin().sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every call of the one step."""
    seen: list[str] = []
    whole = direct.output

    def counted(found: object, x: Tensor) -> Tensor:
        seen.append("step")
        return whole(found, x)

    monkeypatch.setattr(direct, "output", counted)
    return seen


ROWS = [name for name, row in METHODS.items() if "head" not in row.modes and row.blocks != "head"]


@pytest.mark.parametrize("order", [name for name in ORDERS if name != AUTOGRAD])
@pytest.mark.parametrize("row", ROWS)
def test_every_row_and_order_equals_the_steps_of_autograd(row: str, order: str, steps: list[str]) -> None:
    wanted, wanted_gradients = gradients(adapted(AUTOGRAD, method=row), x_of())
    assert not steps
    found, found_gradients = gradients(adapted(order, method=row), x_of())
    assert steps or METHODS[row].magnitude == "base_and_update"
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert wanted_gradients.keys() == found_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("train", ["all", "cores"])
def test_a_product_is_computed_once_for_modules_that_share_it(train: str) -> None:
    model = adapted(method="lotr_joint", trainable=train, target_modules=["query", "key", "value"])
    counts: list[int] = []
    find = direct.InputProducts.find

    def counted(self: direct.InputProducts, key: object, x: Tensor) -> Tensor | None:
        h = find(self, key, x)
        counts.append(h is not None)
        return h

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct.InputProducts, "find", counted)
        gradients(model, x_of())
    assert counts == [False, True, True] * 3
    products = next(m for m in model.modules() if hasattr(m, "products")).products
    assert products._here.kept is None  # no activation outlives its pass


def test_checkpointing_gives_the_same_gradients() -> None:
    for method in ("lotr", "lotr_joint"):
        model = adapted(method=method)
        _, wanted = gradients(model, x_of())
        model.base_model.model.checkpointed = True
        _, found = gradients(model, x_of())
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("magnitude", ["none", "per_output"])
def test_autocast_computes_in_its_type_and_sends_gradients_in_theirs(magnitude: str) -> None:
    wanted = adapted(AUTOGRAD, torch.float32, magnitude=magnitude)
    found = adapted("auto", torch.float32, magnitude=magnitude)
    x = x_of(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, gradients_one = gradients(found, x)
        other, gradients_other = gradients(wanted, x)
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)
    for name, gradient in gradients_other.items():
        assert gradients_one[name].dtype == torch.float32
        assert (gradients_one[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3, name


@pytest.mark.parametrize("order", ["auto", AUTOGRAD])
@pytest.mark.parametrize("method", METHODS)
def test_every_row_trains_under_autocast(method: str, order: str) -> None:
    """Some products of small cores have a type of their own under autocast."""
    config = LotrConfig(
        method=method, r=4, target_modules=["query", "value"], init_weights=False, order=order, seed=0
    )
    model = get_peft_model(bert(), config).eval()

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(input_ids=tokens()).logits
        logits.square().sum().backward()
        return logits.detach().float(), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        )

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.1 * other.norm()


def test_what_listens_to_a_module_still_hears_it(steps: list[str]) -> None:
    model = adapted()
    heard: list[str] = []
    layers = [m for m in model.modules() if isinstance(m, LotrLinear)]
    layers[0].base_layer.register_forward_hook(lambda *_: heard.append("base"))
    group = layers[1].lotr_site["default"].members[0].group
    group.lotr_U["default"].register_forward_pre_hook(lambda *_: heard.append("U"))
    y, _ = gradients(model, x_of())
    assert heard.count("base") == 1
    assert heard.count("U") == 3  # of one projection, in every layer
    assert len(steps) == 12 - 4 + (layers[0].lotr_site["default"].members[0].group is group)
    torch.testing.assert_close(y, gradients(adapted(AUTOGRAD), x_of())[0], rtol=1e-11, atol=1e-11)


def test_dropout_and_a_trained_base_call_the_modules(steps: list[str]) -> None:
    model = adapted(dropout=0.5)
    model.train()
    model(x_of())
    assert not steps
    model.eval()
    model(x_of())
    assert len(steps) == 12
    steps.clear()
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, LotrLinear):
            layer.base_layer.weight.requires_grad_(True)
    gradients(model, x_of())
    assert not steps


def test_transforms_of_functions_work() -> None:
    """Gradients a row by `vmap` of `grad` are those of one row at a time."""
    model = adapted()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(numbers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, numbers, (x,)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x_of())
    for n, x in enumerate(x_of()):
        _, wanted = gradients(model, x)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name][n], gradient, rtol=1e-9, atol=1e-10)


def test_forward_mode_equals_a_difference() -> None:
    import torch.autograd.forward_ad as forward

    model, x, direction = adapted(), x_of(), torch.randn(2, 40, 24, dtype=torch.float64)
    with forward.dual_level():
        tangent = forward.unpack_dual(model(forward.make_dual(x, direction))).tangent
    step = 1e-6
    with torch.no_grad():
        difference = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [name for name in ORDERS if name != AUTOGRAD])
def test_second_derivatives_reach_the_input(order: str) -> None:
    def penalty(order: str) -> tuple[Tensor, list[Tensor]]:
        model, x = adapted(order, method="lotr_joint"), x_of().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return slope.detach(), list(torch.autograd.grad(slope.square().sum(), trained))

    (found, again), (wanted, wanted_again) = penalty(order), penalty(AUTOGRAD)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(again, wanted_again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_pass_without_gradients_inside_one_with_does_not_cut_the_graph() -> None:
    model = adapted(method="lotr_joint")
    layer = next(m for m in model.modules() if isinstance(m, LotrLinear))
    x = x_of()
    products = layer.lotr_site["default"].members[0].group.products
    with products.one_pass():
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.lotr_site["default"].members[0].group.lotr_V["default"].weight.grad is not None


@pytest.mark.parametrize("magnitude", ["none", "per_output"])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_models_may_write_into_the_output(magnitude: str, shape: tuple[int, ...]) -> None:
    """`hidden += residual` and in-place activations are common, and allowed on the output of a plain linear."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for order in ORDERS:
        model = adapted(order, magnitude=magnitude)
        layer = next(m for m in model.modules() if isinstance(m, LotrLinear))
        y = layer(x)
        y += x
        y.relu_().sum().backward()
        found.append((y.detach(), layer.lotr_C["default"].weight.grad))
    for y, gradient in found:
        torch.testing.assert_close(y, found[-1][0])
        torch.testing.assert_close(gradient, found[-1][1])
