"""Products by oneDNN are those of the matrices, to rounding; an update of zero leaves every bit of the frozen model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from conftest import bert, tokens
from lotr import LotrConfig
from lotr.math import matmul as kernels
from lotr.math.fused_linear import adapted_linear
from lotr.math.linear_products import PartOfLinear, Place
from lotr.math.matmul import column_sums, product
from lotr.math.orders import Order
from lotr.methods import METHODS
from lotr.tuner.layer import LotrLinear

every_order = pytest.mark.parametrize("order", [Order(), Order(True, True)], ids=str)
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor and the size: with oneDNN."""
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(kernels, "_WORTH", 0)
    monkeypatch.setattr(kernels, "_FEW", 0)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the shape of every product that oneDNN takes."""
    seen: list[tuple[int, ...]] = []
    linear = kernels._linear

    def counted(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        result = linear(X, W, bias)
        seen.append(tuple(result.shape))
        return result

    monkeypatch.setattr(kernels, "_linear", counted)
    return seen


@pytest.mark.parametrize("size", [(70, 33, 4), (128, 96, 16), (5, 300, 200), (1, 1, 1), (64, 7, 1)], ids=str)
@pytest.mark.parametrize("turned", ["neither", "first", "second", "both"])
def test_a_product_is_that_of_the_matrices(
    size: tuple[int, int, int], turned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m, r = size
    seen = calls(monkeypatch)
    A = torch.randn(m, n).T if turned in ("first", "both") else torch.randn(n, m)
    B = torch.randn(r, m).T if turned in ("second", "both") else torch.randn(m, r)
    with torch.no_grad():
        found = product(A, B)
    assert len(seen) == 1
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)


PIECES = {
    "piece": (torch.randn(40, 90)[:, 10:70], torch.randn(60, 50)[:, 5:21]),
    "turned piece": (torch.randn(90, 40)[10:70].T, torch.randn(50, 60)[5:21].T),
    "every other row": (torch.randn(80, 60)[::2], torch.randn(120, 16)[::2]),
    "expanded": (torch.ones(()).expand(40, 60), torch.ones(16).expand(60, 16)),
    "overlapping": (torch.randn(460).unfold(0, 60, 10), torch.randn(16, 60).T),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_wider_matrices_are_taken_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN reads in any order lies densely one way or the other: else it reads number by number."""
    A, B = PIECES[name]
    operation, dense = torch.ops.mkldnn._linear_pointwise, []

    def seen(X: Tensor, W: Tensor, *more: object) -> Tensor:
        dense.append(W.is_contiguous() or W.T.is_contiguous())
        return operation(X, W, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", seen)
    for left, right in ((A, B), (B.T, A.T)):
        with torch.no_grad():
            found = product(left, right)
        torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4)
    assert dense == [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_pytorchs_own_switch_leave_it_to_pytorch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    A, B = torch.randn(64, 32), torch.randn(32, 16)
    with torch.no_grad():
        assert torch.equal(product(A.to(dtype), B.to(dtype)), A.to(dtype) @ B.to(dtype))
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(product(A, B), A @ B)
    assert seen == []


def test_whoever_watches_operations_sees_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        product(torch.randn(64, 32), torch.randn(32, 16))
    assert counter.get_total_flops() == 2 * 64 * 32 * 16


def case() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    numbers = [torch.randn(8, 48), torch.randn(8, 8), torch.randn(40, 8)]
    return torch.randn(3, 50, 48), torch.randn(40, 48), torch.randn(40), numbers


def output(x: Tensor, W: Tensor, bias: Tensor, numbers: list[Tensor], order: Order) -> Tensor:
    return adapted_linear(x, W, bias, [PartOfLinear(Place(0, 0), *numbers)], order)[0]


@every_order
def test_gradients_are_those_in_double_precision(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, W, bias, numbers = case()
        leaves = [t.to(dtype).requires_grad_() for t in (x, *numbers)]
        y = output(leaves[0], W.to(dtype), bias.to(dtype), leaves[1:], order)
        return [t.double() for t in torch.autograd.grad(y.square().sum(), leaves)]

    found, wanted = gradients(torch.float32), gradients(torch.float64)
    assert (150, 48) in seen  # the gradient of the input
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_gradients_can_be_differentiated_again() -> None:
    def twice(dtype: torch.dtype) -> list[Tensor]:
        x, W, bias, numbers = case()
        leaves = [t.to(dtype).requires_grad_() for t in (x, *numbers)]
        y = output(leaves[0], W.to(dtype), bias.to(dtype), leaves[1:], Order())
        once = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return [t.double() for t in torch.autograd.grad(sum(g.square().sum() for g in once), leaves)]

    for one, other in zip(twice(torch.float32), twice(torch.float64), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def wide(zero: str = "") -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return a case so wide that libraries differ in rounding; some of its numbers may be zero."""
    torch.manual_seed(0)
    numbers = {"Vt": torch.randn(8, 768), "C": torch.randn(8, 8), "U": torch.randn(96, 8)}
    if zero:
        numbers[zero].zero_()
    return torch.randn(50, 768), torch.randn(96, 768), torch.randn(96), list(numbers.values())


@every_order
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("zero", ["Vt", "C", "U"])
def test_an_update_of_zero_leaves_every_bit(zero: str, grad: bool, order: Order) -> None:
    x, W, bias, numbers = wide(zero)
    with torch.set_grad_enabled(grad):
        y = output(x, W, bias, numbers, order)
    assert torch.equal(y, nn.functional.linear(x, W, bias))


@every_order
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
def test_an_update_that_is_not_zero_takes_the_base_along(
    turned: bool, grad: bool, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    x, W, bias, numbers = wide()
    numbers[1] = torch.zeros(8, 8)
    numbers[1][-1, -1] = 1e-3  # one number will do
    with torch.set_grad_enabled(grad):
        found = output(x, W.T.contiguous().T if turned else W, bias, numbers, order)
    assert (50, 96) in seen
    Vt, C, U = (number.double() for number in numbers)
    wanted = x.double() @ (W.double() + U @ C @ Vt).T + bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@every_order
@pytest.mark.parametrize("grad", [False, True])
def test_pytorchs_own_switch_leaves_the_base_to_pytorch(
    grad: bool, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    x, W, bias, numbers = wide()
    with torch.set_grad_enabled(grad), torch.backends.mkldnn.flags(enabled=False):
        found = output(x, W, bias, numbers, order)
        monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", False)
        assert torch.equal(found, output(x, W, bias, numbers, order))
    assert seen == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_gradient", [False, True])
@pytest.mark.parametrize("train", ["all", "cores"])
def test_norms_get_their_product_from_that_of_few_tokens_with_the_base(
    train: str, norm_gradient: bool, grad: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 160, bias=bias))
    config = LotrConfig(
        r=4,
        magnitude="per_output",
        norm_gradient=norm_gradient,
        trainable=train,
        target_modules=["0"],
        init_weights=False,
    )
    model, x = get_peft_model(base, config), torch.randn(2, 20, 48)
    with torch.no_grad():
        for number in model.parameters():
            number += 0.1 * torch.randn(number.shape)

    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(grad), *(p for p in model.parameters() if p.requires_grad)]
        with torch.set_grad_enabled(grad):
            y = model(x)
        return [y.detach(), *(torch.autograd.grad(y.sin().sum(), leaves) if grad else ())]

    seen = calls(monkeypatch)
    found = run(model, x)
    if norm_gradient:  # it has a way back, and is a product of its own
        assert (40, 160) in seen and (44, 160) not in seen
    else:
        rows = 40 + 4 * (train == "all")  # of frozen factors it is kept
        assert (rows, 160) in seen and ((160, 4) in seen) == (train == "cores")
    for one, other in zip(found, run(model.double(), x.detach().double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("n", [0, 1, 70, 5000])
def test_sums_of_columns_are_those_in_double_precision(n: int) -> None:
    A, B = torch.randn(n, 33), torch.randn(n, 33)
    with torch.no_grad():
        found = column_sums(A, B.T.contiguous().T)
    wanted = A.double().sum(0), (A.double() * B.double()).sum(0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)


def test_sums_of_columns_read_their_operands_once() -> None:
    A, B = torch.randn(70, 33), torch.randn(70, 33)
    with torch.no_grad(), torch.profiler.profile() as profile:
        column_sums(A, B)
    assert not {"aten::mul", "aten::sum"} & {event.name for event in profile.events()}


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_few_rows_are_left_to_pytorch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FEW", 4)
    seen = calls(monkeypatch)
    _, W, bias, numbers = wide()
    with torch.no_grad():
        output(torch.randn(rows, 768), W, bias, numbers, Order())
    assert ((rows, 96) in seen) == (rows == 4)


@pytest.mark.parametrize("method", METHODS)
def test_step_0_of_every_row_is_the_base_bit_for_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = kernels._linear  # at these sizes the libraries round alike, so this one is made to differ
    monkeypatch.setattr(kernels, "_linear", lambda *numbers: linear(*numbers) * (1 + 1e-3))
    model = get_peft_model(bert(), LotrConfig(method=method, r=4, target_modules=["query", "value", "dense"]))
    logits = model.eval()(input_ids=tokens()).logits
    assert torch.equal(logits, bert().eval()(input_ids=tokens()).logits)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("train", ["all", "cores"])
def test_a_compiled_graph_takes_them_and_computes_the_same(
    train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    config = LotrConfig(r=4, trainable=train, target_modules=["query", "value"], init_weights=False)
    model = get_peft_model(bert(), config).eval()

    def run(call: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = call(input_ids=tokens()).logits
        logits.square().sum().backward()
        return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(model)
    seen = calls(monkeypatch)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    rows, width = tokens().numel(), model.config.hidden_size
    assert {(rows, 4), (rows, width)} <= set(
        seen
    )  # through the factors, and the gradient of a base layer's input
    # the base layers' own, but those without a layer below, and both factors of every module
    assert seen.count((rows, width)) > 4


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["lotr", "lora", "dora", "lora_xs", "metatt_5d", "lotr_joint", "map"])
def test_a_compiled_graph_without_gradients_has_one_operation_a_module(method: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    config = LotrConfig(method=method, r=4, target_modules=["query", "value", "dense"], init_weights=False)
    model = get_peft_model(bert(), config).eval()
    for rows in (4, 2):  # other sizes, other orders
        with torch.no_grad():
            wanted = model(input_ids=tokens()[:rows]).logits
            compiled = torch.compile(model, fullgraph=True, backend=keep)
            torch.testing.assert_close(compiled(input_ids=tokens()[:rows]).logits, wanted)
        found = sum(
            "adapted" in str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"
        )
        modules = sum(isinstance(module, LotrLinear) for module in model.modules())
        assert found == (0 if method == "map" else modules)  # MAP has gains of base and update


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("method", "train"), [("lotr", "all"), ("lotr", "cores"), ("lotr_joint", "all"), ("dora", "all")]
)
def test_a_compiled_graph_with_gradients_has_two_operations_a_module(method: str, train: str) -> None:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    config = LotrConfig(
        method=method, r=4, trainable=train, target_modules=["query", "value", "dense"], init_weights=False
    )
    model = get_peft_model(bert(), config).train()
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run(call: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        call(input_ids=tokens()).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend=backend)), run(model))
    modules = sum(isinstance(module, LotrLinear) for module in model.modules())
    forward, backward = graphs
    assert forward.count("lotr.adapted.default") == modules
    assert backward.count("lotr.adapted_gradients.default") == modules
    # one for query and value, which read the same tensor through the same V, one for the attention's output; the pooler
    shared = 2 * model.config.num_hidden_layers + 1
    products = shared if method == "lotr_joint" else 0
    assert forward.count("lotr.product.default") == products


# first row, first column, blocks down and across, whether `x V` is given: the whole weight; two by two blocks
WHOLE, BLOCKS = [0, 0, 1, 1, 1], [0, 0, 2, 2, 0]


def said_to_the_operation(trains: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return input, weight, bias, numbers and given products of two parts that stand at `WHOLE` and `BLOCKS`."""
    torch.manual_seed(0)

    def number(*shape: int, trains_alone: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=trains == "all" or trains_alone)

    x, W, bias = number(2, 5, 12, trains_alone=True), torch.randn(8, 12, dtype=dtype), number(8)
    whole = number(3, 12), number(2, 3, trains_alone=True), number(8, 2)
    blocks = number(4, 6), number(4, 8, trains_alone=True), number(4, 2)
    return x, W, bias, [*whole, *blocks], [number(10, 3, trains_alone=True)]


@pytest.mark.parametrize("asked", ["plain", "merged"])
@pytest.mark.parametrize("trains", ["all", "cores"])
def test_the_operation_of_a_graph_is_registered_as_it_computes(asked: str, trains: str) -> None:
    said = said_to_the_operation(trains, torch.float32)
    for of_gradients in (True, False):
        with torch.set_grad_enabled(of_gradients):
            torch.library.opcheck(
                torch.ops.lotr.adapted.default,
                (*said, WHOLE + BLOCKS, asked, of_gradients),
                raise_exception=True,
            )


@pytest.mark.parametrize("asked", ["plain", "merged"])
@pytest.mark.parametrize("trains", ["all", "cores"])
def test_the_operation_of_a_graph_has_the_gradients_of_its_output(asked: str, trains: str) -> None:
    x, W, bias, numbers, _ = said_to_the_operation(trains, torch.float64)
    leaves = [x, bias, *numbers]

    def output(x: Tensor, bias: Tensor, *numbers: Tensor) -> Tensor:
        products = [x.flatten(0, 1) @ numbers[0].T]
        places = WHOLE + BLOCKS
        found: list[Tensor] = torch.ops.lotr.adapted(x, W, bias, [*numbers], products, places, asked, True)
        return found[0]

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


@pytest.mark.filterwarnings("default")
def test_a_compiled_graph_without_gradients_keeps_tangents_and_global_hooks() -> None:
    model, x = small()
    torch._dynamo.reset()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        wanted = forward_ad.unpack_dual(model(dual)).tangent
        found = forward_ad.unpack_dual(torch.compile(model, backend="eager")(dual)).tangent
    torch.testing.assert_close(found, wanted)
    called: list[str] = []
    handle = hooks.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    try:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend="eager")(x)
    finally:
        handle.remove()
    assert called.count("Linear") == 2 * 4  # base, V, C and U of two modules


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    config = LotrConfig(r=3, target_modules=["0", "2"], modes=(), init_weights=False, seed=0)
    return get_peft_model(base, config), torch.randn(6, 12)


@pytest.mark.filterwarnings("default")
def test_transforms_inside_a_compiled_graph_have_the_same_gradients() -> None:
    torch._dynamo.reset()
    model, x = small()
    numbers = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(numbers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, numbers, (x,)).square().sum()

    wanted = torch.func.grad(loss)(numbers)
    found = torch.compile(torch.func.grad(loss), backend="eager")(numbers)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("default")
def test_gradients_of_a_compiled_graph_can_be_differentiated_again() -> None:
    torch._dynamo.reset()
    model, x = small()
    trained = [p for p in model.parameters() if p.requires_grad]

    def twice(call: nn.Module) -> tuple[Tensor, ...]:
        once = torch.autograd.grad(call(x).sin().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), trained)

    torch.testing.assert_close(twice(torch.compile(model, backend="eager")), twice(model))


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this PyTorch does not tell an export"
)
def test_an_exported_graph_has_operations_of_pytorch_alone() -> None:
    torch._dynamo.reset()
    model, x = small()
    assert "lotr" not in {
        str(node.target).split(".")[0] for node in torch.export.export(model, (x,)).graph.nodes
    }


@pytest.mark.filterwarnings("default")
def test_hooks_on_factors_are_heard_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    model, x = small()
    groups = [module for module in model.modules() if hasattr(module, "lotr_V")]
    for group in groups:
        group.lotr_V["default"].register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
