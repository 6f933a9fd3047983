"""The adapted module takes the fused function where it can, calls its modules where it must; the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conftest import bert, tokens
from lotr import LotrConfig
from lotr.math import fused_linear
from lotr.methods import METHODS
from lotr.tuner.layer import LotrLinear

TARGETS = ["query", "key", "value", "output"]


class Attention(nn.Module):
    """Three projections of one input, and one of all."""

    def __init__(self) -> None:
        super().__init__()
        for name in TARGETS:
            self.add_module(name, nn.Linear(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output((self.query(x) * self.key(x)).tanh() + self.value(x))


class Tower(nn.Module):
    """A few layers, each called by `run`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


def adapted(dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    defaults = {"r": 4, "target_modules": TARGETS, "seed": 0, "init_weights": False}
    return get_peft_model(Tower().to(dtype), LotrConfig(**{**defaults, **fields}))


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape or (2, 40, 24), generator=generator, dtype=torch.float64).to(dtype)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_(True)
    model.zero_grad()
    y = model(x)
    y.float().sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextmanager
def modules_only() -> Iterator[None]:
    """Inside, every adapted module calls its modules one by one: the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LotrLinear, "_has_plain_tensors", lambda *_: False)
        yield


def by_modules(model: nn.Module, x: Tensor) -> list[Tensor]:
    with modules_only():
        return run(model, x)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[LotrLinear]:
    """The layer of every call of the fused function."""
    calls: list[LotrLinear] = []
    whole = LotrLinear._fused

    def counted(layer: LotrLinear, adapter: str, x: Tensor) -> Tensor:
        calls.append(layer)
        return whole(layer, adapter, x)

    monkeypatch.setattr(LotrLinear, "_fused", counted)
    return calls


# ---- both doors give the same


@pytest.mark.parametrize("margin", [1e9, 0.0], ids=["plain", "merged"])
@pytest.mark.parametrize(
    "row", [name for name, row in METHODS.items() if "head" not in row.modes and row.blocks != "head"]
)
def test_every_row_is_fused_and_equals_its_modules(
    row: str, margin: float, fused: list[LotrLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "_MARGIN", margin)
    model = adapted(method=row)
    wanted = by_modules(model, x_of())
    assert not fused
    found = run(model, x_of())
    # of MAP the base and the update have gains of their own
    assert len(fused) == (0 if METHODS[row].magnitude == "base_and_update" else 8)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_models_of_transformers_take_the_fused_function(
    architecture: object, fused: list[LotrLinear]
) -> None:
    """Also fused projections, transposed weights and grouped queries, in the methods of everyday."""
    for method, trainable in (("lotr", "all"), ("lotr_joint", "all"), ("lora", "all"), ("lotr", "cores")):
        # of the joint method one name, because shared factors need equal blocks: in GPT-2 it holds three projections
        targets = architecture.targets[: 1 if method == "lotr_joint" else None]
        config = LotrConfig(
            method=method, trainable=trainable, init="orthonormal", r=4, target_modules=targets
        )
        fused.clear()
        model = get_peft_model(architecture.make(), config)
        model(**architecture.inputs())
        assert set(fused) == {m for m in model.modules() if isinstance(m, LotrLinear)}, (method, trainable)


@pytest.mark.parametrize("kept", ["mm", "tanh"])
def test_selective_checkpointing_gives_the_same_gradients(kept: str) -> None:
    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        saves = kept in str(operation)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    model = adapted()
    wanted = run(model, x_of())
    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.base_model.model.run = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(run(model, x_of()), wanted)


@pytest.mark.parametrize("forward", [False, True], ids=["backward alone", "both ways"])
@pytest.mark.parametrize("magnitude", ["none", "per_output"])
def test_autocast_computes_in_its_type_and_sends_gradients_in_theirs(magnitude: str, forward: bool) -> None:
    model, x = adapted(torch.float32, magnitude=magnitude), x_of(dtype=torch.float32)
    model.base_model.model.run = lambda layer, x: torch.autocast("cpu", torch.bfloat16, enabled=forward)(
        layer.forward
    )(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = run(model, x), by_modules(model, x)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.1 * other.norm() + 1e-3


def test_autocast_leaves_double_precision_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = run(adapted(), x_of()), by_modules(adapted(), x_of())
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_trains_under_autocast(method: str) -> None:
    """Some products of small cores have a type of their own under autocast."""
    config = LotrConfig(method=method, r=4, target_modules=["query", "value"], init_weights=False, seed=0)
    model = get_peft_model(bert(num_hidden_layers=2), config).eval()

    def trained() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(input_ids=tokens()).logits
        logits.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        return logits.detach().float(), torch.cat(gradients)

    wanted = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained()
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.1 * other.norm()


def test_second_derivatives_reach_the_input() -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = x_of().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return [slope.detach(), *torch.autograd.grad(slope.square().sum(), trained)]

    for fields in (
        {"method": "lotr_joint"},
        {"trainable": "cores", "init": "orthonormal"},
        {"magnitude": "per_output"},
    ):
        model = adapted(**fields)
        found = penalty(model)
        with modules_only():
            wanted = penalty(model)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_a_batch_without_rows_is_no_error(shape: tuple[int, ...]) -> None:
    """An expert that gets no token, for example."""
    model = adapted(method="lotr_joint")
    for found, wanted in zip(run(model, x_of(*shape)), by_modules(model, x_of(*shape)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("magnitude", ["none", "per_output"])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)], ids=str)
def test_models_may_write_into_the_output(magnitude: str, shape: tuple[int, ...]) -> None:
    """`hidden += residual` and in-place activations are common, and allowed on the output of a plain linear."""
    layer = next(m for m in adapted(magnitude=magnitude).modules() if isinstance(m, LotrLinear))

    def written() -> list[Tensor]:
        layer.zero_grad()
        y = layer(x_of(*shape))
        y += x_of(*shape)
        y.relu_().sum().backward()
        return [y.detach(), layer.lotr_C["default"].weight.grad]

    found = written()
    with modules_only():
        torch.testing.assert_close(found, written())


# ---- where the modules are called


def test_what_listens_to_a_module_still_hears_it(fused: list[LotrLinear]) -> None:
    model = adapted()
    heard: list[str] = []
    layers = [m for m in model.modules() if isinstance(m, LotrLinear)]
    layers[0].base_layer.register_forward_hook(lambda *_: heard.append("base"))
    _, group = layers[1].adapters["default"].parts[0]
    group.lotr_U["default"].register_forward_pre_hook(lambda *_: heard.append("U"))
    found = run(model, x_of())
    assert sorted(heard) == ["U", "U", "base"]  # the group has a module in each of the two layers
    assert len(fused) == 8 - 3
    torch.testing.assert_close(found, by_modules(adapted(), x_of()), rtol=1e-11, atol=1e-11)


def test_dropout_and_a_trained_base_call_the_modules(fused: list[LotrLinear]) -> None:
    model = adapted(dropout=0.5).train()
    model(x_of())
    assert not fused
    model.eval()(x_of())
    assert len(fused) == 8
    fused.clear()
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, LotrLinear):
            layer.base_layer.weight.requires_grad_(True)
    run(model, x_of())
    assert not fused
    with torch.no_grad():  # as PyTorch's own linears, where no gradient is taken: the same bits
        assert torch.equal(model(x_of()), adapted()(x_of()))


def test_hooks_on_all_modules_hear_every_module() -> None:
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m).__name__))
    try:
        adapted()(x_of())
    finally:
        handle.remove()
    assert called.count("Linear") == 3 * 8  # base, V and U of eight modules
    assert called.count("SiteCores") == 8


def test_transforms_of_functions_work() -> None:
    """Gradients a row by `vmap` of `grad` are those of one row at a time."""
    model = adapted()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(numbers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, numbers, (x,)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x_of())
    for n, x in enumerate(x_of()):
        model.zero_grad()
        model(x).sin().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name][n], parameter.grad, rtol=1e-9, atol=1e-10)


def test_forward_mode_equals_a_difference() -> None:
    model, x, direction = adapted(), x_of(), torch.randn(2, 40, 24, dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    with torch.no_grad():
        difference = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)


def test_a_traced_model_can_be_saved(tmp_path: Path) -> None:
    model = adapted().eval().base_model.model
    traced = torch.jit.trace(model, x_of(), check_trace=False)
    traced.save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x_of()), model(x_of()))


def test_nested_inputs_call_the_modules() -> None:
    texts = [x_of(4, 24), x_of(2, 24)]
    query = adapted().base_model.model.layers[0].query
    nested = torch.nested.nested_tensor(texts, layout=torch.jagged)
    for found, text in zip(query(nested).unbind(), texts, strict=True):
        torch.testing.assert_close(found, query(text))
